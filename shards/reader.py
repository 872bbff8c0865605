"""Random access to the samples of a catalog: two reads at known offsets per sample, nothing held in memory.

Files are read with pread and never mapped: a shard that is deleted from a cache stays readable while it is open, one
that is cut off gives an error instead of killing the process, and memory does not grow with what was read.
"""

from __future__ import annotations

import os
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from shards import index as indexes
from shards.catalog import Catalog, Shard, Source
from shards.errors import DataError
from shards.schema import amplitude_of
from shards.store import Store

_OPEN_SHARDS = 256  # each holds two file descriptors, and 1024 of them is a common limit


class CorruptSample(DataError):
    """The stored bytes of one sample are not the packed ones; the samples around it can still be read."""


@dataclass(frozen=True)
class Sample:
    """One chip: amplitude [C, H, W] (uint8, uint16 or float32), its rule, label (-1 none), key and source."""

    pixels: np.ndarray
    scale: float
    decibels: float
    label: int
    key: str
    source: str


@dataclass(frozen=True)
class _Open:
    """A shard and its index, both open."""

    source: Source
    shard: Shard
    rows: np.ndarray | None  # what a filter kept
    data: BinaryIO
    index: indexes.IndexFile


class Reader:
    """Random access to the samples of a catalog: `reader[sample_id]` → Sample; picklable.

    Raises DataError at once where a local shard is missing or has another size than the catalog says, on the first use
    of a shard where its index disagrees with it, and CorruptSample where the checksum of a sample does.
    """

    def __init__(self, catalog: Catalog) -> None:
        catalog.check()
        self.catalog = catalog
        self._parts = [(source, i) for source in catalog.sources for i in range(len(source.shards))]
        self._starts = list(accumulate((n for source in catalog.sources for n in source.kept), initial=0))
        numbers = {name: i for i, name in enumerate(catalog.classes)}
        # One row per source: label inside the source → label in the catalog; the last entry answers for -1.
        self._labels = {s.name: np.array([*(numbers[c] for c in s.classes), -1], np.int64) for s in catalog.sources}
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._stores: dict[str, Store] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_stores": {}}

    def __getitem__(self, sample_id: int) -> Sample:
        """The sample with this number, 0 ≤ number < len."""
        opened, row = self._row(sample_id)
        source, rule = opened.source, opened.source.amplitude
        pixels = amplitude_of(self._pixels(opened, row))
        label = int(self._labels[source.name][row["label"]])
        return Sample(pixels, rule.scale, rule.decibels, label, row["key"].decode(), source.name)

    def valid(self, sample_id: int) -> Sample:
        """The sample, or the next one that is not corrupt: for pictures, where any sample will do."""
        for step in range(len(self)):
            with suppress(CorruptSample):
                return self[(sample_id + step) % len(self)]
        raise DataError("not a single sample can be read", where=self.catalog.root, do="pack the sources again")

    def native(self, sample_id: int) -> np.ndarray:
        """The pixels as they were packed: [C, H, W], complex64 and int16 pairs [C, H, W, 2] included."""
        return self._pixels(*self._row(sample_id))

    def meta(self, sample_id: int) -> bytes:
        """The JSON member of a sample, as it stands in the shard."""
        opened, row = self._row(sample_id)
        return bytes(_read(opened, int(row["meta_offset"]), int(row["meta_bytes"])))

    def labels(self) -> np.ndarray:
        """Labels of all samples, int64 [N], from the indexes alone."""
        found = []
        for part in range(len(self._parts)):
            opened = self._shard(part)
            rows = indexes.read(opened.index.path)["label"]
            found.append(self._labels[opened.source.name][rows if opened.rows is None else rows[opened.rows]])
        return np.concatenate(found)

    def prefetch(self, parts: Iterable[int]) -> None:
        """Begin to copy these shards here, unless they are open or local."""
        for part in parts:
            if part not in self._open and (store := self._store(part)).remote:
                store.prefetch(self._files(part))

    def _store(self, part: int) -> Store:
        source = self._parts[part][0]
        if source.root not in self._stores:  # one for all its sources: it holds the thread that prefetches
            self._stores[source.root] = self.catalog.store(source)
        return self._stores[source.root]

    def _files(self, part: int) -> list[tuple[str, int, str]]:
        """Name, bytes and sha256 of a shard and its index."""
        source, number = self._parts[part]
        shard = source.shards[number]
        index = indexes.path_of(Path(shard.name)).name
        return [(shard.name, shard.bytes, shard.sha256), (index, shard.index_bytes, shard.index_sha256)]

    def _row(self, sample_id: int) -> tuple[_Open, np.void]:
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of {len(self)}")
        part = bisect_right(self._starts, sample_id) - 1
        opened, row = self._shard(part), sample_id - self._starts[part]
        return opened, opened.index.row(row if opened.rows is None else int(opened.rows[row]))

    def _pixels(self, opened: _Open, row: np.void) -> np.ndarray:
        stored: bytes | bytearray = _read(opened, int(row["offset"]), int(row["stored"]))
        if zlib.crc32(stored) != row["crc"]:
            raise CorruptSample(
                f"sample {row['key'].decode()} is not what was packed: its checksum differs",
                where=str(opened.data.name),
                do="restore the file or pack the source again",
            )
        try:
            return indexes.unpack(row, stored)
        except DataError as error:
            what = f"sample {row['key'].decode()} cannot be unpacked: {error.what}"
            raise CorruptSample(what, where=str(opened.data.name), do=error.do) from error

    def _shard(self, part: int) -> _Open:
        if part in self._open:
            self._open.move_to_end(part)
            return self._open[part]
        source, number = self._parts[part]
        shard, store = source.shards[number], self._store(part)
        tar, index = self._files(part)
        try:
            data = store.open(*tar)  # a descriptor at once: another process may need the cache's room
        except OSError as error:
            where = f"{source.root}/{shard.name}"
            raise DataError(f"the shard cannot be read: {error}", where=where, do="restore the file") from error
        path = store.fetch(*index)
        try:
            opened_index = indexes.open_index(path, Path(data.name), shard, len(source.classes))
        except DataError:
            if store.remote and not (path.exists() and Path(data.name).exists()):
                return self._shard(part)  # deleted from the cache in between
            raise
        rows = None if source.rows is None else source.rows[number]
        opened = self._open[part] = _Open(source, shard, rows, data, opened_index)
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)  # the last reference: both files close
        return opened


def _read(opened: _Open, offset: int, size: int) -> bytearray:
    """Bytes of a shard, in a buffer that an array may own and write to."""
    data = bytearray(size)
    found = os.preadv(opened.data.fileno(), [data], offset)
    if found < size:
        raise DataError(
            f"the shard was cut off while it was read: {offset + found} of {opened.shard.bytes} bytes",
            where=str(opened.data.name),
            do="restore the file or pack the source again, then resume",
        )
    return data
