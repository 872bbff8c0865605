"""Shards → micro-batches, in an order that is a pure function of (catalog, seed, position).

A micro-batch is a pure function of its number, so neither the number of workers nor the moment of a restart can change
what it holds; a seek costs nothing because nothing has to be replayed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate, count, islice
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from shards.catalog import Catalog
from shards.errors import DataError
from shards.order import Mixture, check_division, rank_positions
from shards.placing import placed
from shards.reader import CorruptSample, Reader, Sample

__all__ = ["Batch", "Reader", "Replaced", "Sample", "Stream"]

T = TypeVar("T")
R = TypeVar("R")


class Replaced(NamedTuple):
    """A corrupt sample and what stands in its place: position in the run, both sample ids, and why."""

    position: int
    corrupt: int
    used: int
    reason: str


@dataclass(frozen=True)
class Batch:
    """Chips of different sizes and dtypes, each with its position in the run.

    `pixels` are amplitudes [C, H, W] in their own dtype; `scale` and `decibels` are float32 [B], the rule that makes
    them values in [0, 1] (see shards.catalog.Amplitude); `label`, `position` and `sample_id` are int64 [B] (label -1:
    none). `replaced` lists the samples of this batch whose bytes were damaged.
    """

    pixels: list[Tensor]
    scale: Tensor
    decibels: Tensor
    label: Tensor
    position: Tensor
    sample_id: Tensor
    replaced: tuple[Replaced, ...] = ()

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`; the pixels travel as one buffer."""
        flat, layout = _pack([p.cpu().numpy() for p in self.pixels], torch.device(device).type == "cuda")
        tensors = ("scale", "decibels", "label", "position", "sample_id")
        rest: dict[str, Any] = {name: placed(getattr(self, name), device) for name in tensors}
        return replace(self, pixels=_unpack(placed(flat, device), layout), **rest)

    @staticmethod
    def of(samples: list[Sample], position: Tensor | None = None, sample_id: Tensor | None = None) -> Batch:
        """A batch of these samples; positions and ids count from 0 when they do not matter."""
        number = torch.arange(len(samples))
        return Batch(
            pixels=[torch.from_numpy(s.pixels) for s in samples],
            scale=torch.tensor([s.scale for s in samples], dtype=torch.float32),
            decibels=torch.tensor([s.decibels for s in samples], dtype=torch.float32),
            label=torch.tensor([s.label for s in samples], dtype=torch.int64),
            position=number if position is None else position,
            sample_id=number if sample_id is None else sample_id,
        )


