"""Sources → shards: `pack` reads every chip once, shuffles inside each source, and writes tars, indexes and catalog.

Several processes read the files in chunks into a spool and write the shards from it (shards.spool, shards.tarfiles).
Both stay in `OUT/.pack-NAME` until the catalog is saved, so a packing that was killed goes on where it stopped. The
same input gives the same bytes, whatever the number of processes and of interruptions. A shard's name ends in a hash,
so nothing that a catalog points to is ever overwritten: the catalog is the last file written, and a stop before it
leaves the old catalog and its shards whole. What only the old catalog uses stays until the next packing into the folder
has ended, for a running job may read it.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from shards import catalog as catalogs
from shards import index as indexes
from shards import metadata, rejections, sources, spool, tarfiles
from shards.catalog import Amplitude, Catalog, Shard, Sidecar, Source
from shards.errors import DataError
from shards.rejections import REJECTED
from shards.schema import DTYPES, SPLITS, Record, Rejected, check_name, sha256_of
from shards.sources.base import Corpus, Item, Options, check_counts
from shards.sources.files import Files
from shards.statistics import Statistics
from shards.workers import Workers, locked

__all__ = ["REJECTED", "Options", "Record", "Rejected", "SourceSpec", "pack", "published"]

Progress = Callable[[str, int], None]
_CHANNELS = "read the same of all (GeoTIFF: --option bands=1), or pack each polarisation apart (--include)"


@dataclass(frozen=True)
class SourceSpec:
    """One source to pack: its name, where it is, and how it is read.

    `kind` (see shards.sources) explains `path`; `part` takes only that published part (None: everything). `split` None
    is that of the part, or pretrain. `amplitude` replaces the rule that statistics give: sources of one kind, path and
    dtype that are packed together share that of those outside split test. `incomplete` accepts other than the published
    counts. `codec` zstd stores compressed arrays. `records`, if given, replaces `kind` and `path`.
    """

    name: str
    path: Path | str = ""
    split: str | None = None
    kind: str = "folder"
    part: str | None = None
    options: Options = field(default_factory=Options)
    amplitude: Amplitude | None = None
    incomplete: bool = False
    codec: Literal["raw", "zstd"] = "raw"
    records: Iterable[Record | Rejected] | None = None


def published(kind: str, name: str, path: Path | str, parts: Sequence[str] = (), **how: Any) -> list[SourceSpec]:
    """One source NAME-PART for each published part of a corpus that is there (or of `parts`), NAME for what has none.

    `how`: further fields of SourceSpec. Raises DataError for an unknown part.
    """
    corpus = sources.corpus(kind)
    if unknown := set(parts) - set(corpus.parts):
        choices = ", ".join(corpus.parts) or "no parts"
        raise DataError(f"{kind} has no part {min(unknown)!r}", do=f"its parts: {choices}")
    if not parts and corpus.parts:
        items = corpus(Files(path), how.get("options")).items()
        found = {item.part for item in items if isinstance(item, Item)}
        parts = [part for part in dict.fromkeys([*corpus.parts, ""]) if part in found]
    if not parts:
        return [SourceSpec(name, path, kind=kind, **how)]
    return [SourceSpec(f"{name}-{part}" if part else name, path, kind=kind, part=part, **how) for part in parts]


@dataclass
class _Taken:
    """One source: what is to be read, then what was read (samples as rows of spool.PLACE, and their chunk)."""

    spec: SourceSpec
    split: str
    scratch: Path
    corpus: Corpus | None = None
    chunks: list[spool.Chunk] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    deviation: str = ""
    notes: list[str] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    places: list[np.ndarray] = field(default_factory=list)
    chunk_of: list[np.ndarray] = field(default_factory=list)
    statistics: Statistics | None = None

    @property
    def samples(self) -> int:
        return sum(map(len, self.places))

    @property
    def spools(self) -> Path:
        return self.scratch / "chunks"

    @property
    def tars(self) -> Path:
        return self.scratch / "shards"


def pack(
    out: Path | str,
    specs: Sequence[SourceSpec],
    *,
    shard_bytes: int = 64 << 20,
    on_error: Literal["stop", "skip"] = "stop",
    workers: int = 0,
    progress: Progress | None = None,
    fresh: bool = False,
) -> Catalog:
    """Pack sources into the catalog folder `out`; sources already there under other names stay.

    A shard is closed at the first sample that brings it to `shard_bytes`. With on_error "stop" any bad file raises one
    DataError that counts all of them and no catalog is written; with "skip" they are left out. Whatever was left out is
    listed in `rejected.jsonl` and counted in the catalog. `workers`: processes that read and write (0: this one; they
    are spawned, so a script needs its `if __name__ == "__main__"`). `progress(source, samples)` is called per chunk
    read. `fresh` forgets what an earlier packing that did not end has left.
    """
    _check(specs)
    if re.match(r"\w+:/", str(out)):  # a Path keeps one slash
        do = "pack into a folder, then: foundation shards copy FOLDER URL"
        raise DataError("a catalog cannot be packed into a URL", where=str(out), do=do)
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise DataError("the catalog folder is a file", where=str(out), do="name a folder, which is made if needed")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            old = catalogs.load(out) if (out / catalogs.FILE_NAME).exists() else catalogs.of(out, ())
            taken = [_plan(spec, out, fresh) for spec in specs]
            _list_once(taken)
            with Workers(workers, {one.spec.name: one.corpus for one in taken if one.corpus}) as pool:
                for one in taken:
                    _read(one, pool, progress)
                _refuse(taken, on_error)
                rules = _amplitudes(taken)
                new = [_source(one, _write(one, pool, out, shard_bytes), rules[one.spec.name]) for one in taken]
            kept = [s for s in old.sources if s.name not in {source.name for source in new}]
            return _publish(out, taken, old, catalogs.of(out, [*kept, *new]))
    except OSError as error:
        wrong_place = isinstance(error, NotADirectoryError | FileExistsError)
        do = "name a folder below folders" if wrong_place else "free space or fix access, and pack again"
        raise DataError(f"packing stopped: {error}", where=str(out), do=do) from error


def _check(specs: Sequence[SourceSpec]) -> None:
    for spec in specs:
        check_name(spec.name)
        if spec.split not in (None, *SPLITS):
            raise DataError(f"unknown split {spec.split!r}", where=spec.name, do=f"choose from {', '.join(SPLITS)}")
        if spec.codec not in indexes.CODECS:
            raise DataError(f"unknown codec {spec.codec!r}", where=spec.name, do="choose from raw, zstd")
        if (rule := spec.amplitude) and not (0 < rule.scale < math.inf and 0 <= rule.decibels < math.inf):
            what = f"an amplitude scale of {rule.scale} with {rule.decibels} decibels"
            raise DataError(what, where=spec.name, do="give a scale above 0, and decibels from 0 (0: linear)")
    if twice := [name for name, n in Counter(s.name for s in specs).items() if n > 1]:
        raise DataError(f"two sources are named {twice[0]!r}", do="give each source its own name")


def _plan(spec: SourceSpec, out: Path, fresh: bool) -> _Taken:
    """List a source and cut it into chunks."""
    taken = _Taken(spec, spec.split or "pretrain", out / f".pack-{spec.name}")
    if spec.records is None:
        kind = sources.corpus(spec.kind)
        if spec.part and spec.part not in kind.parts:
            choices = ", ".join(kind.parts) or "no parts"
            raise DataError(f"{spec.kind} has no part {spec.part!r}", where=spec.name, do=f"its parts: {choices}")
        part = kind.parts.get(spec.part or "")
        taken.split = spec.split or (part.split if part else "") or "pretrain"
        taken.corpus = kind(Files(spec.path), spec.options)
        found = list(taken.corpus.items())
        taken.rejected = [*taken.corpus.files.refused, *(f for f in found if isinstance(f, Rejected))]
        items = [f for f in found if isinstance(f, Item) and spec.part in (None, f.part)]
        try:
            check_counts(kind, items, str(spec.path))
        except DataError as error:
            if not spec.incomplete:
                raise
            taken.deviation = error.what
        taken.notes = taken.corpus.unmatched()
        taken.chunks = list(spool.cut(spec.name, spec.codec, taken.spools, taken.corpus, items))
    if fresh:
        shutil.rmtree(taken.scratch, ignore_errors=True)
    taken.spools.mkdir(parents=True, exist_ok=True)
    taken.tars.mkdir(exist_ok=True)
    wanted = {chunk.digest for chunk in taken.chunks}
    for path in taken.spools.iterdir():
        if path.stem not in wanted:  # of other files or options, or half written
            path.unlink()
    return taken


def _list_once(taken: list[_Taken]) -> None:
    """What a corpus does not explain belongs to none of its parts: list it with the first."""
    listed: set[tuple[str, str, str]] = set()
    for one in taken:
        keys = [(one.spec.kind, str(one.spec.path), rejected.key) for rejected in one.rejected]
        one.rejected = [r for key, r in zip(keys, one.rejected, strict=True) if key not in listed]
        listed.update(keys)


def _read(taken: _Taken, pool: Workers, progress: Progress | None) -> None:
    """Read what no earlier packing has read, and collect all of it in the order of the chunks."""
    for digest in _chunks(taken, pool):
        chunk = spool.spooled(taken.spools, digest)
        if chunk is None:
            raise DataError("a chunk that was just read is not there", where=str(taken.spools), do="pack again")
        _collect(taken, chunk)
        if progress:
            progress(taken.spec.name, taken.samples)


def _chunks(taken: _Taken, pool: Workers) -> Iterator[str]:
    """The digests of all chunks in order, each when it has been read."""
    if taken.spec.records is not None:
        empty = spool.Chunk(taken.spec.name, taken.spec.codec, taken.spools, "", ())
        records = iter(taken.spec.records)
        while group := list(islice(records, spool.CHUNK_RECORDS)):
            yield spool.write_chunk(empty, group)
        return
    missing = [chunk for chunk in taken.chunks if spool.spooled(taken.spools, chunk.digest) is None]
    waiting, results = {chunk.digest for chunk in missing}, pool.map(spool.read_chunk, missing)
    for chunk in taken.chunks:
        if chunk.digest in waiting:
            next(results)
        yield chunk.digest


def _collect(taken: _Taken, chunk: spool.Spooled) -> None:
    """Add a chunk; samples that have not the dtype and the number of channels of the source's first are rejected."""
    taken.rejected += chunk.rejected
    if taken.statistics is None and len(chunk.places):
        taken.statistics = Statistics(np.dtype(DTYPES[chunk.places["dtype"][0]]), int(chunk.places["channels"][0]))
    if taken.statistics is None:
        return
    name, channels = taken.statistics.dtype.name, taken.statistics.channels
    if (name, channels) in chunk.statistics:
        taken.statistics.merge(chunk.statistics[name, channels])
    same = (chunk.places["dtype"] == DTYPES.index(name)) & (chunk.places["channels"] == channels)
    if not same.all():
        with open(taken.spools / f"{chunk.digest}.spool", "rb") as file:
            for place in chunk.places[~same]:
                text = os.pread(file.fileno(), int(place["json"]), int(place["offset"] + place["stored"]))
                reason = f"{DTYPES[place['dtype']]} in a source of {name}: split the source"
                if DTYPES[place["dtype"]] == name:
                    reason = f"channels: {place['channels']} in a source of {channels}: {_CHANNELS}"
                taken.rejected.append(Rejected(json.loads(text)["from"], "bad", reason))
    taken.chunk_of.append(np.full(int(same.sum()), len(taken.digests)))
    taken.places.append(chunk.places[same])
    taken.digests.append(chunk.digest)


