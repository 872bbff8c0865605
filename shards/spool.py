"""Chunks of a source, read in parallel into files that survive a kill: pixels and JSON of each sample, as stored later.

A chunk is named by a digest of everything that decides its content, so a file of that name is that chunk, whoever
wrote it and whenever. It has `DIGEST.spool` (samples back to back) and, written last, `DIGEST.json` (where they lie).
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import DataError
from shards.formats import check
from shards.index import MAX_JSON, MAX_PIXELS
from shards.metadata import column_values
from shards.schema import DTYPES, VERSION, Record, Rejected, canonical_json, content_hash, npy_bytes, sha256_of
from shards.sources.base import Corpus, Item
from shards.sources.files import Files
from shards.statistics import Statistics

CHUNK_ITEMS, CHUNK_BYTES, CHUNK_RECORDS = 256, 16 << 20, 64
LEVEL = 3  # of zstd
# Where a sample lies in its spool: the array, then its JSON; its dtype's place in DTYPES, and its channels.
PLACE = np.dtype([("offset", "<u8"), ("stored", "<u8"), ("json", "<u4"), ("dtype", "u1"), ("channels", "u1")])


@dataclass(frozen=True)
class Chunk:
    """Some items of a source and the digest that names what they become."""

    source: str
    codec: str
    folder: Path
    digest: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Spooled:
    """A chunk that was read: samples as rows of PLACE, what was rejected, and statistics by dtype and channels."""

    digest: str
    places: np.ndarray
    rejected: tuple[Rejected, ...]
    statistics: Mapping[tuple[str, int], Statistics]


def cut(source: str, codec: str, folder: Path, corpus: Corpus, items: Iterable[Item]) -> Iterator[Chunk]:
    """Cut items into chunks. A cut hangs on the name of an item, so that removing one item moves no other cut."""
    options = asdict(replace(corpus.options, include=(), exclude=(), extra=dict(corpus.options.extra)))
    how = [VERSION, source, codec, corpus.kind, dict(corpus.columns), options, corpus.files.root]
    group: list[Item] = []
    size = 0
    for item in items:
        group.append(item)
        size += corpus.files.size(item.name)
        last = zlib.crc32(item.name.encode(errors="surrogateescape")) % (CHUNK_ITEMS // 2) == 0
        if last or len(group) >= CHUNK_ITEMS or size >= CHUNK_BYTES:
            yield Chunk(source, codec, folder, _digest(how, corpus.files, group), tuple(group))
            group, size = [], 0
    if group:
        yield Chunk(source, codec, folder, _digest(how, corpus.files, group), tuple(group))


def _digest(how: Sequence[Any], files: Files, items: Sequence[Item]) -> str:
    facts = []
    for item in items:
        states = [(name, files.size(name), files.stamp(name)) for name in (item.name, *item.reads)]
        facts.append([item.part, item.label, dict(item.meta), states])
    return hashlib.sha256(json.dumps([*how, facts], sort_keys=True, default=repr).encode()).hexdigest()[:32]


def read_chunk(corpora: Mapping[str, Corpus], chunk: Chunk) -> None:
    """Read the items of a chunk and write its two files."""
    corpus = corpora[chunk.source]
    write_chunk(chunk, (record for item in chunk.items for record in corpus.load(item)))


def write_chunk(chunk: Chunk, records: Iterable[Record | Rejected]) -> str:
    """Write the files of a chunk, the JSON last; returns its digest, taken from the content where it has none."""
    places: list[tuple[int, int, int, int, int]] = []
    rejected: list[Rejected] = []
    statistics: dict[tuple[str, int], Statistics] = {}
    part = chunk.folder / f"{os.getpid()}.part"
    with open(part, "wb") as file:
        for record in records:
            if isinstance(record, Record):
                try:
                    pixels, meta = _prepared(record, chunk.source)
                except DataError as error:
                    record = Rejected(record.key, "bad", error.what)
            if isinstance(record, Rejected):
                rejected.append(record)
                continue
            name, channels = pixels.dtype.name, channels_of(pixels)
            statistics.setdefault((name, channels), Statistics(pixels.dtype, channels)).add(pixels, record.label)
            data = _stored(pixels, chunk.codec)
            places.append((file.tell(), len(data), len(meta), DTYPES.index(name), channels))
            file.write(data)
            file.write(meta)
        file.flush()
        os.fsync(file.fileno())
    digest = chunk.digest or sha256_of(part)[:32]
    os.replace(part, chunk.folder / f"{digest}.spool")
    value = {
        "places": places,
        "rejected": [[r.key, r.kind, r.reason] for r in rejected],
        "statistics": [s.to_json() for s in statistics.values()],
    }
    part.write_text(json.dumps(value))
    os.replace(part, chunk.folder / f"{digest}.json")
    return digest


def _prepared(record: Record, source: str) -> tuple[np.ndarray, bytes]:
    """Pixels as they are stored ([H, W] when there is one channel) and the JSON; DataError when it is no sample."""
    check(record.pixels, record.key)
    pixels = np.ascontiguousarray(record.pixels, record.pixels.dtype.newbyteorder("="))
    if len(pixels) == 1 and pixels.ndim > (3 if pixels.dtype == np.int16 else 2):
        pixels = pixels[0]
    if pixels.nbytes > MAX_PIXELS:
        raise DataError(f"{pixels.nbytes:,} bytes of pixels", where=record.key, do="cut it into tiles")
    facts = {"source": source, "class": record.label, "sha256": content_hash(pixels), "from": record.key}
    try:
        meta = canonical_json({**record.meta, **facts})
        column_values(record.meta)
    except (TypeError, ValueError) as error:
        what, do = f"its metadata cannot be stored: {error}", "keep text, numbers and lists of them in its metadata"
        raise DataError(what, where=record.key, do=do) from error
    if len(meta) > MAX_JSON:
        what = f"{len(meta):,} bytes of metadata, at most {MAX_JSON:,} are stored"
        raise DataError(what, where=record.key, do="leave out what belongs to the image and not to its description")
    return pixels, meta


def channels_of(pixels: np.ndarray) -> int:
    """Number of channels of pixels as they are stored."""
    return len(pixels) if pixels.ndim > (3 if pixels.dtype == np.int16 else 2) else 1


def _stored(pixels: np.ndarray, codec: str) -> bytes:
    """The tar member of an array."""
    data = npy_bytes(pixels)
    if codec == "raw":
        return data
    import zstandard

    return zstandard.ZstdCompressor(level=LEVEL).compress(data)


def spooled(folder: Path, digest: str) -> Spooled | None:
    """A chunk that was read before, if it was and is whole."""
    try:
        value = json.loads((folder / f"{digest}.json").read_bytes())
        places = np.array([tuple(place) for place in value["places"]], PLACE)
        end = int(places["offset"][-1] + places["stored"][-1] + places["json"][-1]) if len(places) else 0
        if (folder / f"{digest}.spool").stat().st_size != end:
            return None
        statistics = {(s["dtype"], s["channels"]): Statistics.from_json(s) for s in value["statistics"]}
        return Spooled(digest, places, tuple(Rejected(*r) for r in value["rejected"]), statistics)
    except (OSError, ValueError, KeyError, TypeError):
        return None