def in_order(function: Callable[[T], R], tasks: Iterator[T], workers: int) -> Iterator[R]:
    """`function` of every task in their order, computed by `workers` threads a few tasks ahead of the caller.

    The threads are daemons: one that waits for a dead server cannot keep the process from ending. `function` should not
    enter C++ libraries: a daemon that is inside of one when the interpreter ends takes the process down with it.
    """
    if not workers:
        yield from map(function, tasks)
        return
    queue: SimpleQueue[tuple[Future[R], T] | None] = SimpleQueue()

    def work() -> None:
        while (job := queue.get()) is not None:
            future, task = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(task))
                except BaseException as error:
                    future.set_exception(error)
            del job, future, task  # or they would live until the next job comes

    threads = [Thread(target=work, name="reader", daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    ahead: deque[Future[R]] = deque()

    def submit(some: Iterable[T]) -> None:
        for task in some:
            ahead.append(Future())
            queue.put((ahead[-1], task))

    try:
        submit(islice(tasks, 2 * workers))
        while ahead:
            result = ahead.popleft().result()
            submit(islice(tasks, 1))
            yield result
    finally:
        idle = not ahead
        for future in ahead:
            future.cancel()
        for _ in threads:
            queue.put(None)
        for thread in threads if idle else ():
            thread.join()


_Layout = list[tuple[int, torch.dtype, tuple[int, ...]]]


def _pack(pixels: list[np.ndarray], pinned: bool = False) -> tuple[Tensor, _Layout]:
    """Arrays of any shape and dtype → one uint8 buffer and where each lies in it, 16-byte aligned."""
    ends = list(accumulate((-(-p.nbytes // 16) * 16 for p in pixels), initial=0))
    buffer = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=pinned)
    flat = buffer.numpy()
    for begin, p in zip(ends, pixels, strict=False):
        flat[begin : begin + p.nbytes] = p.reshape(-1).view(np.uint8)
    layout = [(begin, getattr(torch, p.dtype.name), p.shape) for begin, p in zip(ends, pixels, strict=False)]
    return buffer, layout


def _unpack(flat: Tensor, layout: _Layout) -> list[Tensor]:
    """The views of `flat` that `layout` describes."""
    sizes = (math.prod(shape) * dtype.itemsize for _, dtype, shape in layout)
    return [
        flat[begin : begin + size].view(dtype).view(shape)
        for (begin, dtype, shape), size in zip(layout, sizes, strict=True)
    ]


class _Piece(NamedTuple):
    """What a thread reads of a micro-batch: samples in NumPy, their positions and ids int64 [B]."""

    samples: list[Sample]
    positions: np.ndarray
    ids: np.ndarray
    replaced: tuple[Replaced, ...]

    def batch(self) -> Batch:
        """The same as tensors, which share the memory."""
        tensors = Batch.of(self.samples, torch.from_numpy(self.positions), torch.from_numpy(self.ids))
        return replace(tensors, replaced=self.replaced)


class Stream:
    """The micro-batches of one rank from `start` to `stop`, both in samples of the whole run (stop None: endless).

    Global step s covers positions [s·global_batch, (s+1)·global_batch); this rank's share of it arrives as
    global_batch / world_size / micro_batch micro-batches in rising position. Sources are mixed by `weights` (None: in
    proportion to their samples), `block_shards` shards are shuffled together. `workers` threads read ahead (0: the
    caller's own): pixels are stored as they are needed, so reading is mostly copying, which the threads of a process do
    at once without handing pixels from process to process. Raises DataError before reading anything when the numbers do
    not divide.
    """

    def __init__(
        self,
        catalog: Catalog,
        *,
        seed: int,
        lanes: int,
        block_shards: int,
        global_batch: int,
        micro_batch: int,
        weights: Mapping[str, float] | None = None,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        check_division(global_batch, lanes, rank, world_size, micro_batch)
        for name, value in (("start", start), ("stop", stop or 0)):
            if value % global_batch or value < 0:
                below = max(value // global_batch, 0) * global_batch
                raise DataError(
                    f"{name} = {value} samples is not a whole number of global batches of {global_batch}",
                    do=f"use {below} or {below + global_batch}",
                )
        self.reader = Reader(catalog)
        self.order = Mixture([(s.name, s.kept) for s in catalog.sources], weights, seed, lanes, block_shards)
        active = {s.name for s in catalog.sources if (s.samples if weights is None else weights[s.name])}
        self.reader.expect(active, lanes // world_size * block_shards)
        self._place = (global_batch, micro_batch, lanes, rank, world_size)
        self._remote = any(catalog.store(source).remote for source in catalog.sources)
        self._workers = workers
        each = world_size * micro_batch
        self._numbers = count(start // each) if stop is None else range(start // each, stop // each)

    def __iter__(self) -> Iterator[Batch]:
        return (piece.batch() for piece in in_order(self._piece, iter(self._numbers), self._workers))

    def micro_batch(self, number: int) -> Batch:
        """The number-th micro-batch of this rank since position 0. Raises DataError."""
        return self._piece(number).batch()

    def _piece(self, number: int) -> _Piece:
        global_batch, micro_batch, lanes, rank, world_size = self._place
        step, piece = divmod(number, global_batch // world_size // micro_batch)
        positions = rank_positions(step, global_batch, lanes, rank, world_size)
        positions = positions[piece * micro_batch : (piece + 1) * micro_batch]
        ids = self.order.sample_ids(positions)
        if self._remote:
            self.reader.prefetch([*self.order.shards_at(positions), *self.order.shards_ahead(positions)])
        replaced: list[Replaced] = []
        samples = [self._read(p, i, replaced) for p, i in zip(positions.tolist(), ids.tolist(), strict=True)]
        for each in replaced:
            ids[positions == each.position] = each.used
        return _Piece(samples, positions, ids, tuple(replaced))

    def _read(self, position: int, sample_id: int, replaced: list[Replaced]) -> Sample:
        """The sample, or the next valid one of its block; what was replaced is added to the list."""
        try:
            return self.reader[sample_id]
        except CorruptSample as error:
            reason = f"{error.what} ({error.where})"
        for other in self.order.neighbours(position).tolist():
            with suppress(CorruptSample):
                sample = self.reader[other]
                replaced.append(Replaced(position, sample_id, other, reason))
                return sample
        raise DataError(
            f"no sample of a whole block can be read; the first: {reason}",
            do="restore the shards or pack the source again, then resume",
        )
