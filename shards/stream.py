"""Shards → micro-batches, in an order that is a pure function of (catalog, seed, position).

The loader works on micro-batch numbers, so neither the number of workers nor the moment of a restart can change what a
batch holds; a seek costs nothing because nothing has to be replayed.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from shards.catalog import Catalog
from shards.errors import DataError
from shards.order import Order, check_division, rank_positions
from shards.reader import Reader, Sample

__all__ = ["Batch", "Reader", "Sample", "Stream", "explained_deaths"]


@dataclass(frozen=True)
class Batch:
    """Chips of different sizes and dtypes, each with its position in the run.

    `pixels` are native-dtype tensors [C, H, W]; `scale` is float32 [B], the pixel value that becomes 1; `label`,
    `position` and `sample_id` are int64 [B] (label -1: none).
    """

    pixels: list[Tensor]
    scale: Tensor
    label: Tensor
    position: Tensor
    sample_id: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`; the pixels travel as one buffer."""
        flat, layout = _pack(self.pixels)
        if torch.device(device).type == "cuda" and flat.device.type == "cpu":
            flat = flat.pin_memory()
        rest = {name: getattr(self, name).to(device) for name in ("scale", "label", "position", "sample_id")}
        return replace(self, pixels=_unpack(flat.to(device, non_blocking=True), layout), **rest)


_Layout = list[tuple[int, torch.dtype, tuple[int, ...]]]


def _pack(pixels: list[Tensor]) -> tuple[Tensor, _Layout]:
    """Tensors of any shape and dtype → one uint8 buffer and where each lies in it, 16-byte aligned."""
    ends = list(accumulate((-(-p.nbytes // 16) * 16 for p in pixels), initial=0))
    flat = torch.zeros(ends[-1], dtype=torch.uint8, device=pixels[0].device if pixels else None)
    for begin, p in zip(ends, pixels, strict=False):
        flat[begin : begin + p.nbytes] = p.contiguous().reshape(-1).view(torch.uint8)
    return flat, [(begin, p.dtype, tuple(p.shape)) for begin, p in zip(ends, pixels, strict=False)]


def _unpack(flat: Tensor, layout: _Layout) -> list[Tensor]:
    """The views of `flat` that `layout` describes."""
    sizes = (int(np.prod(shape)) * dtype.itemsize for _, dtype, shape in layout)
    return [
        flat[begin : begin + size].view(dtype).view(shape)
        for (begin, dtype, shape), size in zip(layout, sizes, strict=True)
    ]


# What crosses the process border: one pixel buffer, its layout, and int64 [B, 3] of label, position, sample id.
# One tensor per chip would cost one file descriptor per chip.
_Parcel = tuple[Tensor, _Layout, Tensor, Tensor]


class _MicroBatches(Dataset[_Parcel | DataError]):
    """Micro-batch number → its parcel. A DataError is returned, not raised, so that its message stays readable."""

    def __init__(self, reader: Reader, order: Order, place: tuple[int, int, int, int, int]) -> None:
        self.reader, self.order, self.place = reader, order, place

    def __getitem__(self, number: int) -> _Parcel | DataError:
        global_batch, micro_batch, lanes, rank, world_size = self.place
        step, piece = divmod(number, global_batch // world_size // micro_batch)
        positions = rank_positions(step, global_batch, lanes, rank, world_size)
        positions = positions[piece * micro_batch : (piece + 1) * micro_batch]
        ids = self.order.sample_ids(positions)
        try:
            samples = [self.reader[i] for i in ids.tolist()]
        except DataError as error:
            return error
        flat, layout = _pack([torch.from_numpy(s.pixels) for s in samples])
        scale = torch.tensor([s.scale for s in samples], dtype=torch.float32)
        numbers = np.stack([np.array([s.label for s in samples], np.int64), positions, ids], axis=1)
        return flat, layout, scale, torch.from_numpy(numbers)


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
    global_batch / world_size / micro_batch micro-batches in rising position. `block_shards` shards are shuffled
    together. Raises DataError before reading anything when the numbers do not divide.
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
        self.order = Order([s.samples for source in catalog.sources for s in source.shards], seed, lanes, block_shards)
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
            flat, layout, scale, numbers = parcel
            label, position, sample_id = numbers.unbind(1)
            yield Batch(_unpack(flat, layout), scale, label, position, sample_id)
