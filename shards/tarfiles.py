"""Shards: tars written from spooled samples, each read back and compared before it gets its name."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from shards import index as indexes
from shards import metadata
from shards.catalog import Shard
from shards.errors import DataError
from shards.likeness import descriptor
from shards.schema import (
    NPY_MAGIC,
    VERSION,
    amplitude_of,
    canonical_json,
    content_hash,
    image_shape,
    sample_key,
    sha256_of,
)


@dataclass(frozen=True)
class ShardTask:
    """The samples of one shard: `places` (rows of spool.PLACE) in chunks `digests[chunks]`, with their numbers."""

    source: str
    number: int
    classes: tuple[str, ...]
    spools: Path
    folder: Path
    digests: tuple[str, ...]
    chunks: np.ndarray
    places: np.ndarray
    numbers: np.ndarray

    @classmethod
    def of(
        cls,
        source: str,
        number: int,
        classes: tuple[str, ...],
        folders: tuple[Path, Path],
        digests: Sequence[str],
        chunks: np.ndarray,
        places: np.ndarray,
        numbers: np.ndarray,
    ) -> ShardTask:
        """The task with only those of the chunks that it reads; `folders`: of the spools and of the shards."""
        used, chunks = np.unique(chunks, return_inverse=True)
        kept = tuple(digests[i] for i in used.tolist())
        return cls(source, number, classes, *folders, kept, chunks, places, numbers)

    @cached_property
    def digest(self) -> str:
        """Names everything that decides the shard."""
        facts = canonical_json([VERSION, self.source, self.number, self.classes, self.digests])
        arrays = (self.chunks.astype("<i8").tobytes(), self.places.tobytes(), self.numbers.astype("<i8").tobytes())
        return hashlib.sha256(b"".join([facts, *arrays])).hexdigest()[:32]


def write_shard(_: object, task: ShardTask) -> None:
    """Write the shard, its index and its piece of the metadata under temporary names, read back, compare, and rename.

    `DIGEST.json` comes last: what it names is whole. Raises DataError when what is read back is not what was read.
    """
    tar = task.folder / f"{task.digest}.tar"
    with open(tar, "wb") as file:
        _write_tar(file, task)
        file.flush()
        os.fsync(file.fileno())
    rows = indexes.build(tar, task.classes)
    table = _compared(tar, rows)
    index_sha256, sha256 = indexes.write(rows, tar), sha256_of(tar)
    # The index has a say in the name, so that no file of a catalog is ever replaced by one with other content.
    mark = hashlib.sha256(f"{sha256}{index_sha256}".encode()).hexdigest()[:8]
    final = task.folder / f"{task.source}-{task.number:05d}-{mark}.tar"
    index_bytes = indexes.path_of(tar).stat().st_size
    shard = Shard(final.name, len(rows), tar.stat().st_size, sha256, index_bytes, index_sha256)
    metadata.write(piece_of(task.folder, shard), [table])
    os.replace(indexes.path_of(tar), indexes.path_of(final))
    os.replace(tar, final)
    part = task.folder / f"{task.digest}.part"
    part.write_bytes(canonical_json(asdict(shard)))
    os.replace(part, task.folder / f"{task.digest}.json")


def piece_of(folder: Path, shard: Shard) -> Path:
    """The metadata of one shard, until they are joined to the file of the source."""
    return folder / Path(shard.name).with_suffix(".parquet")


def written(task: ShardTask, out: Path) -> Shard | None:
    """The shard of a task that was finished before, if it is still there: beside its record, or moved to `out`."""
    try:
        shard = Shard(**json.loads((task.folder / f"{task.digest}.json").read_bytes()))
        files = ((shard.name, shard.bytes), (indexes.path_of(Path(shard.name)).name, shard.index_bytes))
        for name, size in files:
            if not any(
                (folder / name).is_file() and (folder / name).stat().st_size == size for folder in (task.folder, out)
            ):
                return None
        return shard if piece_of(task.folder, shard).is_file() else None
    except (OSError, ValueError, TypeError):
        return None


def _write_tar(file: io.BufferedWriter, task: ShardTask) -> None:
    with tarfile.open(fileobj=file, mode="w:", format=tarfile.USTAR_FORMAT) as archive:
        for chunk, place, number in zip(task.chunks.tolist(), task.places, task.numbers.tolist(), strict=True):
            with open(task.spools / f"{task.digests[chunk]}.spool", "rb", buffering=0) as spool:
                array, text = int(place["stored"]), int(place["json"])
                data = os.pread(spool.fileno(), array + text, int(place["offset"]))
            suffix = ".npy" if data.startswith(NPY_MAGIC) else ".npy.zst"
            key = sample_key(task.source, number)
            for name, content in ((key + suffix, data[:array]), (key + ".json", data[array:])):
                member = tarfile.TarInfo(name)
                member.size, member.mode = len(content), 0o644
                archive.addfile(member, io.BytesIO(content))


def _compared(tar: Path, rows: np.ndarray) -> Any:
    """The metadata of a shard that was just written; DataError unless every content hash is that of the pixels."""
    import pyarrow as pa

    return pa.Table.from_pylist(list(_facts(tar, rows)), schema=metadata.schema())


def _facts(tar: Path, rows: np.ndarray) -> Iterator[Mapping[str, Any]]:
    with open(tar, "rb", buffering=0) as file:
        for row in rows:
            pixels = indexes.unpack(row, os.pread(file.fileno(), int(row["stored"]), int(row["offset"])))
            pixels = pixels[0] if len(pixels) == 1 else pixels
            meta = json.loads(os.pread(file.fileno(), int(row["meta_bytes"]), int(row["meta_offset"])))
            key = row["key"].decode()
            if content_hash(pixels) != meta["sha256"]:
                raise DataError(
                    f"sample {key} read back from the shard is not what was packed",
                    where=str(tar),
                    do="check disk and memory of this machine, then pack again from the start (fresh)",
                )
            height, width = image_shape(pixels)
            known = {name: meta[name] for name in ("class", "sha256", "from")}
            likeness = descriptor(amplitude_of(pixels))
            size = {"height": height, "width": width, "likeness": likeness}
            yield {"key": key, **known, **size, **metadata.column_values(meta)}
