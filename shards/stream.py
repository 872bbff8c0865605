"""Shards → micro-batches, in an order that is a pure function of (catalog, seed, position).

The loader works on micro-batch numbers, so neither the number of workers nor the moment of a restart can change what a
batch holds; a seek costs nothing because nothing has to be replayed.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import accumulate, count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from shards.catalog import Catalog
from shards.errors import DataError
from shards.order import Mixture, check_division, rank_positions
from shards.reader import CorruptSample, Reader, Sample

__all__ = ["Batch", "Reader", "Replaced", "Sample", "Stream", "explained_deaths"]


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
        flat, layout = _pack([p.cpu().numpy() for p in self.pixels])
        if torch.device(device).type == "cuda":
            flat = flat.pin_memory()
        tensors = ("scale", "decibels", "label", "position", "sample_id")
        rest = {name: getattr(self, name).to(device) for name in tensors}
        return replace(self, pixels=_unpack(flat.to(device, non_blocking=True), layout), **rest)

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


_Layout = list[tuple[int, torch.dtype, tuple[int, ...]]]


def _pack(pixels: list[np.ndarray]) -> tuple[Tensor, _Layout]:
    """Arrays of any shape and dtype → one uint8 buffer and where each lies in it, 16-byte aligned."""
    ends = list(accumulate((-(-p.nbytes // 16) * 16 for p in pixels), initial=0))
    flat = np.empty(ends[-1], np.uint8)
    for begin, p in zip(ends, pixels, strict=False):
        flat[begin : begin + p.nbytes] = p.reshape(-1).view(np.uint8)
    layout = [(begin, getattr(torch, p.dtype.name), p.shape) for begin, p in zip(ends, pixels, strict=False)]
    return torch.from_numpy(flat), layout


def _unpack(flat: Tensor, layout: _Layout) -> list[Tensor]:
    """The views of `flat` that `layout` describes."""
    sizes = (math.prod(shape) * dtype.itemsize for _, dtype, shape in layout)
    return [
        flat[begin : begin + size].view(dtype).view(shape)
        for (begin, dtype, shape), size in zip(layout, sizes, strict=True)
    ]


class _Parcel(NamedTuple):
    """What crosses the process border: one pixel buffer and its layout, for one tensor a chip would cost a file
    descriptor a chip; fp32 [B, 2] of scale and decibels; int64 [B, 3] of label, position and sample id."""

    flat: Tensor
    layout: _Layout
    rules: Tensor
    numbers: Tensor
    replaced: tuple[Replaced, ...]

    def batch(self) -> Batch:
        """The batch that was packed."""
        scale, decibels = self.rules.unbind(1)
        label, position, sample_id = self.numbers.unbind(1)
        pixels = _unpack(self.flat, self.layout)
        return Batch(pixels, scale, decibels, label, position, sample_id, self.replaced)


class _MicroBatches(Dataset[_Parcel | DataError]):
    """Micro-batch number → its parcel. A DataError is returned, not raised, so that its message stays readable."""

    def __init__(self, reader: Reader, order: Mixture, place: tuple[int, int, int, int, int]) -> None:
        self.reader, self.order, self.place = reader, order, place
        self.remote = any(reader.catalog.store(source).remote for source in reader.catalog.sources)

    def __getitem__(self, number: int) -> _Parcel | DataError:
        global_batch, micro_batch, lanes, rank, world_size = self.place
        step, piece = divmod(number, global_batch // world_size // micro_batch)
        positions = rank_positions(step, global_batch, lanes, rank, world_size)
        positions = positions[piece * micro_batch : (piece + 1) * micro_batch]
        ids = self.order.sample_ids(positions)
        replaced: list[Replaced] = []
        try:
            if self.remote:
                self.reader.prefetch([*self.order.shards_at(positions), *self.order.shards_ahead(positions)])
            samples = [self._read(p, i, replaced) for p, i in zip(positions.tolist(), ids.tolist(), strict=True)]
        except DataError as error:
            return error
        used = {r.position: r.used for r in replaced}
        flat, layout = _pack([s.pixels for s in samples])
        rules = np.array([(s.scale, s.decibels) for s in samples], np.float32)
        facts = [
            (s.label, p, used.get(p, i)) for s, p, i in zip(samples, positions.tolist(), ids.tolist(), strict=True)
        ]
        numbers = np.array(facts, np.int64)
        return _Parcel(flat, layout, torch.from_numpy(rules), torch.from_numpy(numbers), tuple(replaced))

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


class _Numbers(Sampler[int]):
    """Micro-batch numbers from `start` to `stop`, or without end."""

    def __init__(self, start: int, stop: int | None) -> None:
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[int]:
        return iter(count(self.start) if self.stop is None else range(self.start, self.stop))


def _same(value: Any) -> Any:
    return value


@contextmanager
def explained_deaths() -> Iterator[None]:
    """Around everything that consumes a Stream: torch reports a killed loader process from wherever the caller is."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a loader process ended unexpectedly: {error}",
            do="this is mostly a lack of memory: lower data.workers or give the job more (also /dev/shm), then resume",
        ) from error


def _worker_signals(_: int) -> None:
    """A worker must outlive the handlers of the run: the main process alone decides how a run stops."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Stream:
    """The micro-batches of one rank from `start` to `stop`, both in samples of the whole run (stop None: endless).

    Global step s covers positions [s·global_batch, (s+1)·global_batch); this rank's share of it arrives as
    global_batch / world_size / micro_batch micro-batches in rising position. Sources are mixed by `weights` (None: in
    proportion to their samples), `block_shards` shards are shuffled together. Raises DataError before reading anything
    when the numbers do not divide.
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
        self._dataset = _MicroBatches(self.reader, self.order, (global_batch, micro_batch, lanes, rank, world_size))
        self._workers = workers
        each = world_size * micro_batch
        self._numbers = _Numbers(start // each, None if stop is None else stop // each)

    def __iter__(self) -> Iterator[Batch]:
        loader = DataLoader(
            self._dataset,
            batch_size=None,
            sampler=self._numbers,
            num_workers=self._workers,
            collate_fn=_same,
            worker_init_fn=_worker_signals,
            generator=torch.Generator(),  # else the loader draws its base seed from the global generator
        )
        for parcel in loader:
            if isinstance(parcel, DataError):
                raise parcel
            yield parcel.batch()
