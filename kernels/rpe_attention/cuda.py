"""The hand-written kernels of short windows, called through ctypes; `building.py` compiles them.

CPU tensors run the same source in an emulation of a thread block, made for tests, slow.
"""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from functools import cache

import torch
from torch import Tensor

from kernels.rpe_attention import building

MAX_LENGTH = 64
HEAD_SIZES = (32, 64)
PATCH_BUCKETS = 49
"""Columns of the table besides that of class tokens: 7 x 7"""

Grid = tuple[int, int]
Thresholds = tuple[int, int, int]


class _Problem(ctypes.Structure):
    """`Problem` in csrc/problem.cuh."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("batch", "heads", "length", "dim", "height", "width", "cls_tokens")),
        *((name, ctypes.c_int) for name in ("buckets", "tables")),
        ("steps", ctypes.c_int * 3),
        *((name, ctypes.c_int) for name in ("blocks", "device")),
        *((name, ctypes.c_float) for name in ("qk_scale", "rpe_scale")),
    )


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, problem = ctypes.c_void_p, ctypes.POINTER(_Problem)
    signatures = {
        "rpe_window_shared_bytes": (ctypes.c_int, [ctypes.c_int, ctypes.c_int]),
        "rpe_window_resident": (ctypes.c_int, [*[ctypes.c_int] * 4, ctypes.POINTER(ctypes.c_int)]),
        "rpe_window_workspace_bytes": (ctypes.c_longlong, [problem]),
        "rpe_window_forward": (ctypes.c_int, [problem, *[pointer] * 5]),
        "rpe_window_backward": (ctypes.c_int, [problem, *[pointer] * 8]),
        "rpe_window_error": (ctypes.c_char_p, [ctypes.c_int]),
        "rpe_window_sources": (ctypes.c_char_p, []),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@cache
def library(device_type: str) -> ctypes.CDLL:
    """The kernels for "cuda" or, emulated, for "cpu": built ahead of time, else from the cache, else built now."""
    prebuilt = device_type == "cuda" and building.PREBUILT.exists()
    path = building.PREBUILT if prebuilt else building.build(device_type)
    try:
        kernels = _declare(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:
        raise RuntimeError(
            f"cannot load the attention kernels in {path}: {error}; delete the file to build it again"
        ) from error
    if kernels.rpe_window_sources().decode() != building.sources():
        raise RuntimeError(
            f"the attention kernels in {path} were built of another source; delete the file or build again"
        )
    return kernels


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
        found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{name} must be {dtype} {list(shape)} on {device}, not {found}")


def _problem(
    qkv: Tensor,
    table: Tensor,
    grid: Grid,
    cls_tokens: int,
    thresholds: Thresholds,
    qk_scale: float,
    rpe_scale: float,
) -> _Problem:
    """Everything about a call but its pointers. Raises ValueError naming the argument that is not allowed."""
    if qkv.device.type not in ("cuda", "cpu"):
        raise ValueError(f"qkv is on {qkv.device}: cuda, and cpu for tests, are allowed")
    if qkv.ndim != 5 or qkv.shape[2] != 3 or qkv.dtype != torch.bfloat16 or qkv.numel() == 0:
        raise ValueError(f"qkv must be torch.bfloat16 [B, L, 3, H, d], not {qkv.dtype} {list(qkv.shape)}")
    batch, length, _, heads, dim = qkv.shape
    if dim not in HEAD_SIZES:
        raise ValueError(f"qkv has heads of size {dim}: {' and '.join(map(str, HEAD_SIZES))} are allowed")
    height, width = grid
    if min(height, width) < 1 or cls_tokens < 0:
        raise ValueError(f"grid {height}x{width} with {cls_tokens} class tokens: at least 1x1 with 0 is allowed")
    if length != cls_tokens + height * width:
        raise ValueError(
            f"qkv has {length} tokens, which do not fit a {height}x{width} grid with {cls_tokens} class tokens"
        )
    if length > MAX_LENGTH:
        raise ValueError(f"qkv has {length} tokens: at most {MAX_LENGTH} are allowed")
    if not 0 < thresholds[0] < thresholds[1] < thresholds[2]:
        raise ValueError(f"thresholds {thresholds}: three distances that grow, such as (1, 2, 4), are allowed")
    buckets, tables = PATCH_BUCKETS + (cls_tokens > 0), heads if table.shape[:1] == (heads,) else 1
    _check("table", table, (tables, dim, buckets), torch.float32, qkv.device)
    device = qkv.device.index or 0
    sizes = batch, heads, length, dim, height, width, cls_tokens, buckets, tables
    return _Problem(*sizes, (ctypes.c_int * 3)(*thresholds), 0, device, qk_scale, rpe_scale)


@cache
def _resident(device_type: str, device: int, backward: bool, dim: int, length: int) -> int:
    """Thread blocks that a device holds at once."""
    kernels, count = library(device_type), ctypes.c_int()
    _raise_on(kernels, kernels.rpe_window_resident(backward, dim, length, device, count))
    return count.value


def _deal(problem: _Problem, device_type: str, backward: bool, blocks: int | None) -> None:
    """Set the number of thread blocks: as many as the device holds at once, or `blocks`, in whole sets of tables."""
    if blocks is None:
        resident = _resident(device_type, problem.device, backward, problem.dim, problem.length)
        rounds = problem.batch * problem.heads // problem.tables
        blocks = min(resident // problem.tables, rounds) * problem.tables
    elif blocks < 1:
        raise ValueError(f"blocks is {blocks}: at least 1 is allowed")
    problem.blocks = max(blocks // problem.tables, 1) * problem.tables


def _raise_on(kernels: ctypes.CDLL, status: int) -> None:
    if status != 0:
        reason = kernels.rpe_window_error(status).decode()
        raise RuntimeError(f"the attention kernels for windows failed: {reason} (status {status})")


def _plain(tensor: Tensor) -> Tensor:
    """Contiguous, and where 16 bytes can be loaded at once: a slice of a buffer may begin anywhere."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _stream(tensor: Tensor) -> int | None:
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else None


