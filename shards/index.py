"""The sidecar index of a shard: where each sample lies, so that any sample is one read away.

`NAME.idx.npz` beside `NAME.tar` holds plain arrays. It can always be rebuilt from the shard with `build`.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from shards.catalog import Catalog, Shard
from shards.errors import DataError
from shards.schema import NPY_MAGIC


@dataclass(frozen=True)
class Index:
    """Arrays over the N samples of a shard.

    `offset` int64 [N]: first pixel byte; `shape` int64 [N, 2 or 3]; `dtype`, `key` str [N]; `label` int64 [N] in the
    source's class list (-1 none); `meta` int64 [N, 2]: begin and size of the JSON; `tar_bytes` int64 []: shard size.
    """

    offset: np.ndarray
    shape: np.ndarray
    dtype: np.ndarray
    label: np.ndarray
    key: np.ndarray
    meta: np.ndarray
    tar_bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.offset)

    def equals(self, other: Index) -> bool:
        """Whether all arrays agree."""
        return all(np.array_equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))


def path_of(tar: Path) -> Path:
    """Where the index of a shard lies."""
    return tar.with_suffix(".idx.npz")


def build(tar: Path, classes: Sequence[str]) -> Index:
    """Scan a shard and make its index; `classes` is the class list of its source. Raises DataError for a bad shard."""
    numbers = {name: i for i, name in enumerate(classes)}
    offset, shape, dtype, label, key, meta = [], [], [], [], [], []
    try:
        with open(tar, "rb") as raw:
            raw.seek(max(tar.stat().st_size - 1024, 0))
            if raw.read() != bytes(1024):  # tarfile takes a cut between two members for the end
                raise ValueError("its end is missing")
        with tarfile.open(tar, "r:") as archive:
            members = iter(archive)
            for npy in members:
                text = next(members, None)
                if text is None or npy.name.removesuffix(".npy") != text.name.removesuffix(".json"):
                    raise ValueError(f"{npy.name} has no JSON beside it")
                file = archive.extractfile(npy)
                data = archive.extractfile(text)
                assert file is not None
                assert data is not None
                head = io.BytesIO(file.read(1024))
                np.lib.format.read_magic(head)
                size, _, kind = np.lib.format.read_array_header_1_0(head)
                facts = json.loads(data.read())
                offset.append(npy.offset_data + head.tell())
                shape.append(size if len(size) == 3 else (1, *size))
                dtype.append(kind.name)
                label.append(-1 if facts["class"] is None else numbers[facts["class"]])
                key.append(npy.name.removesuffix(".npy"))
                meta.append((text.offset_data, text.size))
    except (OSError, tarfile.TarError, ValueError, KeyError, AssertionError) as error:
        raise DataError(f"the shard cannot be read: {error!r}", where=str(tar), do="pack the source again") from error
    integers = (np.array(v, np.int64) for v in (offset, shape, label, meta))
    o, s, lab, m = integers
    return Index(o, s, np.array(dtype), lab, np.array(key), m, np.array(tar.stat().st_size))


def write(index: Index, tar: Path) -> Path:
    """Write the index beside its shard, whole or not at all."""
    path = path_of(tar)
    part = path.with_name(f".{path.name}.part")
    with open(part, "wb") as file:
        np.savez(file, **{f.name: getattr(index, f.name) for f in fields(index)})
    os.replace(part, path)
    return path


def open_index(root: Path, shard: Shard) -> Index:
    """Read the index of a shard and check it against the shard and the catalog; raises DataError, says what to do."""
    tar = root / shard.name
    path = path_of(tar)
    rebuild = f"rebuild it: foundation shards verify {root} --rebuild"
    if not tar.is_file():
        raise DataError("missing shard", where=str(tar), do="restore the file or pack the source again")
    size = tar.stat().st_size
    if size < shard.bytes:
        raise DataError(
            f"the shard is cut off: {size} of {shard.bytes} bytes",
            where=str(tar),
            do="restore the file or pack the source again",
        )
    if not path.is_file():
        raise DataError("missing index", where=str(path), do=rebuild)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            index = Index(**{f.name: arrays[f.name] for f in fields(Index)})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"the index cannot be read: {error!r}", where=str(path), do=rebuild) from error
    if complaint := _disagreement(index, tar, size, shard):
        raise DataError(f"the index disagrees with its shard: {complaint}", where=str(path), do=rebuild)
    return index


def _disagreement(index: Index, tar: Path, size: int, shard: Shard) -> str:
    """What is wrong with an index, or nothing. Reads two headers, not the shard."""
    n = len(index)
    if n != shard.samples or any(len(getattr(index, f.name)) != n for f in fields(index) if f.name != "tar_bytes"):
        return f"{n} samples, the catalog says {shard.samples}"
    if int(index.tar_bytes) != size:
        return f"made for {int(index.tar_bytes)} bytes, the shard has {size}"
    width = np.array([np.dtype(str(d)).itemsize for d in index.dtype], np.int64)
    if (index.shape < 1).any() or (index.offset < 512).any() or (index.meta < 0).any():
        return "an offset or a shape is out of range"
    if (index.offset + index.shape.prod(axis=1) * width > size).any() or (index.meta.sum(axis=1) > size).any():
        return "a sample lies beyond the end"
    with open(tar, "rb") as file:
        for row in (0, n - 1):
            file.seek(max(int(index.offset[row]) - 128, 0))
            head = file.read(128)
            if not head.startswith(NPY_MAGIC):
                return f"no array at the place of {index.key[row]}"
    return ""


def rebuild(catalog: Catalog) -> int:
    """Write the indexes of all shards of a catalog anew, from the shards alone; returns how many."""
    catalog.check()
    parts = [(catalog.root / shard.name, source.classes) for source in catalog.sources for shard in source.shards]
    for tar, classes in parts:
        write(build(tar, classes), tar)
    return len(parts)
