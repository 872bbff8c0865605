"""Warps and stages of the Triton kernels of short windows, timed in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import torch

from kernels.bench import Budget, Clock, Stage, Trial, run
from kernels.bench_attention import FORWARD, SHAPES, Inputs, Shape

WARPS, STAGES = (2, 4, 8), (1, 2, 3)
Options = Callable[..., dict[str, int]]
Line = tuple[str, str, str, str, str]


def rows(
    repeats: int = 30, shapes: Sequence[Shape] = SHAPES[:2], device: torch.device | None = None, budget: float = 420.0
) -> Iterator[Line]:
    """Lines (direction and shape, warps, stages, ms or the reason, whether training uses them)."""
    from kernels.rpe_attention import fused

    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not fused.INTERPRETED:
        yield "all", "-", "-", "it runs on cuda", ""
        return
    clock, limit = Clock(device), Budget(budget)
    for shape in shapes:
        inputs = Inputs(shape, torch.bfloat16, device)
        for direction, backward in ((FORWARD, False), ("backward", True)):
            chosen = _chosen(_launch(inputs, backward))
            pairs = list(product(WARPS, STAGES))
            trials = [Trial(partial(_start, inputs, backward, *pair)) for pair in pairs]
            run(trials, clock, repeats, limit)
            for (warps, stages), trial in zip(pairs, trials, strict=True):
                took = trial.reason or f"{trial.seconds() * 1e3:.3f}"
                mark = "yes" if chosen == {"num_warps": warps, "num_stages": stages} else ""
                yield f"{direction}, {shape.label}", str(warps), str(stages), took, mark


def _launch(inputs: Inputs, backward: bool) -> Callable[[], object]:
    """One direction of the fused operator."""
    from kernels.rpe_attention import fused

    qkv, table, layout = inputs.qkv.detach(), inputs.table.detach(), inputs.layout
    scales = inputs.shape.dim**-0.5, 1.0
    if not backward:
        return lambda: fused.forward(qkv, table, layout, *scales)
    out, lse = fused.forward(qkv, table, layout, *scales)
    return lambda: fused.backward(inputs.grad, qkv, table, out, lse, layout, *scales)


@contextmanager
def _options(replacement: Options) -> Iterator[None]:
    """Launches inside ask `replacement` for their options."""
    from kernels.rpe_attention import fused

    kept = fused.options
    fused.options = replacement
    try:
        yield
    finally:
        fused.options = kept


def _chosen(launch: Callable[[], object]) -> dict[str, int]:
    """The options with which training launches this."""
    from kernels.rpe_attention import fused

    seen, ask = [], fused.options

    def listen(*arguments: Any, **named: Any) -> dict[str, int]:
        seen.append(ask(*arguments, **named))
        return seen[-1]

    with _options(listen):
        launch()
    return seen[-1]


def _start(inputs: Inputs, backward: bool, warps: int, stages: int) -> Sequence[Stage]:
    """One direction, launched with these options."""
    launch = _launch(inputs, backward)

    def timed(_: object) -> object:
        with _options(lambda *_, **__: {"num_warps": warps, "num_stages": stages}):
            return launch()

    timed(None)
    return (timed,)
