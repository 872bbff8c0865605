"""The CUDA kernels of short windows. Without a GPU their source runs in an emulation of a thread block.

Where there is a GPU and a CUDA compiler, what is promised of results holds for the GPU as well.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import record
from torch import Tensor

from foundation.config import Config
from foundation.training import run as running
from kernels.rpe_attention import BACKENDS, building, cuda, handwritten
from kernels.rpe_attention.buckets import num_buckets, piecewise_index, product_buckets
from kernels.rpe_attention.layout import Layout, Problem
from kernels.rpe_attention.op import run_fused

BOUND = 1e-2
"""Largest error relative to the largest number of a result; rounding to bf16 alone makes 2e-3 to 4e-3 of it"""
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() and shutil.which("nvcc") else ["cpu"]
FEW = settings(max_examples=30, deadline=None)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation is compiled with g++")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc on PATH")


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Everything is compiled once for this file, from the present source."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAR_FOUNDATION_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(building, "PREBUILT", Path("nowhere.so"))
        cuda.library.cache_clear()
        yield
    cuda.library.cache_clear()


class Call(NamedTuple):
    """Arguments of a forward pass, and the gradient of its output."""

    dout: Tensor
    qkv: Tensor
    table: Tensor
    grid: tuple[int, int] = (7, 7)
    cls_tokens: int = 1
    thresholds: tuple[int, int, int] = (1, 2, 4)
    qk_scale: float = 0.125
    rpe_scale: float = 1.0


class Results(NamedTuple):
    out: Tensor
    lse: Tensor
    dqkv: Tensor
    dtable: Tensor


def steps(ratio: float) -> tuple[int, int, int]:
    one, two, three = (next(d for d in range(99) if piecewise_index(d, ratio) >= level) for level in (1, 2, 3))
    return one, two, three


def call(
    grid: tuple[int, int] = (7, 7),
    cls_tokens: int = 1,
    heads: int = 2,
    dim: int = 32,
    batch: int = 1,
    per_head: bool = False,
    ratio: float = 1.9,
    scales: tuple[float, float] = (0.125, 1.0),
    spread: float = 0.2,
    seed: int = 0,
    device: str = "cpu",
) -> Call:
    draw = torch.Generator().manual_seed(seed)
    length = cls_tokens + grid[0] * grid[1]
    qkv = torch.randn(batch, length, 3, heads, dim, generator=draw).bfloat16()
    dout = torch.randn(batch, length, heads, dim, generator=draw).bfloat16()
    shape = heads if per_head else 1, dim, num_buckets(cls_tokens=cls_tokens)
    table = spread * torch.randn(shape, generator=draw)
    return Call(*(t.to(device) for t in (dout, qkv, table)), grid, cls_tokens, steps(ratio), *scales)


def ours(c: Call, blocks: int | None = None) -> Results:
    out, lse = cuda.forward(*c[1:], blocks=blocks)
    return Results(out, lse, *cuda.backward(*c[:3], out, lse, *c[3:], blocks=blocks))


def definition(c: Call, ratio: float = 1.9) -> Results:
    """In float64, of the bf16 numbers that the kernels take."""
    qkv, table = c.qkv.double().requires_grad_(), c.table.bfloat16().double().requires_grad_()
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    ids = product_buckets(c.grid, c.cls_tokens, ratio, c.qkv.device)
    bias = (q @ table).gather(-1, ids.expand(*q.shape[:2], *ids.shape))
    logits = c.qk_scale * (q @ k.mT) + c.rpe_scale * bias
    out = (logits.softmax(-1) @ v).transpose(1, 2)
    gradients = torch.autograd.grad(out, (qkv, table), c.dout.double())
    return Results(out.detach(), logits.logsumexp(-1).detach(), *gradients)


def assert_near(got: Results, want: Results, bound: float = BOUND) -> None:
    def near(name: str, a: Tensor, b: Tensor, bound: float = bound) -> None:
        error = (a.double() - b).abs().max().item()
        assert error <= bound * b.abs().max().item() + 1e-5, f"{name}: {error} of {b.abs().max()}"

    near("out", got.out, want.out)
    near("lse", got.lse, want.lse)
    for part, name in enumerate("qkv"):
        near(f"d{name}", got.dqkv[:, :, part], want.dqkv[:, :, part])
    near("dtable", got.dtable, want.dtable, 2 * bound)  # sums over few tokens cancel: 1.4e-2 was found at 6 x 1


def assert_same_bits(a: Results, b: Results) -> None:
    for name, one, other in zip(Results._fields, a, b, strict=True):
        assert torch.equal(one, other), name


@needs_compiler
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [32, 64])
@pytest.mark.parametrize(
    "shape",
    [
        {"grid": (7, 7)},
        {"grid": (8, 8), "cls_tokens": 0},
        {"grid": (1, 1)},
        {"grid": (1, 1), "cls_tokens": 0},
        {"grid": (1, 55), "per_head": True},
        {"grid": (56, 1), "cls_tokens": 0},
        {"grid": (5, 11), "cls_tokens": 3, "batch": 2},
        {"grid": (6, 9), "cls_tokens": 1, "heads": 1},
        {"grid": (9, 7), "cls_tokens": 1, "heads": 3, "per_head": True, "spread": 1.0},
    ],
    ids=str,
)
def test_output_and_gradients_are_those_of_the_definition(shape: dict, dim: int, device: str) -> None:
    c = call(**shape, dim=dim, device=device)
    assert_near(ours(c), definition(c))


@needs_compiler
@pytest.mark.parametrize("device", DEVICES)
@FEW
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)).filter(lambda g: g[0] * g[1] <= 61),
    cls_tokens=st.integers(0, 3),
    heads=st.integers(1, 3),
    dim=st.sampled_from([32, 64]),
    batch=st.integers(1, 3),
    per_head=st.booleans(),
    ratio=st.sampled_from([1.5, 1.75, 1.9]),
    scales=st.tuples(st.sampled_from([0.0, 0.125, 0.5]), st.sampled_from([-0.5, 0.0, 0.3, 1.0])),
    blocks=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 99),
)
def test_any_window_of_up_to_64_tokens_equals_the_definition(
    device: str,
    grid: tuple[int, int],
    cls_tokens: int,
    heads: int,
    dim: int,
    batch: int,
    per_head: bool,
    ratio: float,
    scales: tuple[float, float],
    blocks: int | None,
    seed: int,
) -> None:
    c = call(grid, cls_tokens, heads, dim, batch, per_head, ratio, scales, seed=seed, device=device)
    assert_near(ours(c, blocks), definition(c, ratio))


@needs_compiler
@pytest.mark.parametrize("device", DEVICES)
def test_the_logarithm_of_sums_keeps_fp32_precision_where_logits_are_large(device: str) -> None:
    c = call(spread=2.0, dim=64, device=device)
    want = definition(c)
    assert want.lse.max() > 30
    assert (ours(c).lse.double() - want.lse).abs().max() < 1e-4


@needs_compiler
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("dim", [32, 64])
@pytest.mark.parametrize("device", DEVICES)
def test_two_runs_agree_to_the_bit_in_whatever_order_threads_run(per_head: bool, dim: int, device: str) -> None:
    c = call(batch=3, dim=dim, per_head=per_head, device=device)
    first = ours(c, blocks=2)
    assert_same_bits(ours(c, blocks=2), first)
    cuda.library("cpu").rpe_emulate_order(1)
    try:
        assert_same_bits(ours(c, blocks=2), first)
    finally:
        cuda.library("cpu").rpe_emulate_order(0)


@needs_compiler
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_a_block_works_off_more_problems_than_one(per_head: bool, device: str) -> None:
    c = call(batch=4, heads=2, per_head=per_head, device=device)
    alone, dealt, spare = (ours(c, blocks) for blocks in (1, 3, 50))
    for other in (dealt, spare):
        assert_same_bits(other._replace(dtable=alone.dtable), alone)
        assert torch.allclose(other.dtable, alone.dtable, rtol=0, atol=1e-4)
    assert_near(alone, definition(c))


@needs_compiler
@pytest.mark.parametrize("device", DEVICES)
def test_layouts_in_memory_make_no_difference_and_the_values_of_out_are_not_read(device: str) -> None:
    c = call(batch=2, device=device)
    want = ours(c)
    heads_first = c.qkv.permute(0, 3, 2, 1, 4).contiguous().permute(0, 3, 2, 1, 4)
    buffer = c.qkv.new_empty(c.qkv.numel() + 1)
    shifted = buffer[1:].view(c.qkv.shape).copy_(c.qkv)
    assert shifted.data_ptr() % 16
    for qkv in (heads_first, shifted):
        assert_same_bits(ours(c._replace(qkv=qkv, dout=c.dout.mT.contiguous().mT)), want)
    unknown = torch.full_like(want.out, torch.nan)
    got = cuda.backward(*c[:3], unknown, want.lse, *c[3:])
    assert_same_bits(Results(want.out, want.lse, *got), want)


@needs_compiler
@FEW
@given(halves=st.sampled_from([1, 2]), lies_nk=st.booleans(), seed=st.integers(0, 99))
def test_the_emulated_matrix_instructions_are_a_matrix_product(halves: int, lies_nk: bool, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(s, generator=draw).bfloat16().float() for s in ((16, 8 * halves), (8 * halves, 8)))
    c = torch.empty(16, 8)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (a, b, c)]
    assert cuda.library("cpu").rpe_emulate_product(*pointers, halves, int(lies_nk)) == 0
    assert torch.allclose(c, a @ b, rtol=0, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (0, None),
        (1, "nan"),  # a barrier is missing
        (2, "nan"),  # a copy is read before its wait
        (3, "threads wait for each other at different places"),
        (4, "lanes of a warp met in different operations"),
        (5, "a write beyond the end of shared memory"),
        (6, "threads wait for each other at different places"),
        (7, "a block ends with copies under way"),
    ],
)
def test_the_emulation_finds_what_would_go_wrong_on_a_gpu(fault: int, found: str | None) -> None:
    kernels, result = cuda.library("cpu"), ctypes.c_float(0)
    status = kernels.rpe_emulate_fault(fault, ctypes.byref(result))
    if found is None or found == "nan":
        assert status == 0
        assert (result.value == 63.0) if found is None else (result.value != result.value)
    else:
        assert kernels.rpe_window_error(status).decode() == found


@needs_compiler
@pytest.mark.parametrize(
    ("file", "barrier"), [("forward.cuh", 0), ("backward.cuh", 0), ("backward.cuh", 1), ("backward.cuh", 2)]
)
def test_a_barrier_taken_out_of_a_kernel_does_not_go_unnoticed(
    file: str, barrier: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "SOURCES", Path(shutil.copytree(building.SOURCES, tmp_path / "csrc")))
    parts = (tmp_path / "csrc" / file).read_text().split("sync_block();")
    parts[barrier : barrier + 2] = [parts[barrier] + parts[barrier + 1]]
    (tmp_path / "csrc" / file).write_text("sync_block();".join(parts))
    damaged = cuda._declare(ctypes.CDLL(str(building.build("cpu"))))
    monkeypatch.setattr(cuda, "library", lambda _: damaged)
    c = call(batch=3)
    with pytest.raises(AssertionError):
        assert_near(ours(c, blocks=2), definition(c))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": torch.zeros(1, 50, 3, 2, 32)}, r"qkv must be torch.bfloat16 \[B, L, 3, H, d\], not torch.float32"),
        ({"qkv": torch.zeros(1, 50, 2, 2, 32).bfloat16()}, r"not torch.bfloat16 \[1, 50, 2, 2, 32\]"),
        ({"qkv": torch.zeros(0, 50, 3, 2, 32).bfloat16()}, r"not torch.bfloat16 \[0, 50, 3, 2, 32\]"),
        ({"qkv": torch.zeros(1, 50, 3, 2, 48).bfloat16()}, "qkv has heads of size 48: 32 and 64 are allowed"),
        ({"qkv": torch.zeros(1, 50, 3, 2, 32, device="meta").bfloat16()}, "qkv is on meta: cuda, and cpu for tests"),
        ({"qkv": torch.zeros(1, 65, 3, 2, 32).bfloat16(), "grid": (8, 8)}, "65 tokens: at most 64 are allowed"),
        ({"grid": (7, 8)}, "qkv has 50 tokens, which do not fit a 7x8 grid with 1 class tokens"),
        ({"grid": (0, 7)}, "grid 0x7 with 1 class tokens: at least 1x1 with 0 is allowed"),
        ({"cls_tokens": -1}, "grid 7x7 with -1 class tokens: at least 1x1 with 0 is allowed"),
        ({"thresholds": (1, 4, 4)}, r"thresholds \(1, 4, 4\): three distances that grow, such as \(1, 2, 4\)"),
        ({"table": torch.zeros(1, 32, 49)}, r"table must be torch.float32 \[1, 32, 50\] on cpu, not .* \[1, 32, 49\]"),
        ({"table": torch.zeros(3, 32, 50)}, r"table must be torch.float32 \[1, 32, 50\] on cpu, not .* \[3, 32, 50\]"),
        ({"table": torch.zeros(2, 32, 49)}, r"table must be torch.float32 \[2, 32, 50\] on cpu, not .* \[2, 32, 49\]"),
        ({"table": torch.zeros(1, 32, 50).bfloat16()}, "table must be torch.float32 .*, not torch.bfloat16"),
    ],
)
def test_arguments_that_are_not_allowed_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cuda.forward(*call()._replace(**changes)[1:])


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("dout", torch.zeros(1, 50, 2, 64).bfloat16()),
        ("out", torch.zeros(1, 50, 2, 32)),
        ("lse", torch.zeros(1, 50, 2)),
    ],
)
def test_tensors_of_the_backward_pass_that_do_not_fit_are_named(name: str, wrong: Tensor) -> None:
    c = call()
    given = {"dout": c.dout, "out": torch.zeros_like(c.dout), "lse": torch.zeros(1, 2, 50), name: wrong}
    with pytest.raises(ValueError, match=f"{name} must be"):
        cuda.backward(given["dout"], c.qkv, c.table, given["out"], given["lse"], *c[3:])


@needs_compiler
def test_the_number_of_blocks_is_checked_and_what_kernels_refuse_is_an_error() -> None:
    with pytest.raises(ValueError, match="blocks is 0: at least 1 is allowed"):
        cuda.forward(*call()[1:], blocks=0)
    kernels = cuda.library("cpu")
    with pytest.raises(RuntimeError, match=r"failed: the kernels do not take this problem \(status -1\)"):
        cuda._raise_on(kernels, kernels.rpe_window_forward(cuda._Problem(), *[None] * 5))


def test_behind_the_operator_it_is_what_cuda_gives() -> None:
    c = call()
    qkv, table = c.qkv.clone().requires_grad_(), c.table.to(torch.bfloat16).requires_grad_()
    out = run_fused(qkv, table, Layout(c.grid), c.qk_scale, c.rpe_scale, "cuda")
    gradients = torch.autograd.grad(out, (qkv, table), c.dout)
    want = ours(c._replace(table=table.detach().float()))
    assert torch.equal(out, want.out)
    assert torch.equal(gradients[0], want.dqkv)
    assert gradients[1].dtype == torch.bfloat16
    assert torch.equal(gradients[1], want.dtable.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cpu"}, "it runs on cuda, not cpu"),
        ({"dtype": torch.float32}, "dtype torch.float32: bfloat16 is allowed"),
        ({"bias": "plain"}, "it takes a contextual table"),
        ({"head_dim": 80}, "head size 80: 32 and 64 are allowed"),
        ({"layout": Layout((8, 8))}, "65 tokens: at most 64 are allowed"),
        ({"layout": Layout((7, 7), ratio=2.0)}, "method product with ratio 2.0: product with 7 x 7 buckets is allowed"),
        ({"layout": Layout((7, 7), method="cross")}, "method cross with ratio 1.9: product"),
    ],
)
def test_it_says_which_calls_it_does_not_take(changes: dict[str, object], reason: str) -> None:
    problem = Problem("cuda", torch.bfloat16, 12, 64, Layout((7, 7)), trains=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handwritten, "BUILT", True)
        assert handwritten.cuda_refuses(problem) == ""
        assert handwritten.cuda_refuses(problem._replace(**changes)).startswith(reason)  # type: ignore[arg-type]
        patch.setattr(handwritten, "BUILT", False)
        assert "no nvcc: set CUDA_HOME, python -m kernels.rpe_attention.building build" in handwritten.cuda_refuses(
            problem
        )


@needs_compiler
@pytest.mark.slow
def test_twenty_updates_in_bf16_have_the_losses_of_the_definition(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel takes bf16 only: its losses stay as near as two roundings of the same numbers do."""
    monkeypatch.setitem(BACKENDS, "cuda", BACKENDS["cuda"]._replace(refuses=lambda problem: ""))
    monkeypatch.setattr(running, "publish", lambda *_: None)  # pictures take longer than the updates
    short = ("objective.windows=1", "train.global_batch=2", "train.samples=40", "train.log_every=2", "data.lanes=2")
    # Heads of 32; the monitor would show whole images, which are longer than the kernel takes.
    sizes = ("model.decoder.width=64", "train.precision=bf16", "monitor.images=0")
    losses = []
    for attention in ("reference", "cuda"):
        run = running.train(tiny_config(*short, *sizes, f"model.attention={attention}", f"name={attention}"))
        losses.append([row["loss"] for row in record(run)])
    assert len(losses[0]) == 20
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert losses[1] != losses[0]


@needs_compiler
def test_an_empty_batch_has_an_empty_output_and_no_gradient() -> None:
    c = call()
    qkv, table = c.qkv[:0].requires_grad_(), c.table.requires_grad_()
    out = run_fused(qkv, table, Layout(c.grid), c.qk_scale, c.rpe_scale, "cuda")
    d_qkv, d_table = torch.autograd.grad(out.sum(), (qkv, table))
    assert (len(out), len(d_qkv)) == (0, 0)
    assert not d_table.any()
