"""Launches of the Triton kernels in `windows.py` and `tiles.py`: blocks of a layout, programs that share problems."""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.rpe_attention.buckets import piecewise_index
from kernels.rpe_attention.layout import Layout, Problem

INSTALLED = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MAX_HEAD = 128
MAX_CLASS = 64
MAX_HALF = 7
"""Buckets per direction of an axis; T has 16 x 16 columns then."""
_ROOM = {(False, False): 88, (True, False): 132, (False, True): 160, (True, True): 248}
"""KiB of shared memory by (heads above 64, more than 7 x 7 buckets)."""
_MAX_Z = 65535
"""Programs along the third axis of a launch."""
HALF_DTYPES = (torch.float16, torch.bfloat16)


def options(kernel: Any, dim: int, dtype: torch.dtype, major: int = 9) -> dict[str, int]:
    """Warps and stages of a kernel by registers and shared memory (`kernels/ahead.py`); they were never timed.

    major: of the compute capability. Windows run without stages, so that more of them share a multiprocessor and hide
    each other's loads.
    """
    window = kernel.__module__.endswith("windows")
    small = kernel.__name__ == "forward_kernel" or (window and major >= 9)
    warps = 4 if small and dim <= 64 and dtype in HALF_DTYPES else 8
    return {"num_warps": warps, "num_stages": 1 if window or major >= 10 else 2}


def resident(kernel: Any, dim: int, major: int = 9) -> int:
    """Programs that a multiprocessor holds at once, by registers and shared memory; of images enough to even out."""
    if not kernel.__module__.endswith("windows"):
        return 8
    if dim > 64:
        return 1
    forward = kernel.__name__ == "forward_kernel"
    return {8: (2, 1), 9: (4, 2)}.get(major, (3, 3))[0 if forward else 1]


def room(head_dim: int, layout: Layout) -> int:
    """Bytes of shared memory of the hungriest kernel on any architecture, in half precision (by `kernels/ahead.py`)."""
    return 1024 * _ROOM[head_dim > 64, int(2 * layout.ratio) > 3]


def triton_refuses(problem: Problem) -> str:
    """Why the Triton kernels do not take a call; '' when they do."""
    layout = problem.layout
    if not INSTALLED:
        return "triton is not installed: pip install 'sar-foundation[gpu]'"
    if problem.device == "cpu" and not INTERPRETED:
        return "it runs on cuda; TRITON_INTERPRET=1 lets it run on a cpu, slowly"
    if problem.device not in ("cuda", "cpu"):
        return f"it runs on cuda, not {problem.device}"
    if problem.bias == "none":
        return "there is no table: choose flash or sdpa"
    if problem.dtype not in (*HALF_DTYPES, torch.float32):
        return f"dtype {problem.dtype}: float16, bfloat16 and float32 are allowed"
    if problem.device == "cuda" and problem.dtype == torch.float32:
        return "dtype torch.float32 spills on a GPU: float16 and bfloat16 are allowed, or choose sdpa"
    if layout.cls_tokens > MAX_CLASS:
        return f"{layout.cls_tokens} class tokens: at most {MAX_CLASS} are allowed"
    if problem.head_dim > MAX_HEAD:
        return f"head size {problem.head_dim}: at most {MAX_HEAD} is allowed"
    if layout.method != "product" or int(2 * layout.ratio) > MAX_HALF:
        return f"method {layout.method} with ratio {layout.ratio}: product with a ratio below 4 is allowed"
    if 0 < problem.shared < (needed := room(problem.head_dim, layout)):
        return f"it needs {needed} bytes of shared memory in a block, this GPU has {problem.shared}"
    return ""


class Blocks(NamedTuple):
    """The compile-time numbers of the kernels for one layout; see `blocks.py`."""

    HALF: int
    STEPS: int
    S: int
    BX: int
    """blocks in a row of blocks"""
    BLOCKS: int
    LAST: int
    FIRST: int
    """class tokens stand in block LAST, from slot FIRST on"""


