"""Timing of kernels: trials taken in turn, and a roofline measured in the same process to hold them against."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch

Stage = Callable[[Any], Any]
"""A part of what is timed; it takes what the part before it gave."""

_COLD = 256 << 20
"""Bytes written between two repeats: several times the second-level cache of any GPU."""


class Work(NamedTuple):
    """What an operator has to do at least: floating-point operations, and bytes to and from memory."""

    flops: float
    nbytes: float

    def __add__(self, other: tuple[object, ...]) -> Work:
        """Of both, one after the other."""
        flops, nbytes = Work(*other)  # type: ignore[arg-type]
        return Work(self.flops + flops, self.nbytes + nbytes)


class Roof(NamedTuple):
    """What a device reached in this process: bytes/s of a large copy, FLOP/s of large products by dtype."""

    copy: float
    gemm: dict[str, float]

    def seconds(self, work: Work, dtype: str) -> float:
        """The time that memory or arithmetic alone would take, whichever is longer."""
        return max(work.nbytes / self.copy, work.flops / self.gemm[dtype] if self.gemm else 0.0)

    def best(self, other: Roof) -> Roof:
        """The higher of both: a device that others use reaches its roof at some moments only."""
        return Roof(max(self.copy, other.copy), {name: max(rate, other.gemm[name]) for name, rate in self.gemm.items()})


@dataclass
class Row:
    """One line of a table. Without numbers it says why."""

    what: str
    """attention, target or loss"""
    shape: str
    backend: str
    direction: str
    """forward or forward+backward"""
    dtype: str
    """of the operands; `work` counts bytes of it"""
    work: Work
    reason: str = ""
    ms: float | None = None
    last_ms: float | None = None
    """of its last part alone: the backward pass in rows of both"""
    gb_s: float | None = None
    tflop_s: float | None = None
    share: float | None = None
    """of the roofline: the least time `work` can take over the time it took"""
    repeats: int = 0
    peak: int | None = None
    """bytes above the inputs, where the device counts them"""
    error: float | None = None
    """largest, against float64; the caller says relative to what"""
    same_bits: bool | None = None
    """whether two runs gave the same gradients, bit for bit"""

    def fill(self, seconds: float, repeats: int, roof: Roof) -> None:
        """The figures that follow from a time."""
        self.ms, self.repeats = seconds * 1e3, repeats
        self.gb_s, self.tflop_s = self.work.nbytes / seconds / 1e9, self.work.flops / seconds / 1e12
        self.share = roof.seconds(self.work, self.dtype) / seconds


@dataclass
class Trial:
    """Something to time. `rows[i]` counts stages 0 to i together."""

    start: Callable[[], Sequence[Stage]]
    """warms up, writes what it checks into the rows, and returns the stages; what it raises becomes the reason"""
    rows: list[Row] = field(default_factory=list)
    reason: str = ""
    limit: float = 2.0
    """seconds after which three repeats are enough"""
    stages: Sequence[Stage] = ()
    laps: list[tuple[float, ...]] = field(default_factory=list)
    """seconds of each stage, per repeat"""

    def seconds(self, first: int = 0, end: int | None = None) -> float:
        """Median over the repeats of stages `first` to `end` together."""
        return statistics.median(sum(lap[first:end]) for lap in self.laps)

    def faster_than(self, other: Trial) -> float:
        """How many times: median over the rounds, in each of which both met the same moment of the machine."""
        pairs = zip(map(sum, other.laps), map(sum, self.laps), strict=False)
        return statistics.median(theirs / ours for theirs, ours in pairs)

    def wants_more(self, repeats: int) -> bool:
        """Whether another repeat is due."""
        spent = sum(map(sum, self.laps))
        few = len(self.laps) < 3  # of which there is a median
        return not self.reason and len(self.laps) < repeats and (few or spent < self.limit)


class Budget:
    """Seconds that everything together may take."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.until = seconds, time.monotonic() + seconds

    @property
    def spent(self) -> bool:
        """Whether nothing new may begin."""
        return time.monotonic() >= self.until

    @property
    def reason(self) -> str:
        """Of a row that was not begun."""
        return f"not reached: the budget of {self.seconds:g} s was spent"


