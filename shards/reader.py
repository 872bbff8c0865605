"""Random access to the samples of a catalog: two reads at known offsets per sample, nothing held in memory.

Files are read with pread and never mapped: a shard that is deleted from a cache stays readable while it is open, one
that is cut off gives an error instead of killing the process, and memory does not grow with what was read.
"""

from __future__ import annotations

import logging
import os
import resource
import time
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from threading import RLock
from typing import Any, BinaryIO

import numpy as np

from shards import index as indexes
from shards.catalog import Catalog, Shard, Source
from shards.errors import DataError
from shards.schema import amplitude_of
from shards.store import Entry, Store

KEEP_OPEN = 256  # shards; each holds two file descriptors, and 1024 of them is a common limit
_OTHER_FILES = 512  # descriptors that are left to the rest of the process
_SWEEP = 60.0  # seconds from one look at what is open to the next
_renewed: set[tuple[str, Entry]] = set()  # shards that this process has already fetched once more
log = logging.getLogger(__name__)


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
    where: str  # path or URL, for messages


class Reader:
    """Random access to the samples of a catalog: `reader[sample_id]` → Sample; picklable, for any number of threads.

    Raises DataError at once where a local shard is missing or has another size than the catalog says, on the first use
    of a shard where its index disagrees with it, and CorruptSample where the checksum of a sample does. A shard of a
    URL is judged only after its cached copy was replaced, once per process.
    """

    def __init__(self, catalog: Catalog) -> None:
        catalog.check()
        self.catalog = catalog
        self._shards = [(source, i) for source in catalog.sources for i in range(len(source.shards))]
        self._starts = list(accumulate((n for source in catalog.sources for n in source.kept), initial=0))
        numbers = {name: i for i, name in enumerate(catalog.classes)}
        # One row per source: label inside the source → label in the catalog; the last entry answers for -1.
        self._labels = {s.name: np.array([*(numbers[c] for c in s.classes), -1], np.int64) for s in catalog.sources}
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._compared: dict[int, tuple[int, ...]] = {}  # which file was the packed index when it was compared
        self._stores: dict[str, Store] = {}
        self._locks: dict[int, AbstractContextManager[Any]] = {}  # of a shard, while a thread opens or renews it
        self._keep_open, self._at_once, self._expected = KEEP_OPEN, 0, tuple[Source, ...]()
        self._asked: set[int] = set()  # shards that were named to `prefetch` since the last sweep
        self._swept = time.monotonic()

    def expect(self, sources: Collection[str], shards: int) -> None:
        """Prepare for reading up to `shards` shards of each of these sources at a time: as many stay open, and a few.

        Raises this process's soft limit of open files when that takes it.
        """
        self._at_once, self._expected = shards, tuple(s for s in self.catalog.sources if s.name in sources)
        wanted = sum(min(shards, len(source.shards)) for source in self._expected) * 5 // 4
        fit = (_descriptors(2 * wanted + _OTHER_FILES) - _OTHER_FILES) // 2
        self._keep_open = max(KEEP_OPEN, min(wanted, fit))

    def advice(self, readers: int = 1) -> str:
        """A line for the user when the cache is too small for `readers` of this kind on a node; else nothing.

        Compares with the largest shards that `expect` can mean, and as many that are fetched ahead of them.
        """
        remote = [source for source in self._expected if self.catalog.store(source).remote]
        count = readers * self._at_once
        sizes = [sorted((shard.bytes for shard in source.shards), reverse=True) for source in remote]
        now, ahead = (sum(sum(each[: count * blocks]) for each in sizes) for blocks in (1, 2))
        limit = self.catalog.cache.limit_bytes if self.catalog.cache else ahead
        if ahead <= limit:
            return ""
        effect = "be fetched again and again" if now > limit else "often not be fetched ahead"
        return (
            f"the cache of {limit / 1e9:,.1f} GB is small for shards of {now / 1e9:,.1f} GB that are read at a time: "
            f"they will {effect}; {ahead / 1e9:,.1f} GB would do, or fewer shards in a block"
        )

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_compared": {}, "_stores": {}, "_locks": {}}

    def __getitem__(self, sample_id: int) -> Sample:
        """The sample with this number, 0 ≤ number < len."""
        opened, row, native = self._load(sample_id)
        source, rule = opened.source, opened.source.amplitude
        pixels = amplitude_of(native)
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
        return self._load(sample_id)[2]

    def meta(self, sample_id: int) -> bytes:
        """The JSON member of a sample, as it stands in the shard."""
        shard_id, number = self._locate(sample_id)
        opened = self._shard(shard_id)
        row = self._row_of(opened, number)
        return bytes(_read(opened, int(row["meta_offset"]), int(row["meta_bytes"])))

    def prefetch(self, shard_ids: Iterable[int]) -> None:
        """Begin to copy the shards of these ids here, in this order, unless they are open or local.

        Ids are those of `shards.order`. Meant to be called often.
        """
        shard_ids = list(shard_ids)
        self._asked.update(shard_ids)
        wanted: dict[str, list[Entry]] = {}
        for shard_id in shard_ids:
            if shard_id not in self._open and self._store(shard_id).remote:
                wanted.setdefault(self._shards[shard_id][0].root, []).extend(self._files(shard_id))
        for root, entries in wanted.items():
            self._stores[root].prefetch(entries)
        if time.monotonic() > self._swept + _SWEEP:
            self._sweep()

    def _sweep(self) -> None:
        """Tell the cache what is in use, and close what it has deleted and is not: that still occupies the disk."""
        for shard_id, opened in list(self._open.items()):
            if not self._store(shard_id).remote:
                continue
            if shard_id in self._asked:
                for descriptor in (opened.data.fileno(), opened.index.fileno()):
                    with suppress(OSError):  # another user's
                        os.utime(descriptor)
            elif not os.fstat(opened.data.fileno()).st_nlink:
                self._open.pop(shard_id, None)
        self._asked, self._swept = set(), time.monotonic()

    def _store(self, shard_id: int) -> Store:
        source = self._shards[shard_id][0]
        if source.root not in self._stores:  # one for all its sources: it holds the thread that prefetches
            self._stores.setdefault(source.root, self.catalog.store(source))
        return self._stores[source.root]

    def _files(self, shard_id: int) -> tuple[Entry, Entry]:
        """A shard and its index."""
        source, number = self._shards[shard_id]
        shard = source.shards[number]
        index = Entry(_index_name(shard.name), shard.index_bytes, shard.index_sha256)
        return Entry(shard.name, shard.bytes, shard.sha256), index

    def _locate(self, sample_id: int) -> tuple[int, int]:
        """The id of a sample's shard, and its number among those that a filter kept there."""
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of {len(self)}")
        shard_id = bisect_right(self._starts, sample_id) - 1
        return shard_id, sample_id - self._starts[shard_id]

    @staticmethod
    def _row_of(opened: _Open, number: int) -> np.void:
        return opened.index.row(number if opened.rows is None else int(opened.rows[number]))

    def _load(self, sample_id: int) -> tuple[_Open, np.void, np.ndarray]:
        shard_id, number = self._locate(sample_id)
        opened = self._shard(shard_id)
        try:
            row = self._row_of(opened, number)
            return opened, row, self._pixels(opened, row)
        except DataError:
            with self._lock(shard_id):
                seen = os.fstat(opened.data.fileno()), os.fstat(opened.index.fileno())
                # Unless another thread has renewed it in the meantime.
                if (self._open.get(shard_id) or opened) is opened and not self._renew(shard_id, *seen):
                    raise
                opened = self._shard(shard_id)
        row = self._row_of(opened, number)
        return opened, row, self._pixels(opened, row)

    def _lock(self, shard_id: int) -> AbstractContextManager[Any]:
        return self._locks.setdefault(shard_id, RLock())

    def _renew(self, shard_id: int, *seen: os.stat_result) -> bool:
        """Whether a shard that was found damaged is worth another try: its files, as `seen`, then left the cache."""
        store, files = self._store(shard_id), self._files(shard_id)
        if not store.remote or (store.root, files[0]) in _renewed:
            return False
        _renewed.add((store.root, files[0]))
        log.warning("damaged in the cache, fetched again: %s", store.where(files[0].name))
        self._open.pop(shard_id, None)
        self._compared.pop(shard_id, None)
        for file, stat in zip(files, seen, strict=True):
            store.drop(*file, stat)
        return True

    def _pixels(self, opened: _Open, row: np.void) -> np.ndarray:
        stored: bytes | bytearray = _read(opened, int(row["offset"]), int(row["stored"]))
        if zlib.crc32(stored) != row["crc"]:
            raise CorruptSample(
                f"sample {row['key'].decode()} is not what was packed: its checksum differs",
                where=opened.where,
                do="restore the file or pack the source again",
            )
        try:
            return indexes.unpack(row, stored)
        except DataError as error:
            what = f"sample {row['key'].decode()} cannot be unpacked: {error.what}"
            raise CorruptSample(what, where=opened.where, do=error.do) from error

    def _shard(self, shard_id: int) -> _Open:
        if opened := self._open.get(shard_id):
            with suppress(KeyError):  # another thread has just closed it
                self._open.move_to_end(shard_id)
            return opened
        with self._lock(shard_id):
            return self._open.get(shard_id) or self._opened(shard_id)

    def _opened(self, shard_id: int) -> _Open:
        source, number = self._shards[shard_id]
        shard, store = source.shards[number], self._store(shard_id)
        tar, entry = self._files(shard_id)
        # Of a URL both are held open as they come: the cache need not have room for the two at the same time.
        file = store.open(*entry) if store.remote else None
        path = Path(str(file.name)) if file else store.fetch(*entry)
        try:
            data = store.open(*tar)
        except OSError as error:
            raise DataError(
                f"the shard cannot be read: {error}", where=store.where(tar.name), do="restore the file"
            ) from error
        seen = [os.fstat(each.fileno()) for each in (data, file) if each]
        try:
            index = indexes.IndexFile(path, file)
            # The cache checks what arrives and notes uses in the time of change.
            identity = index.identity[:3] if store.remote else index.identity
            if self._compared.get(shard_id) != identity:
                indexes.compare(index, data.fileno(), shard, len(source.classes))
                self._compared[shard_id] = identity
        except DataError as error:
            if not store.remote:
                raise
            if self._renew(shard_id, *seen):
                return self._opened(shard_id)
            do = "load the catalog again; if that does not help, pack the source again"
            raise DataError(error.what, where=store.where(entry.name), do=do) from error
        rows = None if source.rows is None else source.rows[number]
        opened = self._open[shard_id] = _Open(source, shard, rows, data, index, store.where(tar.name))
        if len(self._open) > self._keep_open:
            self._open.popitem(last=False)  # the last reference: both files close
        return opened


@lru_cache(4096)
def _index_name(shard: str) -> str:
    return indexes.path_of(Path(shard)).name


def _descriptors(wanted: int) -> int:
    """How many files this process may have open, `wanted` if the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with suppress(OSError, ValueError):  # some systems have a limit above the one they name
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        return limit
    return soft


def _read(opened: _Open, offset: int, size: int) -> bytearray:
    """Bytes of a shard, in a buffer that an array may own and write to."""
    data = bytearray(size)
    found = os.preadv(opened.data.fileno(), [data], offset)
    if found < size:
        raise DataError(
            f"the shard was cut off while it was read: {offset + found} of {opened.shard.bytes} bytes",
            where=opened.where,
            do="restore the file or pack the source again, then resume",
        )
    return data
