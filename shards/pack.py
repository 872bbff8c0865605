"""Sources → shards: `pack` reads every chip once, shuffles inside each source, and writes tars, indexes and catalog.

The same input gives the same bytes. A shard's name ends in its hash, so nothing that a catalog points to is ever
overwritten: the catalog is the last file written, and a stop before it leaves the old catalog and its shards whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch

from shards import catalog as catalogs
from shards import index as indexes
from shards.addressed import permutation
from shards.catalog import Catalog, Shard, Source
from shards.errors import DataError
from shards.formats import check
from shards.schema import (
    SPLITS,
    Record,
    Rejected,
    canonical_json,
    check_name,
    content_hash,
    npy_bytes,
    sample_key,
)
from shards.sources import folder
from shards.statistics import Statistics

__all__ = ["REJECTED", "Record", "Rejected", "SourceSpec", "pack"]

REJECTED = "rejected.jsonl"
Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class SourceSpec:
    """One source to pack: its name, where it is, its split, and how it is read (see shards.sources.folder.read).

    `records`, when given, replaces reading from `path`.
    """

    name: str
    path: Path | str = ""
    split: str = "pretrain"
    labels: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    tile: int | None = None
    min_std: float = 0.0
    min_side: int = 0
    records: Iterable[Record | Rejected] | None = None

    def read(self) -> Iterable[Record | Rejected]:
        """The records of this source, and what it rejects."""
        if self.records is not None:
            return self.records
        options = {k: getattr(self, k) for k in ("labels", "include", "exclude", "tile", "min_std", "min_side")}
        return folder.read(Path(self.path), **options)


@dataclass
class _Taken:
    """What was read from one source: pixels in the spool file, the rest here."""

    spec: SourceSpec
    spool: BinaryIO
    places: list[tuple[int, int]] = field(default_factory=list)  # offset and length of a .npy in the spool
    metas: list[bytes] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    statistics: Statistics | None = None


def pack(
    out: Path | str,
    sources: Sequence[SourceSpec],
    shard_bytes: int = 64 << 20,
    on_error: Literal["stop", "skip"] = "stop",
    progress: Progress | None = None,
) -> Catalog:
    """Pack `sources` into the catalog folder `out`; sources already there under other names stay.

    A shard is closed at the first sample that brings it to `shard_bytes`. With on_error "stop" any bad file raises one
    DataError that counts all of them and nothing is written; with "skip" they are left out. Whatever was left out
    is listed in `rejected.jsonl` and counted in the catalog. `progress(source, samples)` is called per sample.
    """
    out = Path(out)
    for spec in sources:
        check_name(spec.name)
        if spec.split not in SPLITS:
            raise DataError(f"unknown split {spec.split!r}", where=spec.name, do=f"choose from {', '.join(SPLITS)}")
    if twice := [name for name, n in Counter(s.name for s in sources).items() if n > 1]:
        raise DataError(f"two sources are named {twice[0]!r}", do="give each source its own name")
    old = catalogs.load(out) if (out / catalogs.FILE_NAME).exists() else catalogs.of(out, ())
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pack-", dir=out) as scratch:
            taken = [_take(spec, Path(scratch), progress) for spec in sources]
            _refuse(taken, on_error)
            new = [_write_source(one, out, Path(scratch), shard_bytes) for one in taken]
            for one in taken:
                one.spool.close()
        names = {source.name for source in new}
        merged = catalogs.of(out, [*(s for s in old.sources if s.name not in names), *new])
        _write_rejected(out, taken)
        catalogs.save(merged)
        _remove_unused(old, merged)
    except OSError as error:
        raise DataError(
            f"packing stopped: {error}", where=str(out), do="free space or fix access, and pack again"
        ) from error
    return merged


def _take(spec: SourceSpec, scratch: Path, progress: Progress | None) -> _Taken:
    """Read a whole source into a spool file, so that it can be shuffled without holding it in memory."""
    taken = _Taken(spec, open(scratch / f"{spec.name}.spool", "w+b"))  # noqa: SIM115 - closed by pack, deleted with scratch
    for item in spec.read():
        problem = item if isinstance(item, Rejected) else _problem(item, taken.statistics)
        if problem:
            taken.rejected.append(problem)
            continue
        assert isinstance(item, Record)
        taken.statistics = taken.statistics or Statistics(item.pixels.dtype)
        taken.statistics.add(np.ascontiguousarray(item.pixels), item.label)
        data = npy_bytes(item.pixels)
        taken.places.append((taken.spool.tell(), len(data)))
        taken.spool.write(data)
        facts = {"source": spec.name, "class": item.label, "sha256": content_hash(item.pixels), "from": item.key}
        taken.metas.append(canonical_json({**item.meta, **facts}))
        if progress:
            progress(spec.name, len(taken.places))
    return taken


def _problem(record: Record, statistics: Statistics | None) -> Rejected | None:
    """Why a record cannot join its source, if so."""
    try:
        check(record.pixels, record.key)
    except DataError as error:
        return Rejected(record.key, "bad", error.what)
    if statistics and record.pixels.dtype != statistics.dtype:
        return Rejected(record.key, "bad", f"{record.pixels.dtype} in a source of {statistics.dtype}: split the source")
    return None


def _refuse(taken: list[_Taken], on_error: str) -> None:
    """Raise DataError for bad files (unless they are to be skipped) and for sources without a single sample."""
    bad = [(one.spec.name, r) for one in taken for r in one.rejected if r.kind == "bad"]
    if bad and on_error == "stop":
        lines = [f"  {name}: {r.key}: {r.reason}" for name, r in bad[:10]]
        more = [f"  and {len(bad) - 10} more"] if len(bad) > 10 else []
        total = len(bad) + sum(len(one.places) for one in taken)
        raise DataError(
            "\n".join([f"{len(bad)} of {total} files cannot be used", *lines, *more]),
            do="fix or exclude them, or skip them with --on-error skip",
        )
    for one in taken:
        if not one.places:
            kinds = Counter(r.kind for r in one.rejected)
            raise DataError(
                f"source {one.spec.name!r} has no usable image ({dict(kinds) or 'none found'})",
                where=str(one.spec.path),
                do="check its path and its include and exclude patterns",
            )


def _write_source(taken: _Taken, out: Path, scratch: Path, shard_bytes: int) -> Source:
    """Write the shards and indexes of one source in shuffled order, each complete before it gets its name."""
    assert taken.statistics is not None
    name, counts = taken.spec.name, Counter(r.kind for r in taken.rejected)
    summary = {**taken.statistics.summary(), "rejected": {k: counts[k] for k in ("bad", "small", "flat")}}
    classes = tuple(summary["class_counts"])
    order = permutation(0, f"pack/{name}", torch.zeros(1, dtype=torch.int64), len(taken.places))[0].tolist()
    shards = []
    for number, chosen in enumerate(_groups(order, taken, shard_bytes)):
        part = scratch / "shard.tar"
        _write_tar(part, taken, chosen)
        with open(part, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        final = out / f"{name}-{number:05d}-{sha256[:8]}.tar"
        indexes.write(indexes.build(part, classes), final)
        os.replace(part, final)
        shards.append(Shard(final.name, len(chosen), final.stat().st_size, sha256))
    dtype = taken.statistics.dtype.name
    amplitude = taken.statistics.amplitude()
    return Source(name, taken.spec.split, tuple(shards), len(order), dtype, classes, amplitude, summary)


def _groups(order: list[int], taken: _Taken, shard_bytes: int) -> Iterator[list[int]]:
    """Cut the shuffled samples into shards of about `shard_bytes`."""
    group: list[int] = []
    size = 0
    for i in order:
        group.append(i)
        size += taken.places[i][1] + len(taken.metas[i])
        if size >= shard_bytes:
            yield group
            group, size = [], 0
    if group:
        yield group


def _write_tar(path: Path, taken: _Taken, chosen: list[int]) -> None:
    with tarfile.open(path, "w:", format=tarfile.USTAR_FORMAT) as archive:
        for i in chosen:
            begin, size = taken.places[i]
            taken.spool.seek(begin)
            key = sample_key(taken.spec.name, i)
            for suffix, data in ((".npy", taken.spool.read(size)), (".json", taken.metas[i])):
                member = tarfile.TarInfo(key + suffix)
                member.size, member.mode = len(data), 0o644
                archive.addfile(member, io.BytesIO(data))


def _write_rejected(out: Path, taken: list[_Taken]) -> None:
    """Bring `rejected.jsonl` up to date: the lines of these sources are new, those of the others stay."""
    path, names = out / REJECTED, {one.spec.name for one in taken}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["source"] not in names]
    for one in taken:
        facts = ({"source": one.spec.name, "file": r.key, "kind": r.kind, "reason": r.reason} for r in one.rejected)
        kept += [canonical_json(f).decode() for f in facts]
    if kept:
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    else:
        path.unlink(missing_ok=True)


def _remove_unused(old: Catalog, new: Catalog) -> None:
    """Delete the shards and indexes that only the replaced catalog pointed to."""
    used = {shard.name for source in new.sources for shard in source.shards}
    for shard in (shard for source in old.sources for shard in source.shards if shard.name not in used):
        (old.root / shard.name).unlink(missing_ok=True)
        indexes.path_of(old.root / shard.name).unlink(missing_ok=True)
