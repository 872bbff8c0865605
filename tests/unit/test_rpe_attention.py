"""One definition of attention with relative positions, and backends that may be exchanged for it unseen."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from kernels.rpe_attention import BACKENDS, choose, rpe_attention, rpe_attention_packed
from kernels.rpe_attention.buckets import bucket_ids, num_buckets, piecewise_index, product_buckets
from kernels.rpe_attention.layout import METHODS, Layout, Problem
from kernels.rpe_attention.reference import attention_probabilities

GOLDEN = Path(__file__).parents[1] / "golden" / "rpe_buckets.npz"
IN_FLOAT64 = Problem("cpu", torch.float64, 2, 4, Layout((3, 5)), trains=True)
EXACT = [name for name, backend in BACKENDS.items() if not backend.refuses(IN_FLOAT64)]
FAST = [name for name in EXACT if name != "reference"]
sdpa_module = importlib.import_module("kernels.rpe_attention.sdpa")  # the package exports a function of that name
BRIEF = settings(max_examples=25, deadline=None)


class Case(NamedTuple):
    """Arguments of a call, in float64."""

    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor
    grid: tuple[int, int]


def case(
    grid: tuple[int, int] = (3, 5),
    heads: int = 2,
    dim: int = 4,
    batch: int = 2,
    per_head: bool = False,
    cls_tokens: int = 1,
    seed: int = 0,
    method: str = "product",
    ratio: float = 1.9,
    plain: bool = False,
) -> Case:
    draw = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, heads, cls_tokens + grid[0] * grid[1], dim, generator=draw, dtype=torch.float64)
    columns = num_buckets(ratio, cls_tokens, method)
    shape = (heads if per_head else 1, *([] if plain else [dim]), columns)
    return Case(q, k, v, torch.randn(shape, generator=draw, dtype=torch.float64), grid)


def by_hand(
    c: Case, cls_tokens: int, qk_scale: float, rpe_scale: float, method: str = "product", ratio: float = 1.9
) -> Tensor:
    """The equation, pair by pair."""
    ids = bucket_ids(c.grid, cls_tokens, method, ratio)
    tables = c.table.expand(c.q.shape[1], *c.table.shape[1:])
    out, length = torch.empty_like(c.q), c.q.shape[2]
    for b, h, i in np.ndindex(c.q.shape[:3]):
        logits = [qk_scale * (c.q[b, h, i] @ c.k[b, h, j]) for j in range(length)]
        numbers = tables[h] if c.table.ndim == 2 else c.q[b, h, i] @ tables[h]
        bias = [rpe_scale * numbers[ids[:, i, j]].sum() for j in range(length)]
        out[b, h, i] = (torch.stack(logits) + torch.stack(bias)).softmax(0) @ c.v[b, h]
    return out


def test_buckets_are_the_published_ones() -> None:
    with np.load(GOLDEN, allow_pickle=False) as golden:
        assert num_buckets() == golden["num_buckets"]
        for name in set(golden.files) - {"num_buckets"}:
            height, width = map(int, name.removeprefix("product_").split("x"))
            assert np.array_equal(product_buckets((height, width)).numpy(), golden[name]), name


@BRIEF
@given(grid=st.tuples(st.integers(1, 12), st.integers(1, 12)), cls_tokens=st.integers(0, 2))
def test_a_bucket_depends_only_on_the_offset_of_two_patches(grid: tuple[int, int], cls_tokens: int) -> None:
    ids = product_buckets(grid, cls_tokens)
    assert ids.max() < num_buckets(cls_tokens=cls_tokens)
    assert (ids[:cls_tokens] == 49).all()
    assert (ids[:, :cls_tokens] == 49).all()
    # Any grid is a part of a square one, so what a table has learnt in windows serves it.
    side = max(grid)
    inside = [r * side + c for r in range(grid[0]) for c in range(grid[1])]
    assert torch.equal(ids[cls_tokens:, cls_tokens:], product_buckets((side, side), 0)[inside][:, inside])


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("cls_tokens", [0, 1, 2])
def test_the_definition_is_the_equation(per_head: bool, cls_tokens: int) -> None:
    c = case((2, 3), per_head=per_head, cls_tokens=cls_tokens)
    ours = rpe_attention(*c, cls_tokens=cls_tokens, qk_scale=0.3, rpe_scale=0.7, backend="reference")
    assert torch.allclose(ours, by_hand(c, cls_tokens, 0.3, 0.7), rtol=0, atol=1e-12)


@pytest.mark.parametrize("plain", [False, True], ids=["contextual", "plain"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_the_equation(method: str, plain: bool) -> None:
    c = case((2, 5), per_head=True, method=method, ratio=1.2, plain=plain)
    ours = rpe_attention(*c, 1, 0.3, 0.7, method=method, ratio=1.2, backend="reference")
    assert torch.allclose(ours, by_hand(c, 1, 0.3, 0.7, method, 1.2), rtol=0, atol=1e-12)


@BRIEF
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    cls_tokens=st.integers(0, 2),
    ratio=st.sampled_from([0.4, 1.2, 1.9, 3.0]),
)
def test_distances_choose_the_bucket_of_the_other_methods(grid: tuple[int, int], cls_tokens: int, ratio: float) -> None:
    half, width = int(2 * ratio), grid[1]
    for method in ("cross", "euclidean", "quantised"):
        ids = bucket_ids(grid, cls_tokens, method, ratio)
        columns = num_buckets(ratio, cls_tokens, method)
        assert ids.shape == (2 if method == "cross" else 1, *(cls_tokens + grid[0] * grid[1],) * 2)
        assert ids.max() < columns
        for i, j in ((0, grid[0] * width - 1), (grid[0] * width // 2, 0)):
            dy, dx = i // width - j // width, i % width - j % width
            found = ids[:, cls_tokens + i, cls_tokens + j].tolist()
            if method == "cross":
                side = columns // 2
                assert found == [piecewise_index(dy, ratio) + half, side + piecewise_index(dx, ratio) + half]
            else:
                squared = dy**2 + dx**2
                offset = squared if method == "quantised" else round(squared**0.5)
                assert found == [piecewise_index(offset, ratio) + half]


@pytest.mark.parametrize("backend", FAST)
@BRIEF
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    heads=st.integers(1, 4),
    dim=st.sampled_from([1, 4, 12]),
    batch=st.integers(1, 3),
    per_head=st.booleans(),
    cls_tokens=st.integers(0, 2),
    scales=st.tuples(st.sampled_from([None, 0.2, 1.0]), st.sampled_from([0.0, 0.5, 1.0])),
    method=st.sampled_from(METHODS),
    plain=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_backend_equals_the_definition(
    backend: str,
    grid: tuple[int, int],
    heads: int,
    dim: int,
    batch: int,
    per_head: bool,
    cls_tokens: int,
    scales: tuple[float | None, float],
    method: str,
    plain: bool,
    seed: int,
) -> None:
    c = case(grid, heads, dim, batch, per_head, cls_tokens, seed, method, plain=plain)
    want, got = (rpe_attention(*c, cls_tokens, *scales, method=method, backend=name) for name in ("reference", backend))
    assert torch.allclose(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("plain", [False, True], ids=["contextual", "plain"])
def test_gradients_of_every_backend_equal_those_of_the_definition(
    backend: str, per_head: bool, method: str, plain: bool
) -> None:
    c = case((4, 6), heads=3, per_head=per_head, method=method, plain=plain)
    leaves = [t.requires_grad_() for t in c[:4]]
    weight = torch.randn(c.q.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    want, got = (
        torch.autograd.grad((rpe_attention(*c, method=method, backend=name) * weight).sum(), leaves)
        for name in ("reference", backend)
    )
    for ours, definition in zip(got, want, strict=True):
        assert torch.allclose(ours, definition, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("per_head", [False, True])
def test_gradients_are_those_of_finite_differences(backend: str, per_head: bool) -> None:
    c = case((2, 2), heads=2, dim=2, batch=1, per_head=per_head)
    leaves = [t.requires_grad_() for t in c[:4]]
    assert torch.autograd.gradcheck(
        lambda q, k, v, table: rpe_attention(q, k, v, table, c.grid, rpe_scale=0.8, backend=backend), leaves
    )


def test_large_grids_take_the_index_and_small_ones_the_one_hot_product_with_one_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small, large = case((4, 6), per_head=True), case((16, 16), batch=1, dim=2)
    assert large.q.shape[2] ** 2 > sdpa_module._ONE_HOT_PAIRS > small.q.shape[2] ** 2
    assert torch.allclose(
        rpe_attention(*large, backend="dense"), rpe_attention(*large, backend="reference"), atol=1e-12
    )
    one_hot = sdpa_module.dense_bias(small.q, small.table, Layout(small.grid), 0.5)
    monkeypatch.setattr(sdpa_module, "_ONE_HOT_PAIRS", 0)
    monkeypatch.setattr(sdpa_module, "_one_hot", lambda *_: pytest.fail("the one-hot matrix was built"))
    assert torch.allclose(sdpa_module.dense_bias(small.q, small.table, Layout(small.grid), 0.5), one_hot, atol=1e-14)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("grid", [(7, 7), (16, 16)], ids=["one-hot", "index"])
def test_the_table_gradient_is_the_same_to_the_bit_in_every_run(backend: str, grid: tuple[int, int]) -> None:
    def gradient() -> Tensor:
        q, k, v, table = (t.float() for t in case(grid, batch=3)[:4])
        table.requires_grad_()
        (rpe_attention(q, k, v, table, grid, backend=backend) * v).sum().backward()
        assert table.grad is not None
        return table.grad

    first = gradient()
    assert all(torch.equal(gradient(), first) for _ in range(3))


@pytest.mark.parametrize("backend", EXACT)
def test_the_class_query_ignores_the_table_because_all_its_keys_share_one_bucket(backend: str) -> None:
    c = case()
    ours = rpe_attention(*c, backend=backend)
    plain = F.scaled_dot_product_attention(c.q, c.k, c.v)
    assert torch.allclose(ours[:, :, 0], plain[:, :, 0], atol=1e-12)
    assert not torch.allclose(ours[:, :, 1:], plain[:, :, 1:], atol=1e-3)


@pytest.mark.parametrize("backend", EXACT)
def test_the_position_term_takes_the_unscaled_query(backend: str) -> None:
    c = case(dim=16)
    without_content = [rpe_attention(*c, qk_scale=scale, backend=backend) for scale in (0.0, 1e-300)]
    bias = torch.einsum("bhid,dij->bhij", c.q, c.table[0][:, product_buckets(c.grid)])
    for ours in without_content:
        assert torch.allclose(ours, bias.softmax(-1) @ c.v, atol=1e-12)
    assert torch.allclose(rpe_attention(*c, backend=backend), (c.q @ c.k.mT / 4 + bias).softmax(-1) @ c.v, atol=1e-12)


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
@settings(max_examples=10, deadline=None)
@given(
    grid=st.sampled_from([(1, 2), (1, 9), (5, 3), (7, 7)]),
    heads=st.integers(1, 3),
    batch=st.integers(1, 3),
    memory=st.sampled_from(["plain", "strided", "expanded"]),
)
def test_output_and_gradients_stay_near_float64_whatever_lies_in_memory(
    backend: str, dtype: torch.dtype, bound: float, grid: tuple[int, int], heads: int, batch: int, memory: str
) -> None:
    c = case(grid, heads, 32, batch, cls_tokens=grid[0] % 2)
    q, k, v = (t.to(dtype) for t in c[:3])
    if memory == "strided":
        q, k, v = (torch.stack((t, t), -1)[..., 0].transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v))
    if memory == "expanded":
        q, k, v = (t[:1].expand(batch, -1, -1, -1) for t in (q, k, v))
    table, weight = (c.table / 32**0.5).to(dtype), c.v.flip(2)
    found, exact = [], []
    for results, name, precision in ((found, backend, dtype), (exact, "reference", torch.float64)):
        leaves = [t.detach().to(precision).requires_grad_() for t in (q, k, v, table)]
        out = rpe_attention(*leaves, grid, grid[0] % 2, backend=name)
        results += [out.detach(), *torch.autograd.grad(out, leaves, weight.to(precision))]
    assert found[0].dtype == dtype
    for ours, definition in zip(found, exact, strict=True):
        assert (ours.double() - definition).abs().max() <= bound * definition.abs().max().clamp_min(0.1)


def test_probabilities_sum_to_one() -> None:
    c = case()
    maps = attention_probabilities(c.q, c.k, c.table, Layout(c.grid), 0.5, 1.0)
    assert torch.allclose(maps.sum(-1), torch.ones((), dtype=torch.float64))


@BRIEF
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    dim=st.sampled_from([4, 16]),
    cls_tokens=st.integers(0, 2),
    method=st.sampled_from(METHODS),
    plain=st.booleans(),
)
def test_flex_attention_looks_the_same_numbers_up(
    grid: tuple[int, int], dim: int, cls_tokens: int, method: str, plain: bool
) -> None:
    c = case(grid, 2, dim, 2, True, cls_tokens, method=method, plain=plain)
    with torch.no_grad():
        want, got = (rpe_attention(*c, cls_tokens, method=method, backend=name) for name in ("reference", "flex"))
    assert torch.allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", EXACT)
def test_the_packed_form_is_the_same_call(backend: str) -> None:
    c = case()
    packed = torch.stack(c[:3]).permute(1, 3, 0, 2, 4)  # [B, L, 3, H, d], not contiguous
    want = rpe_attention(*c, backend=backend)
    assert torch.equal(rpe_attention_packed(packed, c.table, c.grid, backend=backend), want.transpose(1, 2))


@pytest.mark.parametrize("backend", [*EXACT, "flex"])
def test_without_a_table_it_is_plain_attention(backend: str) -> None:
    c = case(dim=8)
    ours = rpe_attention(c.q, c.k, c.v, None, c.grid, backend=backend)
    assert torch.allclose(ours, F.scaled_dot_product_attention(c.q, c.k, c.v), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_the_bias_can_lie_as_fused_attentions_need_them(dtype: torch.dtype) -> None:
    c = case((7, 7))
    q, table = c.q.to(dtype), c.table.to(dtype)
    aligned = sdpa_module.dense_bias(q, table, Layout(c.grid), 1.0, aligned=8)
    assert aligned.shape == (2, 2, 50, 50)
    assert aligned.stride(-2) % 8 == 0
    assert aligned.stride(-1) == 1
    assert torch.allclose(aligned.double(), sdpa_module.dense_bias(q, table, Layout(c.grid), 1.0).double(), atol=2e-2)


@pytest.mark.parametrize("backend", EXACT)
def test_a_training_may_follow_an_evaluation_of_the_same_grid(backend: str) -> None:
    c = case((2, 11))
    with torch.inference_mode():
        rpe_attention(*c, backend=backend)
    rpe_attention(c.q.requires_grad_(), *c[1:4], c.grid, backend=backend).sum().backward()
    assert c.q.grad is not None


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["dense", "sdpa", "reference"])
def test_one_compiled_function_serves_several_grids(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(rpe_attention, fullgraph=True, backend="aot_eager")
    for grid in ((3, 4), (4, 4), (5, 2)):
        c = case(grid)
        assert torch.allclose(compiled(*c, backend=backend), rpe_attention(*c, backend=backend), atol=1e-12)


def test_a_cpu_gathers_where_there_are_many_pairs() -> None:
    short = Problem("cpu", torch.float32, 12, 64, Layout((7, 7)))
    assert (choose("auto", short), choose("auto", short._replace(layout=Layout((24, 24))))) == ("dense", "reference")


def test_what_a_tracer_makes_is_not_kept_for_those_who_compute() -> None:
    grid = (3, 5)
    with FakeTensorMode():
        bucket_ids(grid, 2)
    kept = bucket_ids(grid, 2)
    assert type(kept) is torch.Tensor
    assert bucket_ids(grid, 2) is kept
