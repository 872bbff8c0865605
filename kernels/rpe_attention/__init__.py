"""Attention with a contextual relative-position bias (iRPE, product method, on keys).

One call, several backends: a new backend is a function with the same arguments and one row in `BACKENDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from kernels.rpe_attention.reference import reference
from kernels.rpe_attention.sdpa import dense, sdpa


class Backend(NamedTuple):
    """A way to compute the operator, and why it cannot run here ('' when it can)."""

    run: Callable[..., Tensor]
    description: str
    unavailable: str = ""


BACKENDS = {
    "reference": Backend(reference, "the definition, every map materialised, any dtype"),
    "sdpa": Backend(sdpa, "PyTorch scaled_dot_product_attention with a dense bias made of matrix products"),
    "dense": Backend(dense, "batched matrix products throughout; the fastest on a CPU"),
}


def resolve(backend: str, device_type: str) -> str:
    """The backend that `auto` stands for on a device type; any other name is itself."""
    return ("dense" if device_type == "cpu" else "sdpa") if backend == "auto" else backend


def rpe_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    grid: tuple[int, int],
    cls_tokens: int = 1,
    qk_scale: float | None = None,
    rpe_scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Attention of q over k, v with logits qk_scale · q·k + rpe_scale · q·table[bucket(query, key)].

    q, k, v: [B, H, L, d] of one dtype, L = cls_tokens + grid height · grid width, class tokens first.
    table: [1 or H, d, buckets]. qk_scale defaults to d^-1/2; rpe_scale is 1 in SAR-JEPA and LoMaR, whose bias takes the
    unscaled query. Returns [B, H, L, d]. Raises ValueError for an unknown backend or shapes that do not fit.
    """
    length, dim = q.shape[-2:]
    if length != cls_tokens + grid[0] * grid[1]:
        raise ValueError(f"{length} tokens do not fit a {grid[0]}x{grid[1]} grid with {cls_tokens} class tokens")
    if table.shape[0] not in (1, q.shape[1]) or table.shape[1] != dim:
        raise ValueError(f"table {tuple(table.shape)} fits neither 1 nor {q.shape[1]} heads of size {dim}")
    name = resolve(backend, q.device.type)
    if name not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}: choose auto, {', '.join(BACKENDS)}")
    return BACKENDS[name].run(q, k, v, table, grid, cls_tokens, dim**-0.5 if qk_scale is None else qk_scale, rpe_scale)
