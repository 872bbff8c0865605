"""Timings as ratios within one run: the gradient target and the training step, each against its definition."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from foundation.config import Config, from_dict
from foundation.models.initialise import initialise
from foundation.objectives.reconstruction import MaskedReconstruction
from foundation.objectives.registry import build
from kernels.gradient_ratio import gradient_ratio
from kernels.gradient_ratio.reference import half_windows
from kernels.gradient_ratio.reference import reference as dense_target

RADII, OFFSET, BATCH = (5, 9, 13, 17), 0.01, 8
Row = tuple[str, str, str, str]


def rows(repeats: int) -> Iterator[Row]:
    """Rows (what, median ms per image, times faster than the first of its group, largest error against float64)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield from target_rows(repeats, device)
    finally:
        torch.set_num_threads(threads)
    yield from step_rows(repeats, device)


def speckle(device: torch.device) -> Tensor:
    """Eight 4-look amplitude chips as uint8 [8, 1, 224, 224], with a bright square in each."""
    generator = torch.Generator().manual_seed(0)
    looks = torch.rand(4, BATCH, 1, 224, 224, generator=generator).log().neg()
    images = (looks.mean(0).sqrt() * 50).clamp(0, 255)
    images[..., 100:120, 90:130] = 240
    return images.to(torch.uint8).to(device)


def published_form(images: Tensor) -> Tensor:
    """The target as the published code computes it: sixteen convolutions with one output channel each."""
    maps = []
    for radius in RADII:
        padded = F.pad(images, (radius,) * 4, mode="reflect") + OFFSET
        masks = half_windows(radius, "include", images.device, images.dtype)
        left, right, top, bottom = (F.conv2d(padded, mask[None]) for mask in masks)
        maps.append(torch.sqrt(torch.log(left / right) ** 2 + torch.log(top / bottom) ** 2))
    return torch.cat(maps, dim=1)


def target_rows(repeats: int, device: torch.device) -> Iterator[Row]:
    """The gradient target, batch 8 at 224 px, one CPU thread: both dense forms and the integral image."""
    integers = speckle(device)
    floats = integers.float() / 255
    exact = dense_target(floats.double(), RADII, OFFSET, "include")
    variants: list[tuple[str, Callable[[], Tensor]]] = [
        ("target: 16 dense convolutions, as published", lambda: published_form(floats)),
        ("target: 4 dense convolutions of 4 channels", lambda: gradient_ratio(floats, RADII, backend="reference")),
        ("target: integral image, float32 input", lambda: gradient_ratio(floats, RADII)),
        ("target: integral image, uint8 input (int32 sums)", lambda: gradient_ratio(integers, RADII)),
    ]
    errors = [f"{(make().double() - exact).abs().max().item():.1e}" for _, make in variants]
    yield from table([(name, make) for name, make in variants], errors, BATCH, repeats, device)


def step_rows(repeats: int, device: torch.device) -> Iterator[Row]:
    """Forward, backward and target of the tiny model: reference settings, defaults, and defaults in bf16."""
    settings = [
        ("step: reference attention, dense target, fp32", "reference", "reference", "fp32"),
        ("step: default settings, fp32", "auto", "auto", "fp32"),
        ("step: default settings, bf16", "auto", "auto", "bf16"),
    ]
    variants = [(name, make_step(attention, target, p, device)) for name, attention, target, p in settings]
    yield from table(variants, [""] * len(variants), BATCH, repeats, device)


def make_step(attention: str, target: str, precision: str, device: torch.device) -> Callable[[], object]:
    """One training step of `configs/sar-jepa-tiny.yaml`'s model on fixed images, without the optimiser."""
    decoder = {"width": 192, "depth": 2, "heads": 6}
    model_tree = {"size": "tiny", "attention": attention, "decoder": decoder}
    config: Config = from_dict({"model": model_tree, "data": {"lanes": 1}, "train": {"precision": precision}})
    objective = build(config)
    objective.target = TimedTarget(objective, target)
    model = objective.build_model().to(device)
    initialise(model, 0)
    images = speckle(device).float() / 255
    positions = torch.arange(BATCH, device=device)

    def step() -> None:
        inputs = objective.prepare(images, positions)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            prediction = model(*inputs.model_args)
        loss, _ = objective.loss(prediction, inputs)
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


class TimedTarget:
    """The configured target with a chosen backend of the operator."""

    def __init__(self, objective: MaskedReconstruction, backend: str) -> None:
        self.names, self.backend = objective.target.names, backend

    def maps(self, images: Tensor) -> Tensor:
        """fp32 [B, 1, H, W] → fp32 [B, 4, H, W]."""
        return gradient_ratio(images, RADII, OFFSET, backend=self.backend)


def table(
    variants: list[tuple[str, Callable[[], object]]],
    errors: list[str],
    images: int,
    repeats: int,
    device: torch.device,
) -> Iterator[Row]:
    """Time all variants in turn, so that a slow moment of the machine hits each of them; medians and ratios."""
    seconds: list[list[float]] = [[] for _ in variants]
    for round_number in range(repeats + 1):
        for slot, (_, run) in enumerate(variants):
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_number:  # the first round warms up
                seconds[slot].append(time.perf_counter() - start)
    medians = [statistics.median(s) for s in seconds]
    for (name, _), median, error in zip(variants, medians, errors, strict=True):
        yield name, f"{median / images * 1e3:.3g}", f"{medians[0] / median:.1f}", error
