"""The attention backends beside the published definition: time, memory, error and repeatability by shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.bench import Budget, Clock, Memory, Roof, Row, Stage, Trial, Work, first_line, name_of, relative_error, run
from kernels.rpe_attention import BACKENDS, rpe_attention_packed
from kernels.rpe_attention.layout import Layout, Problem
from kernels.rpe_attention.reference import reference

FORWARD, BOTH = "forward", "forward+backward"
PUBLISHED, CEILING = "published", "no bias"
"""Rows beside the backends: the definition as its authors wrote it, and attention that has no position bias at all."""
ALL = "all"
"""Stands for every backend in the row of a shape that is left out."""
Call = Callable[[Tensor, Tensor], Tensor]


class Shape(NamedTuple):
    """Sequences of one class token and a grid of patches."""

    name: str
    grid: tuple[int, int]
    batch: int
    heads: int = 12
    dim: int = 64

    @property
    def layout(self) -> Layout:
        """Where its tokens stand."""
        return Layout(self.grid)

    @property
    def label(self) -> str:
        """All of it, for tables."""
        return f"{self.name}: L={self.layout.length}, B={self.batch}, H={self.heads}, d={self.dim}"


SHAPES = (
    Shape("windows", (7, 7), 4096),
    Shape("windows, decoder", (7, 7), 4096, 16, 32),
    Shape("224 px", (14, 14), 256),
    Shape("384 px", (24, 24), 64),
    Shape("512 px", (32, 32), 32),
    Shape("1024 px", (64, 64), 8),
)
"""LoMaR's windows and whole images, in patches of 16 px, of ViT-B; the decoder is the published one."""
ON_A_CPU = (16, 16, 2, 1)
"""Batches of the first of SHAPES on a CPU; the others would take minutes there."""