def _refuse(taken: list[_Taken], on_error: str) -> None:
    """Raise DataError for bad files (unless they are to be skipped) and for sources without a single sample."""
    if on_error == "stop":
        rejections.refuse_bad({one.spec.name: one.rejected for one in taken}, sum(one.samples for one in taken))
    for one in taken:
        if not one.samples:
            shutil.rmtree(one.scratch)
            kind = f"{one.corpus.kind} ({one.corpus.description})" if one.corpus else "records"
            raise rejections.no_image(one.spec.name, str(one.spec.path), kind, one.rejected, one.notes)


def _write(taken: _Taken, pool: Workers, out: Path, shard_bytes: int) -> list[Shard]:
    """Write the shards of one source in shuffled order, but those that an earlier packing has finished."""
    tasks = list(_tasks(taken, shard_bytes))
    done = [tarfiles.written(task, out) for task in tasks]
    kept = {Path(shard.name).stem for shard in done if shard} | {task.digest for task in tasks}
    for path in taken.tars.iterdir():
        if path.stem not in kept or path.suffix == ".part":
            path.unlink()
    for _ in pool.map(tarfiles.write_shard, [t for t, shard in zip(tasks, done, strict=True) if shard is None]):
        pass
    shards = [tarfiles.written(task, out) for task in tasks]
    if None in shards:
        raise DataError("a shard that was just written is not there", where=str(taken.tars), do="pack again")
    return [shard for shard in shards if shard]