def _on(tensor: Tensor) -> torch.cuda.device | nullcontext[None]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def forward(
    qkv: Tensor,
    table: Tensor,
    grid: Grid,
    cls_tokens: int,
    thresholds: Thresholds,
    qk_scale: float,
    rpe_scale: float,
    *,
    blocks: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with logits qk_scale · q·k + rpe_scale · q·table[bucket(query, key)], fp32 sums, the table in bf16.

    qkv: bf16 [B, L, 3, H, d], L = cls_tokens + height · width <= 64, class tokens first, patches in raster order, d 32
    or 64. table: fp32 [1 or H, d, 49, with class tokens 50]. thresholds: the distances along an axis at which the
    indices 1, 2 and 3 begin; (1, 2, 4) for ratio 1.9. blocks: thread blocks, by default as many as run at once.

    Returns out bf16 [B, L, H, d] and the logarithm of each row's sum of exponentials, fp32 [B, H, L]. Raises ValueError
    for what is not allowed, RuntimeError when the kernels cannot be built or started.
    """
    problem = _problem(qkv, table, grid, cls_tokens, thresholds, qk_scale, rpe_scale)
    kernels = library(qkv.device.type)
    batch, length, _, heads, dim = qkv.shape
    with _on(qkv):
        _deal(problem, qkv.device.type, False, blocks)
        qkv, table = _plain(qkv), _plain(table)
        out = qkv.new_empty(batch, length, heads, dim)
        lse = table.new_empty(batch, heads, length)
        pointers = (t.data_ptr() for t in (qkv, table, out, lse))
        _raise_on(kernels, kernels.rpe_window_forward(problem, *pointers, _stream(qkv)))
    return out, lse


def backward(
    dout: Tensor,
    qkv: Tensor,
    table: Tensor,
    out: Tensor,
    lse: Tensor,
    grid: Grid,
    cls_tokens: int,
    thresholds: Thresholds,
    qk_scale: float,
    rpe_scale: float,
    *,
    blocks: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `forward`, the same bits in every run with one number of blocks (one kind of device).

    dout, out: bf16 [B, L, H, d]; lse as from `forward`. The values of out are not read: a window's probabilities are
    all at hand, from which the kernel takes rowsum(P · dP). Returns dqkv bf16 as qkv, contiguous, and dtable fp32 as
    table. Raises as `forward` does.
    """
    problem = _problem(qkv, table, grid, cls_tokens, thresholds, qk_scale, rpe_scale)
    batch, length, _, heads, dim = qkv.shape
    for name, tensor in (("dout", dout), ("out", out)):
        _check(name, tensor, (batch, length, heads, dim), torch.bfloat16, qkv.device)
    _check("lse", lse, (batch, heads, length), torch.float32, qkv.device)
    kernels = library(qkv.device.type)
    with _on(qkv):
        _deal(problem, qkv.device.type, True, blocks)
        dout, qkv, table, lse = map(_plain, (dout, qkv, table, lse))
        dqkv, dtable = torch.empty_like(qkv), torch.empty_like(table)
        size = kernels.rpe_window_workspace_bytes(problem) // table.element_size()
        tensors = dout, qkv, table, lse, dqkv, dtable, table.new_empty(size)
        pointers = (t.data_ptr() for t in tensors)
        _raise_on(kernels, kernels.rpe_window_backward(problem, *pointers, _stream(qkv)))
    return dqkv, dtable