def shapes(device: torch.device, quick: bool) -> list[Shape]:
    """What is timed on a device: everything on a GPU, small batches on a CPU; `quick` is a rehearsal."""
    if device.type == "cuda":
        return [s._replace(batch=max(1, s.batch // 64)) for s in SHAPES[:3]] if quick else list(SHAPES)
    small = [s._replace(batch=batch) for s, batch in zip(SHAPES, ON_A_CPU, strict=False)]
    return [s._replace(batch=1) for s in small[:3]] if quick else small


def works(shape: Shape, itemsize: int) -> tuple[Work, Work]:
    """Of the fused operator forward, and forward and backward: the least that any implementation does.

    Forward q·k, p·v and the product of queries and table; q, k, v in, the output and one float32 per row out. Backward
    five products of the map's size and the table's three times; q, k, v, the output and its gradient in, three
    gradients out, two float32 per row.
    """
    rows = shape.batch * shape.heads * shape.layout.length
    maps, table = 2 * rows * shape.layout.length * shape.dim, 2 * rows * shape.layout.columns * shape.dim
    tensor = rows * shape.dim * itemsize
    forward = Work(2 * maps + table, 4 * tensor + 4 * rows)
    backward = Work(5 * maps + 3 * table, 8 * tensor + 8 * rows)
    return forward, forward + backward


def published(qkv: Tensor, table: Tensor, layout: Layout, qk_scale: float, rpe_scale: float) -> Tensor:
    """iRPE on keys as SAR-JEPA and LoMaR compute it: [B, L, 3, H, d] → [B, L, H, d], meant for float32.

    Three copies out of the projection, the product of queries and table, a gather of L x L entries for each head, and
    every map in memory. The gather stands for their CUDA extension, which also adds its gradient atomically.
    """
    q, k, v = (part.contiguous() for part in qkv.permute(2, 0, 3, 1, 4))
    logits = (q @ k.transpose(-2, -1)) * qk_scale
    columns = q @ table
    ids = layout.ids(q.device)[0]
    logits = logits + columns.gather(-1, ids.expand(*columns.shape[:2], -1, -1)) * rpe_scale
    return (logits.softmax(-1) @ v).transpose(1, 2).contiguous()


class Exact(NamedTuple):
    """The first problems of a batch in float64: output, and gradients of the projection and of the table."""

    out: Tensor
    d_qkv: Tensor
    d_table: Tensor


class Inputs:
    """Random numbers of a shape, as training has them: a packed projection, a float32 table, and an output gradient."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.layout = shape, shape.layout
        generator = torch.Generator(device).manual_seed(0)
        options: dict[str, Any] = {"generator": generator, "device": device, "dtype": dtype}
        size = (shape.batch, self.layout.length)
        self.qkv = torch.randn(*size, 3, shape.heads, shape.dim, **options).requires_grad_()
        self.grad = torch.randn(*size, shape.heads, shape.dim, **options)
        # Rounded to the operands' dtype, so that no backend loses anything in its table.
        table = torch.randn(1, shape.dim, self.layout.columns, **options) / 10
        self.table = table.float().requires_grad_()
        # As many problems as have float64 maps, and what autograd keeps of them, in so much memory.
        room = 8e9 if device.type == "cuda" else 5e8
        self.checked = max(1, min(shape.batch, int(room / (64 * shape.heads * self.layout.length**2)), 256))
        # Zero beyond the checked problems: then the table's gradient is of them alone.
        self.few = self.grad.clone()
        self.few[self.checked :] = 0

    def exact(self, bias: bool = True) -> Exact:
        """Of the checked problems."""
        qkv = self.qkv.detach()[: self.checked].double().requires_grad_()
        table = self.table.detach().double().requires_grad_()
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = reference(q, k, v, table if bias else None, self.layout, self.shape.dim**-0.5, 1.0).transpose(1, 2)
        wanted = (qkv, table) if bias else (qkv,)
        gradients = torch.autograd.grad(out, wanted, self.grad[: self.checked].double())
        return Exact(out.detach(), gradients[0], gradients[1] if bias else torch.zeros_like(table))


class Candidate(NamedTuple):
    """A way to compute the operator here, the reason why not, and the reason why it has no backward."""

    name: str
    call: Call
    reason: str = ""
    no_backward: str = ""


def candidates(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Candidate]:
    """The published definition, every backend, and attention without a bias."""
    layout, scale = shape.layout, shape.dim**-0.5
    found = [Candidate(PUBLISHED, lambda qkv, table: published(qkv, table, layout, scale, 1.0))]
    for name, backend in BACKENDS.items():
        problem = Problem(device.type, dtype, shape.heads, shape.dim, layout, trains=True)
        no_backward, reason = backend.refuses(problem), backend.refuses(problem._replace(trains=False))
        if name == "triton" and device.type == "cpu" and not reason:
            reason = "Triton is interpreted on a CPU, which says nothing about its speed"
        found.append(Candidate(name, partial(_by_backend, shape.grid, name), reason, no_backward))
    return [*found, Candidate(CEILING, lambda qkv, _: rpe_attention_packed(qkv, None, layout.grid))]


def _by_backend(grid: tuple[int, int], name: str, qkv: Tensor, table: Tensor) -> Tensor:
    return rpe_attention_packed(qkv, table, grid, backend=name)


def attention(
    device: torch.device, clock: Clock, roof: Roof, repeats: int, budget: Budget, quick: bool = False
) -> Iterator[Row]:
    """Rows of every shape: in bfloat16 on a GPU, in float32 and bfloat16 on a CPU; `published` is always float32.

    Errors are relative to the largest value: of the output in forward rows, and the worst of all gradients, each
    relative to its own, in those of both directions.
    """
    dtypes = (torch.bfloat16,) if device.type == "cuda" else (torch.float32, torch.bfloat16)
    for shape in shapes(device, quick):
        for dtype in dtypes:
            yield from _group(shape, dtype, clock, roof, repeats, budget)
    if device.type != "cuda":
        for shape in SHAPES[len(ON_A_CPU) :]:
            blank = Row("attention", shape.label, ALL, FORWARD, "float32", works(shape, 4)[0])
            yield replace(blank, reason="left out on a CPU")


def _group(shape: Shape, dtype: torch.dtype, clock: Clock, roof: Roof, repeats: int, budget: Budget) -> Iterator[Row]:
    """One shape in one dtype: all candidates on the same numbers."""
    trials, device = [], clock.device
    if device.type == "cuda":
        torch.compiler.reset()  # a compiler that has seen many shapes of one function gives up on it
    both, inputs, failure = works(shape, dtype.itemsize), None, budget.reason if budget.spent else ""
    try:
        inputs = None if failure else Inputs(shape, dtype, device)
        exact = {bias: inputs.exact(bias) for bias in (True, False)} if inputs else {}
        clock.settle()
    except RuntimeError as error:  # no memory for it
        failure = first_line(error)
    for one in candidates(shape, dtype, device):
        named = zip((FORWARD, BOTH), both, strict=True)
        rows = [Row("attention", shape.label, one.name, to, name_of(dtype), work) for to, work in named]
        rows[1].reason = one.no_backward
        start: Callable[[], Sequence[Stage]] = list
        if inputs and not failure:
            start = partial(_start, one, inputs, exact[one.name != CEILING], rows)
        trials.append(Trial(start, rows, one.reason or failure))
    run(trials, clock, repeats, budget, roof)
    for trial in trials:
        yield from trial.rows


def _start(one: Candidate, inputs: Inputs, exact: Exact, rows: list[Row]) -> Sequence[Stage]:
    """Warm up, check against float64, see the memory, compare two runs; then what is to be timed."""
    qkv, table, grad, few = inputs.qkv, inputs.table, inputs.grad, inputs.few
    if one.name == PUBLISHED:  # its numbers are float32 before the clock runs
        qkv, grad, few = qkv.detach().float().requires_grad_(), grad.float(), few.float()
    checked, device = inputs.checked, qkv.device
    wanted = (qkv,) if one.name == CEILING else (qkv, table)

    def forward(_: object) -> Tensor:
        with torch.set_grad_enabled(not one.no_backward):
            return one.call(qkv, table)

    def backward(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, wanted, grad)

    out = forward(None)
    rows[0].error = relative_error(out[:checked], exact.out)
    if not one.no_backward:
        rows[1].error = _gradient_error(torch.autograd.grad(out, wanted, few), exact, checked)
    del out
    memory = Memory(device)
    out = forward(None)
    rows[0].peak = memory.peak
    if one.no_backward:
        return (forward,)
    gradients = backward(out)
    rows[1].peak = memory.peak
    del out
    again = backward(forward(None))
    rows[1].same_bits = all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
    return (forward, backward)


def _gradient_error(found: tuple[Tensor, ...], exact: Exact, checked: int) -> float:
    pairs = [(found[0][:checked, :, part], exact.d_qkv[:, :, part]) for part in range(3)]
    pairs += [(d_table, exact.d_table) for d_table in found[1:]]
    errors = torch.tensor([relative_error(one, other) for one, other in pairs], dtype=torch.float64)
    return errors.max().item()  # unlike Python's max, torch's keeps NaN
