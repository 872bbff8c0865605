"""The catalog: which sources and shards a folder holds, with their sizes and hashes, and the data's fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from shards.errors import DataError
from shards.schema import SPLITS, VERSION, canonical_json

FILE_NAME = "catalog.json"


@dataclass(frozen=True)
class Amplitude:
    """How pixels become amplitudes: clip(pixel / scale, 0, 1); `rule` says where the scale comes from."""

    rule: str
    scale: float


@dataclass(frozen=True)
class Shard:
    """One tar file: its name inside the catalog folder, samples, bytes and sha256."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """One corpus: its split, shards, class names (sorted, maybe empty), amplitude rule and statistics."""

    name: str
    split: str
    shards: tuple[Shard, ...]
    samples: int
    dtype: str
    classes: tuple[str, ...]
    amplitude: Amplitude
    statistics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Catalog:
    """The sources of a folder (or some of them), sorted by name, and the class list that labels refer to."""

    root: Path
    version: int
    sources: tuple[Source, ...]
    classes: tuple[str, ...] = ()

    @property
    def samples(self) -> int:
        """Number of samples in all sources."""
        return sum(source.samples for source in self.sources)

    @property
    def fingerprint(self) -> str:
        """sha256 that names this data: names, splits, shard hashes, counts and amplitudes; not where it lies."""
        facts = [
            [s.name, s.split, s.samples, [shard.sha256 for shard in s.shards], s.amplitude.rule, s.amplitude.scale]
            for s in self.sources
        ]
        return hashlib.sha256(canonical_json(facts)).hexdigest()

    def select(self, splits: Iterable[str] | str) -> Catalog:
        """The sources of these splits. The class list stays whole, so that train and test agree on labels."""
        wanted = {splits} if isinstance(splits, str) else set(splits)
        if wrong := wanted - set(SPLITS):
            raise DataError(f"unknown split {sorted(wrong)}", do=f"choose from {', '.join(SPLITS)}")
        kept = tuple(s for s in self.sources if s.split in wanted)
        if not kept:
            raise DataError(f"no source in split {sorted(wanted)}", where=str(self.root), do=self._holds())
        return replace(self, sources=kept)

    def only(self, names: Iterable[str]) -> Catalog:
        """The sources with these names; the class list narrows to theirs."""
        wanted = set(names)
        if missing := wanted - {s.name for s in self.sources}:
            raise DataError(f"no source named {sorted(missing)}", where=str(self.root), do=self._holds())
        return of(self.root, (s for s in self.sources if s.name in wanted))

    def check(self) -> None:
        """Cheap check that every shard is there with the right size; raises DataError that lists all that are not."""
        found: list[str] = []
        for shard in (shard for source in self.sources for shard in source.shards):
            path = self.root / shard.name
            size = path.stat().st_size if path.is_file() else None
            if size is None:
                found.append(f"missing shard {shard.name}")
            elif size < shard.bytes:
                found.append(f"shard {shard.name} is cut off: {size} of {shard.bytes} bytes")
            elif size > shard.bytes:
                found.append(f"shard {shard.name} is not the packed one: {size} bytes, not {shard.bytes}")
        _raise(found, self.root)

    def verify(self) -> None:
        """Full check: reads every byte, compares sha256, and rebuilds each index to compare it; raises DataError."""
        from shards.index import build, open_index

        self.check()
        found: list[str] = []
        for source in self.sources:
            for shard in source.shards:
                path = self.root / shard.name
                with open(path, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                        found.append(f"shard {shard.name} has changed: its sha256 is not the packed one")
                        continue
                if not build(path, source.classes).equals(open_index(self.root, shard)):
                    found.append(f"index of {shard.name} disagrees with its shard (rebuild it)")
        _raise(found, self.root)

    def _holds(self) -> str:
        return "the catalog holds " + (", ".join(f"{s.name} ({s.split})" for s in self.sources) or "no sources")


def _raise(found: list[str], root: Path) -> None:
    if found:
        more = [f"and {len(found) - 10} more"] if len(found) > 10 else []
        raise DataError("\n".join(found[:10] + more), where=str(root), do="restore the files or pack the source again")


def of(root: Path, sources: Iterable[Source]) -> Catalog:
    """A catalog of these sources, sorted by name, with the union of their classes."""
    ordered = tuple(sorted(sources, key=lambda s: s.name))
    return Catalog(root, VERSION, ordered, tuple(sorted({c for s in ordered for c in s.classes})))


def save(catalog: Catalog) -> Path:
    """Write `catalog.json` into the catalog's folder, whole or not at all."""
    path = catalog.root / FILE_NAME
    part = path.with_name(f".{FILE_NAME}.part")
    value = {
        "version": catalog.version,
        "fingerprint": catalog.fingerprint,
        "samples": catalog.samples,
        "sources": [asdict(source) for source in catalog.sources],
    }
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)
    return path


def load(path: str | Path) -> Catalog:
    """Read a catalog from its folder or its `catalog.json`; raises DataError when it cannot be used."""
    path = Path(path)
    file = path / FILE_NAME if os.path.isdir(path) else path
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        version = value["version"]
        if version == VERSION:
            return of(file.parent, [_source(s) for s in value["sources"]])
    except FileNotFoundError as error:
        raise DataError("no catalog here", where=str(file), do="make one with: foundation shards pack") from error
    except OSError as error:
        what = f"the catalog cannot be read: {error.strerror}"
        raise DataError(what, where=str(file), do="correct the path or the permissions") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"the catalog cannot be read: {error!r}", where=str(file), do="pack again") from error
    raise DataError(
        f"the catalog has version {version}; this program reads version {VERSION}",
        where=str(file),
        do="pack again with this program, or use the one that packed it",
    )


def _source(value: dict[str, Any]) -> Source:
    shards = tuple(Shard(**shard) for shard in value["shards"])
    for shard in shards:
        if Path(shard.name).name != shard.name:  # a catalog may not point outside its folder
            raise ValueError(f"shard name {shard.name!r}")
    fixed = {"shards": shards, "classes": tuple(value["classes"]), "amplitude": Amplitude(**value["amplitude"])}
    return Source(**(value | fixed))
