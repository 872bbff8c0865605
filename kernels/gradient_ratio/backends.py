"""The ways to compute the gradient ratio, and which of them can run in this process."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.gradient_ratio.integral import integral
from kernels.gradient_ratio.reference import reference
from kernels.gradient_ratio.scales import FULL_SCALE, Scales


class Backend(NamedTuple):
    """A way to compute the operator, and why it cannot run here ('' when it can)."""

    run: Callable[..., Tensor]
    description: str
    unavailable: str = ""


def _definition(images: Tensor, scales: Scales) -> Tensor:
    floats = images if images.is_floating_point() else images.to(torch.float32) / FULL_SCALE[images.dtype]
    return reference(floats, *scales).to(torch.float32)


def _triton(images: Tensor, scales: Scales) -> Tensor:
    from kernels.gradient_ratio.tiles import tiles  # not before: this package works without triton

    return tiles(images, scales)


def why_not_triton() -> str:
    """Why the Triton kernels cannot run in this process, '' when they can; asks no CUDA driver to start."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'sar-foundation[gpu]'"
    if os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y"):
        return ""
    # The count comes from NVML where there is one; unlike is_available, it leaves a later fork alone.
    return "" if torch.cuda.device_count() else "no CUDA device; TRITON_INTERPRET=1 runs it on a CPU, slowly"


BACKENDS = {
    "reference": Backend(_definition, "the definition: dense convolutions in the images' dtype"),
    "integral": Backend(integral, "integral image: int32 sums of integer images, float64 sums of float images"),
    "triton": Backend(_triton, "one Triton launch for all maps; sums as integral's", why_not_triton()),
}


def resolve(backend: str, device_type: str) -> str:
    """The backend that `auto` stands for on a device type; any other name must be one; ValueError if it cannot run."""
    if backend == "auto":
        return "triton" if device_type == "cuda" and not BACKENDS["triton"].unavailable else "integral"
    if backend not in BACKENDS:
        raise ValueError(f"unknown target backend {backend!r}: choose auto, {', '.join(BACKENDS)}")
    if BACKENDS[backend].unavailable:
        raise ValueError(f"target backend {backend!r} cannot run here: {BACKENDS[backend].unavailable}")
    return backend