class Clock:
    """Times stages on one device: on CUDA by events, on a cold cache.

    On a CPU by the wall, or with one thread by the processor, which does not count what others take of the machine.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cold = _COLD if device.type == "cuda" else 0
        self._cold = torch.empty(cold, dtype=torch.uint8, device=device)

    @property
    def now(self) -> Callable[[], float]:
        """What tells the time on a CPU."""
        return time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def lap(self, stages: Sequence[Stage]) -> tuple[float, ...]:
        """Seconds of each stage of one pass."""
        value: Any = None
        if self.device.type != "cuda":
            now = self.now
            times = [now()]
            for stage in stages:
                value = stage(value)
                times.append(now())
            return tuple(end - begin for begin, end in pairwise(times))
        # More than once: while the GPU writes, the CPU gets ahead, so that no launch is waited for on the clock.
        for _ in range(4):
            self._cold.zero_()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(stages) + 1)]
        marks[0].record()
        for stage, mark in zip(stages, marks[1:], strict=True):
            value = stage(value)
            mark.record()
        torch.cuda.synchronize()
        return tuple(begin.elapsed_time(end) / 1e3 for begin, end in pairwise(marks))

    def settle(self) -> None:
        """Wait for the device, and give memory that nothing uses back."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def run(trials: Sequence[Trial], clock: Clock, repeats: int, budget: Budget, roof: Roof | None = None) -> None:
    """Start every trial, then repeat all in turn, to and fro, so that a slow moment of the machine hits each of them.

    A trial that fails keeps the first line of its error as the reason; one not begun within the budget says so. With a
    roof, rows are filled.
    """
    for trial in trials:
        if not trial.reason and budget.spent:
            trial.reason = budget.reason
        if not trial.reason:
            with failing(trial, clock):
                trial.stages = trial.start()
    for number in range(repeats):
        for trial in trials if number % 2 == 0 else trials[::-1]:
            if trial.wants_more(repeats) and not (trial.laps and budget.spent):
                with failing(trial, clock):
                    trial.laps.append(clock.lap(trial.stages))
    for trial in trials:
        trial.stages = ()  # what they hold on the device is not needed any more
        for number, row in enumerate(trial.rows, start=1):
            if trial.reason:
                row.reason = row.reason or trial.reason
            elif roof and not row.reason:
                row.fill(trial.seconds(0, number), len(trial.laps), roof)
                row.last_ms = trial.seconds(number - 1, number) * 1e3


@contextmanager
def failing(trial: Trial, clock: Clock) -> Iterator[None]:
    """An error inside becomes the reason of the trial; memory it held is free afterwards."""
    try:
        yield
    except Exception as error:  # whatever a backend dies of is a result
        trial.reason = first_line(error)
    if trial.reason:
        try:
            clock.settle()
        except RuntimeError as error:  # a broken context answers every call; the reports are written without it
            trial.reason = f"{trial.reason}; then {first_line(error)}"


def first_line(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def measure_roof(clock: Clock, quick: bool = False, products: bool = True) -> Roof:
    """The best of some large copies and square products; float32 products as PyTorch computes them by default."""
    cuda = clock.device.type == "cuda"
    nbytes = 1 << (24 if quick else 30 if cuda else 27)
    side = 256 if quick else 8192 if cuda else 1536
    source = torch.zeros(nbytes, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    copy = 2 * nbytes / _best(clock, lambda _: target.copy_(source))
    gemm = {}
    for dtype in (torch.bfloat16, torch.float32) if products else ():
        a = torch.randn(side, side, dtype=dtype, device=clock.device)
        b = torch.randn_like(a)
        gemm[name_of(dtype)] = 2 * side**3 / _best(clock, partial(_product, a, b))
    clock.settle()
    return Roof(copy, gemm)


def _product(a: torch.Tensor, b: torch.Tensor, _: object) -> torch.Tensor:
    return a @ b


def _best(clock: Clock, stage: Stage) -> float:
    return min(clock.lap([stage])[0] for _ in range(10))


def name_of(dtype: torch.dtype) -> str:
    """`bfloat16` of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference as a share of the largest exact value; NaN anywhere is NaN."""
    difference = (found.detach().double() - exact).abs().max().item()
    scale = exact.abs().max().item()
    return difference / scale if scale else difference and math.inf


class Memory:
    """Bytes that a device holds at most from here on, above what it holds now."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()

    @property
    def peak(self) -> int | None:
        """So far; None where nobody counts."""
        return torch.cuda.max_memory_allocated() - self.before if self.cuda else None

    @property
    def highest(self) -> int | None:
        """So far, with what it held before."""
        return torch.cuda.max_memory_allocated() if self.cuda else None
