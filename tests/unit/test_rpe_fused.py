"""The fused kernels give the numbers of the definition: on a GPU as they are, elsewhere in Triton's interpreter."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.rpe_attention import BACKENDS, choose, rpe_attention, rpe_attention_packed
from kernels.rpe_attention.fused import blocks
from kernels.rpe_attention.layout import Layout, Problem
from kernels.rpe_attention.op import OPERATOR

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float32, torch.float16, torch.bfloat16]
EXACT = DTYPES[0]
"""What shows errors best: a GPU refuses float32."""
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
FEW = settings(max_examples=6, deadline=None)


class Call(NamedTuple):
    """A packed call on the device, whose numbers the dtype holds exactly."""

    qkv: Tensor
    table: Tensor
    weight: Tensor
    layout: Layout


def call(
    grid: tuple[int, int] = (7, 7),
    cls_tokens: int = 1,
    batch: int = 2,
    heads: int = 2,
    dim: int = 32,
    dtype: torch.dtype = EXACT,
    per_head: bool = False,
    plain: bool = False,
    ratio: float = 1.9,
    seed: int = 0,
) -> Call:
    draw = torch.Generator().manual_seed(seed)
    layout = Layout(grid, cls_tokens, ratio=ratio)
    qkv = torch.randn(batch, layout.length, 3, heads, dim, generator=draw)
    table = torch.randn(heads if per_head else 1, *([] if plain else [dim]), layout.columns, generator=draw) / dim**0.5
    weight = torch.randn(batch, layout.length, heads, dim, generator=draw)
    return Call(qkv.to(DEVICE, dtype), table.to(DEVICE), weight.to(DEVICE, dtype), layout)


def results(c: Call, backend: str, dtype: torch.dtype | None = None, qk_scale: float | None = None) -> list[Tensor]:
    """Output, gradient of the projection and of the table."""
    qkv, table = (t.detach().to(dtype or t.dtype).requires_grad_() for t in (c.qkv, c.table))
    options = {"method": c.layout.method, "ratio": c.layout.ratio, "backend": backend}
    out = rpe_attention_packed(qkv, table, c.layout.grid, c.layout.cls_tokens, qk_scale, 0.8, **options)
    return [out.detach(), *torch.autograd.grad(out, (qkv, table), c.weight.to(out.dtype))]


def error(found: Tensor, exact: Tensor) -> float:
    """Largest difference relative to the largest number."""
    return ((found.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()


def agrees(c: Call, backend: str = "triton", qk_scale: float | None = None, tolerance: float = 0.0) -> None:
    tolerance = tolerance or TOLERANCE[c.qkv.dtype]
    exact = results(c, "reference", torch.float64, qk_scale)
    for name, ours, definition in zip(("out", "qkv", "table"), results(c, backend, None, qk_scale), exact, strict=True):
        assert ours.shape == definition.shape
        assert error(ours, definition) < tolerance, f"{name} of {c.layout}"


@FEW
@given(
    grid=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    cls_tokens=st.integers(0, 3),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    dim=st.sampled_from([1, 20, 32, 64]),
    dtype=st.sampled_from(DTYPES),
    per_head=st.booleans(),
    plain=st.booleans(),
    seed=st.integers(0, 99),
)
def test_windows_agree_with_the_definition(
    grid: tuple[int, int],
    cls_tokens: int,
    batch: int,
    heads: int,
    dim: int,
    dtype: torch.dtype,
    per_head: bool,
    plain: bool,
    seed: int,
) -> None:
    agrees(call(grid, cls_tokens, batch, heads, dim, dtype, per_head, plain, seed=seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [32, 64, 80, 88, 104, 128])
def test_every_head_size_of_the_family(dim: int, dtype: torch.dtype) -> None:
    agrees(call((7, 7), 1, 2, 1, dim, dtype))
    agrees(call((9, 8), 1, 1, 1, dim, dtype))


@pytest.mark.parametrize(
    ("grid", "cls_tokens", "ratio"),
    [
        ((1, 2), 0, 1.9),
        ((1, 1), 1, 1.9),
        ((1, 49), 1, 1.9),
        ((9, 1), 1, 1.9),
        ((8, 8), 1, 1.9),
        ((14, 14), 1, 1.9),
        ((5, 27), 9, 1.9),
        ((8, 16), 33, 1.9),
        ((7, 7), 1, 3.0),
        ((9, 17), 2, 3.9),
        ((17, 20), 0, 0.9),
        ((9, 9), 2, 0.4),
    ],
    ids=str,
)
def test_lengths_grids_class_tokens_and_ratios(grid: tuple[int, int], cls_tokens: int, ratio: float) -> None:
    agrees(call(grid, cls_tokens, 1, 1, 32, ratio=ratio))


def test_blocks_far_apart_share_one_bucket() -> None:
    """A grid of 3 x 3 blocks has pairs of blocks near, far on one axis and far on both."""
    agrees(call((17, 18), 2, 1, 1, 32))


@pytest.mark.parametrize("grid", [(7, 7), (9, 9)], ids=str)
def test_extreme_logits_stay_finite_and_right(grid: tuple[int, int]) -> None:
    agrees(call(grid, 1, 1, 1), qk_scale=40.0, tolerance=10 * TOLERANCE[EXACT])  # logits of several hundred


@pytest.mark.parametrize("grid", [(7, 7), (9, 9)], ids=str)
def test_inputs_may_be_strided_expanded_and_permuted(grid: tuple[int, int]) -> None:
    c = call(grid, heads=1)
    strided = torch.stack((c.qkv, c.qkv * 2), -1)[..., 0]  # last dimension of stride 2
    permuted = c.qkv.permute(3, 2, 1, 0, 4).contiguous().permute(3, 2, 1, 0, 4)
    table = c.table.expand(1, -1, -1).transpose(1, 2).contiguous().transpose(1, 2)
    expected = results(c, "triton")
    for qkv in (strided, permuted):
        for ours, want in zip(results(c._replace(qkv=qkv, table=table), "triton"), expected, strict=True):
            assert torch.equal(ours, want)
    one = c._replace(qkv=c.qkv[:1].expand(2, -1, -1, -1, -1))
    agrees(one)


def test_separate_q_k_v_are_the_same_call() -> None:
    c = call()
    q, k, v = c.qkv.permute(2, 0, 3, 1, 4).unbind(0)
    ours = rpe_attention(q, k, v, c.table, c.layout.grid, rpe_scale=0.8, backend="triton")
    assert torch.equal(ours.transpose(1, 2), results(c, "triton")[0])


@pytest.mark.parametrize("grid", [(7, 7), (9, 9)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[-2:], ids=str)
def test_two_backward_passes_give_the_same_bits(grid: tuple[int, int], dtype: torch.dtype) -> None:
    c = call(grid, batch=3, heads=1, dtype=dtype)
    first, second = results(c, "triton"), results(c, "triton")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_pytorch_accepts_the_operator() -> None:
    c = call((3, 3), batch=1, heads=1, dim=16)
    arguments = (c.qkv.requires_grad_(), c.table.requires_grad_(), 3, 3, 1, "product", 1.9, 0.25, 1.0, "triton")
    torch.library.opcheck(OPERATOR, arguments)


@pytest.mark.parametrize("grid", [(7, 7), (9, 9)], ids=str)
def test_an_empty_batch_has_an_empty_output_and_no_gradient(grid: tuple[int, int]) -> None:
    out, d_qkv, d_table = results(call(grid, batch=0, heads=1), "triton")
    assert (len(out), len(d_qkv)) == (0, 0)
    assert not d_table.any()


@pytest.mark.parametrize("trained", ["qkv", "table"])
def test_what_is_frozen_gets_no_gradient(trained: str) -> None:
    c = call((3, 3), heads=1)
    leaf = getattr(c, trained).requires_grad_()
    rpe_attention_packed(c.qkv, c.table, c.layout.grid, backend="triton").sum().backward()
    assert leaf.grad is not None
    assert (c.qkv.grad is None) == (trained == "table")
    assert (c.table.grad is None) == (trained == "qkv")


class Layer(nn.Module):
    """The attention of a block."""

    def __init__(self, layout: Layout, dim: int) -> None:
        super().__init__()
        self.layout, self.heads = layout, 2
        self.qkv, self.table = nn.Linear(dim, 3 * dim), nn.Parameter(torch.randn(1, dim // 2, layout.columns))

    def forward(self, x: Tensor) -> Tensor:
        packed = self.qkv(x).view(*x.shape[:2], 3, self.heads, -1)
        return x + rpe_attention_packed(packed, self.table, self.layout.grid, backend="triton").flatten(2)


@pytest.mark.slow
@pytest.mark.parametrize("plain", [False, True], ids=["contextual", "plain"])
def test_generated_code_takes_the_gradient_of_tables_per_head(plain: bool) -> None:
    c = call((3, 3), batch=1, dim=16, per_head=True, plain=plain)

    def loss(qkv: Tensor, table: Tensor) -> Tensor:
        return rpe_attention_packed(qkv, table * 2, c.layout.grid, backend="triton").square().sum()

    leaves = c.qkv.requires_grad_(), c.table.requires_grad_()
    plainly = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for ours, theirs in zip(compiled, plainly, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-2, atol=TOLERANCE[EXACT] * float(theirs.abs().max()))


def step(layer: nn.Module, forward: object, x: Tensor) -> list[Tensor]:
    layer.zero_grad()
    assert callable(forward)
    out = forward(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]


def test_compiled_and_recomputed_it_is_one_graph_with_the_same_result() -> None:
    torch.manual_seed(0)
    layer = Layer(Layout((3, 3)), 32).to(DEVICE, EXACT)
    x = torch.randn(2, 10, 32, device=DEVICE, dtype=EXACT)
    plain = step(layer, layer, x)
    recomputed = step(layer, lambda x: checkpoint(layer, x, use_reentrant=False), x)
    compiled = step(layer, torch.compile(layer, fullgraph=True, backend="aot_eager"), x)
    for other in (recomputed, compiled):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, other, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 144}, "triton does not take this call: head size 144: at most 128 is allowed"),
        ({"cls_tokens": 65}, "triton does not take this call: 65 class tokens: at most 64 are allowed"),
        ({"ratio": 4.0}, "method product with ratio 4.0: product with a ratio below 4 is allowed"),
        ({"dtype": torch.float64}, "dtype torch.float64: float16, bfloat16 and float32 are allowed"),
    ],
)
def test_what_the_kernels_do_not_take_is_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        results(call(**changes), "triton")


def test_other_methods_and_no_table_are_refused_with_a_way_out() -> None:
    c = call()
    with pytest.raises(ValueError, match=r"method cross with ratio 1\.9: product"):
        rpe_attention_packed(c.qkv, torch.zeros(1, 32, 16), (7, 7), method="cross", backend="triton")
    with pytest.raises(ValueError, match="there is no table: choose flash or sdpa"):
        rpe_attention_packed(c.qkv, None, (7, 7), backend="triton")


@pytest.mark.parametrize(
    ("device", "dtype", "bias", "chosen"),
    [
        ("cpu", torch.bfloat16, "contextual", "dense"),
        ("cuda", torch.bfloat16, "contextual", "triton"),
        ("cuda", torch.float16, "plain", "triton"),
        ("cuda", torch.float32, "contextual", "sdpa"),
        ("cuda", torch.float64, "contextual", "sdpa"),
        ("cuda", torch.bfloat16, "none", "sdpa"),
    ],
)
def test_auto_is_the_fused_kernel_where_it_serves(device: str, dtype: torch.dtype, bias: str, chosen: str) -> None:
    problem = Problem(device, dtype, 12, 64, Layout((7, 7)), bias, trains=True)
    assert choose("auto", problem) == chosen
    assert not BACKENDS[chosen].refuses(problem)
    assert choose("dense", problem) == "dense"


@pytest.mark.parametrize(
    ("grid", "dim", "ratio", "limit", "taken"),
    [
        ((7, 7), 64, 1.9, 99, True),
        ((7, 7), 128, 1.9, 99, False),
        ((7, 7), 128, 1.9, 163, True),
        ((7, 7), 64, 3.0, 99, False),
        ((32, 32), 128, 3.0, 227, False),
    ],
)
def test_kernels_that_do_not_fit_the_memory_of_a_block_are_not_chosen(
    grid: tuple[int, int], dim: int, ratio: float, limit: int, taken: bool
) -> None:
    problem = Problem("cuda", torch.bfloat16, 12, dim, Layout(grid, ratio=ratio), trains=True, shared=1024 * limit)
    assert choose("auto", problem) == ("triton" if taken else "sdpa")
    if not taken:
        assert f"of shared memory in a block, this GPU has {1024 * limit}" in BACKENDS["triton"].refuses(problem)


def test_a_gpu_takes_no_float32() -> None:
    problem = Problem("cuda", torch.float32, 12, 64, Layout((7, 7)))
    assert BACKENDS["triton"].refuses(problem).startswith("dtype torch.float32 spills on a GPU")


def test_auto_leaves_other_methods_to_a_dense_bias() -> None:
    problem = Problem("cuda", torch.bfloat16, 12, 64, Layout((7, 7), method="euclidean"), trains=True)
    assert choose("auto", problem) == "sdpa"


@given(grid=st.tuples(st.integers(1, 40), st.integers(1, 40)), cls_tokens=st.integers(0, 64))
def test_blocks_hold_every_token(grid: tuple[int, int], cls_tokens: int) -> None:
    b = blocks(Layout(grid, cls_tokens))
    assert grid[0] * grid[1] + cls_tokens <= b.BLOCKS * 64
    assert b.FIRST + cls_tokens <= 64
    below = b.LAST // b.BX * 8 + b.FIRST // 8  # the image row of the first class token
    assert below >= grid[0] or cls_tokens == 0
    assert b.LAST < b.BLOCKS or cls_tokens == 0
