"""Random access to the samples of a catalog, through memory maps that every process opens for itself."""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from shards.catalog import Catalog
from shards.errors import DataError
from shards.index import Index, open_index

_OPEN_SHARDS = 256  # a map holds a file descriptor, and 1024 of them is a common limit


@dataclass(frozen=True)
class Sample:
    """One chip: pixels [C, H, W] in the native dtype, amplitude scale, label (-1 none), key and source."""

    pixels: np.ndarray
    scale: float
    label: int
    key: str
    source: str


class Reader:
    """Random access to the samples of a catalog: `reader[sample_id]` → Sample; picklable.

    Raises DataError at once where a shard is missing or has another size than the catalog says, and on the first use
    of a shard where its index disagrees with it.
    """

    def __init__(self, catalog: Catalog) -> None:
        catalog.check()
        self.catalog = catalog
        self._parts = [(source, shard) for source in catalog.sources for shard in source.shards]
        self._starts = list(accumulate((shard.samples for _, shard in self._parts), initial=0))
        numbers = {name: i for i, name in enumerate(catalog.classes)}
        # One row per source: label inside the source → label in the catalog; the last entry answers for -1.
        self._labels = {s.name: np.array([*(numbers[c] for c in s.classes), -1], np.int64) for s in catalog.sources}
        self._open: OrderedDict[int, tuple[mmap.mmap, Index]] = OrderedDict()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __getitem__(self, sample_id: int) -> Sample:
        """The sample with this number, 0 ≤ number < len."""
        part, row = self._locate(sample_id)
        source = self._parts[part][0]
        data, index = self._shard(part)
        shape, dtype = tuple(index.shape[row].tolist()), np.dtype(str(index.dtype[row]))
        view = np.frombuffer(data, dtype, count=int(np.prod(shape)), offset=int(index.offset[row]))
        label = int(self._labels[source.name][index.label[row]])
        return Sample(view.reshape(shape).copy(), source.amplitude.scale, label, str(index.key[row]), source.name)

    def meta(self, sample_id: int) -> bytes:
        """The JSON member of a sample, as it stands in the shard."""
        part, row = self._locate(sample_id)
        data, index = self._shard(part)
        begin, size = index.meta[row].tolist()
        return data[begin : begin + size]

    def labels(self) -> np.ndarray:
        """Labels of all samples, int64 [N], from the indexes alone."""
        parts = ((s, open_index(self.catalog.root, shard)) for s, shard in self._parts)
        return np.concatenate([self._labels[s.name][index.label] for s, index in parts])

    def _locate(self, sample_id: int) -> tuple[int, int]:
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of {len(self)}")
        part = bisect_right(self._starts, sample_id) - 1
        return part, sample_id - self._starts[part]

    def _shard(self, part: int) -> tuple[mmap.mmap, Index]:
        shard = self._parts[part][1]
        if part in self._open:
            self._open.move_to_end(part)
            if (size := self._open[part][0].size()) < shard.bytes:  # to read past the end of a map kills the process
                raise DataError(
                    f"the shard was cut off while it was read: {size} of {shard.bytes} bytes",
                    where=str(self.catalog.root / shard.name),
                    do="restore the file or pack the source again, then resume",
                )
            return self._open[part]
        path = self.catalog.root / shard.name
        try:
            index = open_index(self.catalog.root, shard)
            with open(path, "rb") as file:
                opened = (mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), index)
        except OSError as error:
            what = "missing shard" if isinstance(error, FileNotFoundError) else f"the shard cannot be read: {error}"
            raise DataError(what, where=str(path), do="restore the file or pack the source again") from error
        self._open[part] = opened
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)
        return opened