def _power(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


@lru_cache(maxsize=256)
def blocks(layout: Layout) -> Blocks:
    """Blocks of 8 x 8 patches over the grid; one more for class tokens that find no free rows below the image."""
    (height, width), half = layout.grid, int(2 * layout.ratio)
    begins = [next(d for d in range(10**6) if piecewise_index(d, layout.ratio) > b) for b in range(half)]
    steps = sum(begin << 8 * b for b, begin in enumerate(begins))
    lines, row = -(-height // 8), -(-width // 8)
    free = 8 * (8 * lines - height)
    apart = layout.cls_tokens > free
    last = lines * row if apart else (lines - 1) * row
    side = max(8, _power(2 * half + 2))
    return Blocks(half, steps, side, row, lines * row + apart, last, 0 if apart else 64 - free)


def constants(kernel: Any, qkv: Tensor, table: Tensor, layout: Layout, upcast: bool = False) -> dict[str, Any]:
    """What a kernel is compiled for. Strides are among it, so that rows load 16 bytes at a time where they can."""
    heads, dim = qkv.shape[3:]
    stride_b, stride_l, stride_3, stride_h, _ = qkv.stride()
    everything = {
        "stride_b": stride_b,
        "stride_l": stride_l,
        "stride_3": stride_3,
        "stride_h": stride_h,
        "table_h": table.stride(0) if table.shape[0] > 1 else 0,
        "H": heads,
        "L": layout.length,
        "D": dim,
        "GH": layout.grid[0],
        "GW": layout.grid[1],
        "CLS": layout.cls_tokens,
        "PLAIN": table.ndim == 2,
        "DP": max(16, _power(dim)),
        "UPCAST": upcast,
        **blocks(layout)._asdict(),
    }
    return {name: value for name, value in everything.items() if name in kernel.arg_names}


def _arguments(
    kernel: Any, qkv: Tensor, table: Tensor, layout: Layout, qk_scale: float, rpe_scale: float
) -> dict[str, Any]:
    """What a kernel takes besides its tensors."""
    values = constants(kernel, qkv, table, layout, INTERPRETED and qkv.dtype == torch.bfloat16)
    return {"batch": qkv.shape[0], "qk_scale": qk_scale, "rpe_scale": rpe_scale, **values}


def _major(qkv: Tensor) -> int:
    return torch.cuda.get_device_capability(qkv.device)[0] if qkv.is_cuda else 9


def _sharers(kernel: Any, qkv: Tensor, others: int) -> int:
    """Programs that share the windows of a batch: no more than run at once, so that none waits for a turn."""
    if not qkv.is_cuda:
        return max(1, min(qkv.shape[0], 8 // others))
    count = torch.cuda.get_device_properties(qkv.device).multi_processor_count
    return max(1, min(qkv.shape[0], count * resident(kernel, qkv.shape[-1], _major(qkv)) // others))


def _options(kernel: Any, qkv: Tensor) -> dict[str, int]:
    return options(kernel, qkv.shape[-1], qkv.dtype, _major(qkv))


def _last_dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def forward(qkv: Tensor, table: Tensor, layout: Layout, qk_scale: float, rpe_scale: float) -> tuple[Tensor, Tensor]:
    """qkv [B, L, 3, H, d], table [1 or H, d, columns] or [1 or H, columns] → out [B, L, H, d], lse fp32 [B, H, L]."""
    from kernels.rpe_attention import tiles, windows

    qkv, table = _last_dense(qkv), table.contiguous()
    batch, length, _, heads, dim = qkv.shape
    out = qkv.new_empty(batch, length, heads, dim)
    lse = qkv.new_empty(batch, heads, length, dtype=torch.float32)
    window = blocks(layout).BLOCKS == 1
    kernel = (windows if window else tiles).forward_kernel
    a = _arguments(kernel, qkv, table, layout, qk_scale, rpe_scale)
    parts = blocks(layout).BLOCKS
    grid = parts, heads, _sharers(kernel, qkv, parts * heads)
    with _on(qkv):
        kernel[grid](qkv, table, out, lse, **a, **_options(kernel, qkv))
    return out, lse


def backward(
    grad: Tensor,
    qkv: Tensor,
    table: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: Layout,
    qk_scale: float,
    rpe_scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of qkv, contiguous in its dtype, and of the table, fp32 in its shape; the same bits in every run."""
    qkv, table, grad, out = _last_dense(qkv), table.contiguous(), grad.contiguous(), out.contiguous()
    d_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    with _on(qkv):
        if blocks(layout).BLOCKS == 1:
            partials = _window_backward(grad, qkv, table, d_qkv, layout, qk_scale, rpe_scale)
        else:
            partials = _tile_backward(grad, qkv, table, out, lse, d_qkv, layout, qk_scale, rpe_scale)
    return d_qkv, _table_gradient(partials.sum((0, 1)), table, int(2 * layout.ratio), layout.cls_tokens)


def _window_backward(
    grad: Tensor, qkv: Tensor, table: Tensor, d_qkv: Tensor, layout: Layout, qk_scale: float, rpe_scale: float
) -> Tensor:
    from kernels.rpe_attention.windows import backward_kernel

    heads = qkv.shape[3]
    a = _arguments(backward_kernel, qkv, table, layout, qk_scale, rpe_scale)
    shared = _sharers(backward_kernel, qkv, heads)
    partials = torch.empty(shared, 1, heads, a["DP"], a["S"], a["S"], dtype=torch.float32, device=qkv.device)
    backward_kernel[(1, heads, shared)](grad, qkv, table, d_qkv, partials, **a, **_options(backward_kernel, qkv))
    return partials


def _tile_backward(
    grad: Tensor,
    qkv: Tensor,
    table: Tensor,
    out: Tensor,
    lse: Tensor,
    d_qkv: Tensor,
    layout: Layout,
    qk_scale: float,
    rpe_scale: float,
) -> Tensor:
    from kernels.rpe_attention.tiles import key_backward_kernel, query_backward_kernel

    batch, heads = qkv.shape[0], qkv.shape[3]
    a = _arguments(query_backward_kernel, qkv, table, layout, qk_scale, rpe_scale)
    shared = _sharers(query_backward_kernel, qkv, a["BLOCKS"] * heads)
    partials = torch.zeros(shared, a["BLOCKS"], heads, a["DP"], a["S"], a["S"], dtype=torch.float32, device=qkv.device)
    delta = torch.empty_like(lse)
    query_backward_kernel[(a["BLOCKS"], heads, shared)](
        grad, qkv, table, out, lse, delta, d_qkv, partials, **a, **_options(query_backward_kernel, qkv)
    )
    key_backward_kernel[(a["BLOCKS"], heads, min(batch, _MAX_Z))](
        grad, qkv, table, lse, delta, d_qkv, **a, **_options(key_backward_kernel, qkv)
    )
    return partials


def _table_gradient(sums: Tensor, table: Tensor, half: int, cls_tokens: int) -> Tensor:
    """[H, DP, S, S], buckets at (a, b), class tokens all along row `side` → the shape of the table."""
    side = 2 * half + 1
    columns = sums[:, :, :side, :side].flatten(2)
    if cls_tokens:
        columns = torch.cat((columns, sums[:, :, side, :side].sum(2, keepdim=True)), 2)
    if table.shape[0] == 1:
        columns = columns.sum(0, keepdim=True)
    return (columns[:, 0] if table.ndim == 2 else columns[:, : table.shape[1]]).contiguous()


def _on(tensor: Tensor) -> Any:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
