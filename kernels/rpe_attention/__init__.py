"""Attention with a relative-position bias (iRPE, on keys): one call, several backends.

A backend is a function of (q, k, v, table, layout, qk_scale, rpe_scale), a function that says why it does not take a
call, and one row of `BACKENDS`. Fused ones (`op.py`) read the packed projection [B, L, 3, H, d] and write [B, L, H, d].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.rpe_attention.flex import flex, flex_refuses
from kernels.rpe_attention.fused import HALF_DTYPES, triton_refuses
from kernels.rpe_attention.handwritten import cuda_refuses
from kernels.rpe_attention.layout import METHODS, Layout, Problem, bias_kind, shared_memory
from kernels.rpe_attention.libraries import flash, flash_refuses, xformers, xformers_refuses
from kernels.rpe_attention.op import FUSED, pack_and_run, run_fused
from kernels.rpe_attention.reference import reference
from kernels.rpe_attention.sdpa import dense, sdpa, sdpa_refuses


def _never(problem: Problem) -> str:
    return ""


class Backend(NamedTuple):
    """A way to compute the operator."""

    run: Callable[..., Tensor]
    description: str
    refuses: Callable[[Problem], str] = _never
    """Why it does not take a call; '' when it does"""

    @property
    def unavailable(self) -> str:
        """Why it cannot run on this machine; '' when it takes any of the calls that models make in training."""
        reasons = [self.refuses(problem) for problem in trials("cuda" if torch.cuda.is_available() else "cpu")]
        return "" if "" in reasons else reasons[0]


def trials(device: str, heads: int = 12, head_dim: int = 64, grid: tuple[int, int] = (7, 7)) -> list[Problem]:
    """Calls of training in windows on a type of device, in bf16 and fp32, with a table and without."""
    first = Problem(device, torch.bfloat16, heads, head_dim, Layout(grid), trains=True, shared=shared_memory(device))
    return [first._replace(bias=bias, dtype=d) for bias in ("contextual", "none") for d in (first.dtype, torch.float32)]


BACKENDS = {
    "reference": Backend(reference, "the definition, every map materialised, any dtype"),
    "sdpa": Backend(sdpa, "PyTorch scaled_dot_product_attention, dense bias made of matrix products", sdpa_refuses),
    "dense": Backend(dense, "batched matrix products throughout; the fastest on a CPU"),
    "xformers": Backend(
        xformers, "memory_efficient_attention with the same dense bias, or without one", xformers_refuses
    ),
    "flash": Backend(flash, "FlashAttention 2 or 4, for models without relative positions", flash_refuses),
    "flex": Backend(flex, "PyTorch FlexAttention; products of query and table are looked up inside", flex_refuses),
    "triton": Backend(
        partial(pack_and_run, backend="triton"),
        "fused kernels in Triton, no map, table gradient without atomics",
        triton_refuses,
    ),
    "cuda": Backend(
        partial(pack_and_run, backend="cuda"),
        "fused CUDA kernel of short windows, bf16, table gradient without atomics",
        cuda_refuses,
    ),
}


_SHORT = 256
"""Tokens up to which `dense` is the faster one on a CPU."""


def choose(backend: str, problem: Problem) -> str:
    """The backend that `auto` stands for in a call; any other name is itself.

    cuda joins when a run on a GPU has shown it right and faster than triton.
    """
    if backend != "auto":
        return backend
    if problem.device == "cpu":  # the table at every pair costs more than a gather of them where there are many
        return "dense" if problem.layout.length <= _SHORT else "reference"
    first = "flash" if problem.bias == "none" else "triton"
    return first if problem.dtype in HALF_DTYPES and not BACKENDS[first].refuses(problem) else "sdpa"


def rpe_attention_packed(
    qkv: Tensor,
    table: Tensor | None,
    grid: tuple[int, int],
    cls_tokens: int = 1,
    qk_scale: float | None = None,
    rpe_scale: float = 1.0,
    method: str = "product",
    ratio: float = 1.9,
    backend: str = "auto",
) -> Tensor:
    """`rpe_attention` of a packed projection: qkv [B, L, 3, H, d] → [B, L, H, d], without copies in fused backends."""
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must be [B, L, 3, H, d], not {tuple(qkv.shape)}")
    layout, (heads, dim) = Layout(_constant(grid), cls_tokens, method, ratio), qkv.shape[3:]
    name = _check(qkv, heads, dim, qkv.shape[1], table, layout, backend)
    scale = dim**-0.5 if qk_scale is None else qk_scale
    if name in FUSED and table is not None:
        return run_fused(qkv, table, layout, scale, rpe_scale, name)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return BACKENDS[name].run(q, k, v, table, layout, scale, rpe_scale).transpose(1, 2)


def rpe_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    grid: tuple[int, int],
    cls_tokens: int = 1,
    qk_scale: float | None = None,
    rpe_scale: float = 1.0,
    method: str = "product",
    ratio: float = 1.9,
    backend: str = "auto",
) -> Tensor:
    """Attention of q over k, v with logits qk_scale · q·k + rpe_scale · q·table[column(query, key)].

    q, k, v: [B, H, L, d] of one dtype, L = cls_tokens + grid height · grid width, class tokens first, patches in raster
    order. table: [1 or H, d, columns] (contextual), [1 or H, columns] (plain: the bias is the number itself) or None
    (no bias); columns = `Layout.columns`. qk_scale defaults to d^-1/2; rpe_scale is 1 in SAR-JEPA and LoMaR, whose bias
    takes the unscaled query. method: product, cross, euclidean or quantised (see `buckets`), of piecewise indices with
    alpha = ratio. Returns [B, H, L, d] in the dtype of q.

    Raises ValueError for an unknown backend or method, for shapes, dtypes and devices that do not fit, and for a call
    that the named backend does not take, with the reason.
    """
    if not q.shape == k.shape == v.shape or q.ndim != 4:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(f"q, k, v must have one shape [B, H, L, d], not {shapes}")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        raise ValueError("q, k, v must have one dtype and one device")
    layout, (heads, length, dim) = Layout(_constant(grid), cls_tokens, method, ratio), q.shape[1:]
    name = _check(q, heads, dim, length, table, layout, backend)
    scale = dim**-0.5 if qk_scale is None else qk_scale
    return BACKENDS[name].run(q, k, v, table, layout, scale, rpe_scale)


def _constant(grid: tuple[int, int]) -> tuple[int, int]:
    """The grid with numbers that a compiler keeps as constants; its int() may be anything, a length is not."""
    return len(range(grid[0])), len(range(grid[1]))


def _check(q: Tensor, heads: int, dim: int, length: int, table: Tensor | None, layout: Layout, backend: str) -> str:
    """The name of the backend that takes the call. Raises ValueError for what does not fit."""
    (height, width), cls_tokens = layout.grid, layout.cls_tokens
    if layout.method not in METHODS:
        raise ValueError(f"unknown method {layout.method!r}: choose {', '.join(METHODS)}")
    if min(height, width) < 1 or cls_tokens < 0:
        raise ValueError(f"grid {height}x{width} with {cls_tokens} class tokens: at least 1x1 with 0 is allowed")
    if length != layout.length:
        raise ValueError(f"{length} tokens do not fit a {height}x{width} grid with {cls_tokens} class tokens")
    if not q.is_floating_point():
        raise ValueError(f"q, k, v must be floating point, not {q.dtype}")
    if table is not None:
        shape, middle = tuple(table.shape), (dim,) if table.ndim == 3 else ()
        if table.ndim not in (2, 3) or shape[0] not in (1, heads) or shape[1:] != (*middle, layout.columns):
            raise ValueError(
                f"table {shape} must be [1 or {heads}, {dim}, {layout.columns}] or [1 or {heads}, {layout.columns}]"
            )
        if table.device != q.device:
            raise ValueError(f"table is on {table.device}, q, k, v on {q.device}: one device is allowed")
    trains = torch.is_grad_enabled() and (q.requires_grad or (table is not None and table.requires_grad))
    shared = shared_memory(q.device.type)
    problem = Problem(q.device.type, q.dtype, heads, dim, layout, bias_kind(table), trains, shared)
    name = choose(backend, problem)
    if name not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}: choose auto, {', '.join(BACKENDS)}")
    if reason := BACKENDS[name].refuses(problem):
        raise ValueError(f"attention backend {name} does not take this call: {reason}")
    return name