def _tasks(taken: _Taken, shard_bytes: int) -> Iterator[tarfiles.ShardTask]:
    """Cut the shuffled samples into shards of about `shard_bytes`."""
    import torch  # not above: every process that packs would import it

    from shards.addressed import permutation

    assert taken.statistics is not None
    name, places, chunks = taken.spec.name, np.concatenate(taken.places), np.concatenate(taken.chunk_of)
    order = permutation(0, f"pack/{name}", torch.zeros(1, dtype=torch.int64), len(places))[0].numpy()
    ends = np.cumsum((places["stored"] + places["json"])[order].astype(np.int64))
    classes = tuple(taken.statistics.summary()["class_counts"])
    first = number = 0
    while first < len(order):
        reached = (ends[first - 1] if first else 0) + shard_bytes
        last = min(int(np.searchsorted(ends, reached)) + 1, len(order))
        rows = order[first:last]
        folders = (taken.spools, taken.tars)
        yield tarfiles.ShardTask.of(name, number, classes, folders, taken.digests, chunks[rows], places[rows], rows)
        first, number = last, number + 1


def _amplitudes(taken: list[_Taken]) -> dict[str, Amplitude]:
    """The rule of each source: parts of one corpus share that of the parts that are not tested on."""
    groups: dict[tuple[str, ...], list[_Taken]] = {}
    for one in taken:
        assert one.statistics is not None
        corpus = (one.spec.kind, str(one.spec.path)) if one.corpus else (one.spec.name,)
        groups.setdefault((*corpus, one.statistics.dtype.name), []).append(one)
    rules: dict[str, Amplitude] = {}
    for parts in groups.values():
        learnt = [one for one in parts if one.split != "test"] or parts
        merged = Statistics.merged([one.statistics for one in learnt if one.statistics])
        rule = merged.amplitude(sorted(one.spec.name for one in learnt) if len(parts) > 1 else ())
        rules |= {one.spec.name: one.spec.amplitude or rule for one in parts}
    return rules


