"""What only a GPU can show. There, the tests of tests/unit that name kernels run compiled instead of interpreted."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from foundation.config import Config
from foundation.training.data import open_data, open_stream
from foundation.training.engine import Engine
from foundation.training.guard import Guard
from foundation.training.setup import build_learner
from foundation.training.step import train_step
from kernels.rpe_attention import BACKENDS, rpe_attention_packed
from kernels.rpe_attention.layout import Layout, Problem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
ENCODER, DECODER, IMAGE = ((7, 7), 256, 12, 64), ((7, 7), 256, 16, 32), ((14, 14), 16, 12, 64)
LARGE = ((32, 32), 2, 4, 64)
BOUND = 2e-2


def results(shape: tuple[tuple[int, int], int, int, int], backend: str, dtype: torch.dtype) -> list[Tensor]:
    """Output, gradients of projection and table; the same numbers for every backend and dtype."""
    grid, batch, heads, dim = shape
    layout = Layout(grid)
    draw = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(batch, layout.length, 3, heads, dim, device="cuda", generator=draw).bfloat16()
    table = torch.randn(1, dim, layout.columns, device="cuda", generator=draw) / dim**0.5
    weight = torch.randn(batch, layout.length, heads, dim, device="cuda", generator=draw).bfloat16()
    leaves = [
        qkv.to(dtype).requires_grad_(),
        table.to(dtype if dtype == torch.float64 else table.dtype).requires_grad_(),
    ]
    out = rpe_attention_packed(*leaves, grid, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight.to(dtype))]


@pytest.mark.parametrize("shape", [ENCODER, DECODER, IMAGE, LARGE], ids=["encoder", "decoder", "197", "1025"])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("reference", "flash")])
def test_every_backend_agrees_at_the_size_of_training(
    backend: str, shape: tuple[tuple[int, int], int, int, int]
) -> None:
    grid, _, heads, dim = shape
    if reason := BACKENDS[backend].refuses(Problem("cuda", torch.bfloat16, heads, dim, Layout(grid), trains=True)):
        pytest.skip(reason)
    exact = results(shape, "reference", torch.float64)
    for ours, definition in zip(results(shape, backend, torch.bfloat16), exact, strict=True):
        assert torch.isfinite(ours).all()
        assert (ours.double() - definition).abs().max() <= BOUND * definition.abs().max()


@pytest.mark.parametrize("shape", [ENCODER, DECODER, IMAGE, LARGE], ids=["encoder", "decoder", "197", "1025"])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_fused_gradients_have_the_same_bits_in_every_run(
    backend: str, shape: tuple[tuple[int, int], int, int, int]
) -> None:
    grid, _, heads, dim = shape
    if reason := BACKENDS[backend].refuses(Problem("cuda", torch.bfloat16, heads, dim, Layout(grid), trains=True)):
        pytest.skip(reason)
    first = results(shape, backend, torch.bfloat16)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, results(shape, backend, torch.bfloat16), strict=True))


@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_a_step_never_waits_for_the_gpu(tiny_config: Callable[..., Config], checkpointing: str) -> None:
    config = tiny_config("train.precision=bf16", f"train.activation_checkpointing={checkpointing}")
    engine = Engine(config)
    learner = build_learner(config, engine)
    batches = iter(open_stream(config, open_data(config), engine, 0))
    guard = Guard(config, lambda *_, **__: None, lambda *_: None)
    first = [next(batches)]
    guard.note(train_step(learner, first, 0, guard.limit()), first, 0, math.inf)  # compiles kernels and fills caches
    guard.check()
    torch.cuda.synchronize()
    ready = [[next(batches)] for _ in range(2)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number, batch in enumerate(ready):
            train_step(learner, batch, 8 * (number + 1))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("attention", ["auto", "sdpa", "triton"])
def test_compiled_blocks_learn_what_plain_ones_learn(tiny_config: Callable[..., Config], attention: str) -> None:
    losses = []
    for compiled in (False, True):
        config = tiny_config("train.precision=bf16", f"train.compile={compiled}", f"model.attention={attention}")
        engine = Engine(config)
        learner = build_learner(config, engine)
        batches = iter(open_stream(config, open_data(config), engine, 0))
        losses.append([train_step(learner, [next(batches)], 8 * i)["loss"].item() for i in range(5)])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