def _source(taken: _Taken, shards: list[Shard], amplitude: Amplitude) -> Source:
    """The catalog's entry, and the metadata file under its final name in the scratch folder."""
    import pyarrow.parquet as pq

    assert taken.statistics is not None
    spec, counts = taken.spec, Counter(r.kind for r in taken.rejected)
    path = taken.tars / "metadata.parquet"
    metadata.write(path, (pq.read_table(tarfiles.piece_of(taken.tars, shard)) for shard in shards))
    sha256 = sha256_of(path)
    file = Sidecar(f"{spec.name}-{sha256[:8]}.parquet", path.stat().st_size, sha256)
    os.replace(path, taken.scratch / file.name)
    summary = {**taken.statistics.summary(), "rejected": {k: counts[k] for k in ("bad", "small", "flat", "other")}}
    if taken.deviation:
        summary["deviation"] = taken.deviation
    if taken.notes:
        summary["notes"] = taken.notes
    corpus = taken.corpus
    origin = {
        "kind": corpus.kind if corpus else "records",
        "url": corpus.url if corpus else "",
        "licence": corpus.licence if corpus else "",
        "part": spec.part,
        "codec": spec.codec,
    }
    dtype, classes = taken.statistics.dtype.name, tuple(summary["class_counts"])
    return Source(spec.name, taken.split, tuple(shards), dtype, classes, amplitude, summary, file, origin)


def _publish(out: Path, taken: list[_Taken], old: Catalog, catalog: Catalog) -> Catalog:
    """Move everything to its place, save the catalog, and only then remove what neither it nor the `old` one uses."""
    used: set[str] = set()
    for source in (*old.sources, *catalog.sources):
        tars = [Path(shard.name) for shard in source.shards]
        used |= {source.metadata.name, *(p.name for p in tars), *(indexes.path_of(p).name for p in tars)}
    for one in taken:
        for path in [*one.tars.iterdir(), *one.scratch.iterdir()]:
            if path.name in used:
                os.replace(path, out / path.name)
    rejections.write(out, {one.spec.name: one.rejected for one in taken})
    catalogs.save(catalog)
    names = "|".join(re.escape(source.name) for source in catalog.sources)
    ours = re.compile(rf"(?:{names})-(?:\d{{5,}}-[0-9a-f]{{8}}\.(?:tar|idx)|[0-9a-f]{{8}}\.parquet)")
    for path in out.iterdir():
        if ours.fullmatch(path.name) and path.name not in used:
            path.unlink()
    for one in taken:
        shutil.rmtree(one.scratch)
    return catalog
