"""The catalog: which sources and shards a folder or bucket holds, with sizes and hashes, and the data's fingerprint."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shards.cache import Cache
from shards.errors import DataError
from shards.remote import Retry
from shards.schema import DTYPES, SPLITS, VERSION, canonical_json, check_name, sha256_of
from shards.store import Store

if TYPE_CHECKING:
    import pyarrow

FILE_NAME = "catalog.json"
OPENING = Retry(patience=15)  # somebody is waiting at a terminal; a run that is under way has more


@dataclass(frozen=True)
class Amplitude:
    """How an amplitude a becomes a value in [0, 1]: clip(a / scale) or, with decibels > 0, a logarithm of that range.

    The logarithm is clip(1 + 20 log10(a / scale) / decibels). `rule` says where the scale comes from.
    """

    rule: str
    scale: float
    decibels: float = 0.0


@dataclass(frozen=True)
class Sidecar:
    """A file beside the shards: its name, bytes and sha256."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """One tar file: its name inside the catalog folder, samples, bytes and sha256, and the same of its index."""

    name: str
    samples: int
    bytes: int
    sha256: str
    index_bytes: int
    index_sha256: str


@dataclass(frozen=True)
class Source:
    """One corpus: its split, shards, class names (sorted, maybe empty), amplitude rule, statistics and metadata file.

    `origin` says what it was packed from (kind, url, licence, part). `root` is where its files lie. `rows`, after a
    filter, holds for each shard the rows that are kept, int32 in rising order.
    """

    name: str
    split: str
    shards: tuple[Shard, ...]
    dtype: str
    classes: tuple[str, ...]
    amplitude: Amplitude
    statistics: Mapping[str, Any]
    metadata: Sidecar
    origin: Mapping[str, Any] = field(default_factory=dict)
    root: str = ""
    rows: tuple[np.ndarray, ...] | None = field(default=None, compare=False)

    @property
    def kept(self) -> list[int]:
        """Samples of each shard that a filter has left."""
        return [s.samples for s in self.shards] if self.rows is None else [len(r) for r in self.rows]

    @property
    def samples(self) -> int:
        """Samples of all shards that a filter has left."""
        return sum(self.kept)

    def identity(self) -> list[Any]:
        """What makes this source's data what they are, as JSON; not where they lie."""
        rule = [self.amplitude.rule, self.amplitude.scale, self.amplitude.decibels]
        facts: list[Any] = [self.name, self.split, self.samples, [s.sha256 for s in self.shards], rule]
        if self.rows is not None:
            facts.append([hashlib.sha256(r.astype("<i4").tobytes()).hexdigest() for r in self.rows])
        return facts


@dataclass(frozen=True)
class Catalog:
    """The sources of one or several roots (or some of them), sorted by name, and the class list labels refer to."""

    root: str
    version: int
    sources: tuple[Source, ...]
    classes: tuple[str, ...] = ()
    cache: Cache | None = field(default=None, compare=False)

    @property
    def samples(self) -> int:
        """Number of samples in all sources."""
        return sum(source.samples for source in self.sources)

    @property
    def fingerprint(self) -> str:
        """sha256 that names this data: names, splits, shard hashes, kept rows and amplitudes; not where it lies."""
        return hashlib.sha256(canonical_json([source.identity() for source in self.sources])).hexdigest()

    def select(self, splits: Iterable[str] | str) -> Catalog:
        """The sources of these splits. The class list stays whole, so that train and test agree on labels."""
        wanted = {splits} if isinstance(splits, str) else set(splits)
        if wrong := wanted - set(SPLITS):
            raise DataError(f"unknown split {sorted(wrong)}", do=f"choose from {', '.join(SPLITS)}")
        kept = tuple(s for s in self.sources if s.split in wanted)
        if not kept:
            raise DataError(f"no source in split {sorted(wanted)}", where=self.root, do=self._holds())
        return replace(self, sources=kept)

    def only(self, names: Iterable[str]) -> Catalog:
        """The sources with these names; the class list narrows to theirs."""
        wanted = set(names)
        self._know(wanted)
        return replace(of(self.root, (s for s in self.sources if s.name in wanted), place=False), cache=self.cache)

    def filter(self, text: str) -> Catalog:
        """The samples for which `text` holds, e.g. `band == "X" and spacing < 1` (see shards.filters).

        Reads the metadata files only. A sample that does not know a column the text names is left out. Sources without
        a single such sample drop out; raises DataError when nothing is left.
        """
        from shards.filters import compile_filter, unknown_columns
        from shards.schema import COLUMNS

        known = {name: kind for name, (kind, _) in COLUMNS.items()} | {"class": str, "height": int, "width": int}
        expression = compile_filter(text, {**known, "source": str, "split": str})
        named = [name for name in known if re.search(rf"\b{name}\b", text)]
        sources = []
        for source in self.sources:
            rows = []
            for table in self.tables(named or ["class"], source):
                numbered = table.append_column("number", [np.arange(len(table), dtype=np.int32)])
                rows.append(numbered.filter(expression)["number"].to_numpy())
            sources.append(_keep(source, rows))
        kept = tuple(s for s in sources if s.samples)
        if not kept:
            what = f"no sample passes the filter {text!r}"
            if unknown := unknown_columns(self, named):
                what += f": {unknown}"
            do = "see what the columns hold: foundation shards audit CATALOG"
            raise DataError(what, where=self.root, do=do)
        return replace(self, sources=kept)

    def with_amplitudes(self, rules: Mapping[str, Amplitude]) -> Catalog:
        """The same data under other amplitude rules, by name of source."""
        self._know(set(rules))
        return replace(self, sources=tuple(replace(s, amplitude=rules.get(s.name, s.amplitude)) for s in self.sources))

    def store(self, source: Source) -> Store:
        """Where the files of a source are fetched from."""
        return Store(source.root, self.cache)

    def tables(self, columns: Sequence[str], *sources: Source) -> Iterator[pyarrow.Table]:
        """These metadata columns of all kept samples (or of `sources`), a table a shard, with `source` and `split`."""
        import pyarrow

        from shards import metadata

        for source in sources or self.sources:
            file = source.metadata
            path = self.store(source).fetch(file.name, file.bytes, file.sha256)
            for number, group in enumerate(metadata.groups(path, source, columns)):
                table = group if source.rows is None else group.take(source.rows[number])
                for name, value in (("source", source.name), ("split", source.split)):
                    table = table.append_column(name, pyarrow.repeat(value, len(table)))
                yield table

    def table(self, columns: Sequence[str], *sources: Source) -> pyarrow.Table:
        """The `tables` as one, in sample order."""
        import pyarrow

        return pyarrow.concat_tables(self.tables(columns, *sources))

    def check(self) -> None:
        """Cheap check that every local shard is there with its size; raises DataError that lists all that are not.

        Files of a URL are checked when they arrive.
        """
        found: list[str] = []
        for source in self.sources:
            if not self.store(source).remote:
                found += filter(None, (_complaint(Path(source.root) / s.name, s) for s in source.shards))
        self._refuse(found)

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """Full check: reads every byte, compares sha256, and rebuilds each index to compare it; raises DataError."""
        from shards import index as indexes

        self.check()
        found: list[str] = []
        for source in self.sources:
            store = self.store(source)
            for shard in source.shards:
                index = indexes.path_of(Path(shard.name)).name
                tar = store.fetch(shard.name, shard.bytes, shard.sha256, again=True)
                sidecar = store.fetch(index, shard.index_bytes, shard.index_sha256, again=True)
                if sha256_of(tar) != shard.sha256:
                    found.append(f"shard {shard.name} has changed: its sha256 is not the packed one")
                elif not np.array_equal(indexes.read(sidecar), indexes.build(tar, source.classes)):
                    found.append(f"index of {shard.name} disagrees with its shard (rebuild it)")
                elif sha256_of(sidecar) != shard.index_sha256:
                    found.append(f"index {index} has changed: its sha256 is not the packed one (rebuild it)")
                if progress:
                    progress(shard.samples)
            file = source.metadata
            if sha256_of(store.fetch(file.name, file.bytes, file.sha256, again=True)) != file.sha256:
                found.append(f"{file.name} has changed: its sha256 is not the packed one")
        self._refuse(found)

    def _know(self, names: set[str]) -> None:
        if missing := names - {s.name for s in self.sources}:
            raise DataError(f"no source named {sorted(missing)}", where=self.root, do=self._holds())

    def _holds(self) -> str:
        return "the catalog holds " + (", ".join(f"{s.name} ({s.split})" for s in self.sources) or "no sources")

    def _refuse(self, found: list[str]) -> None:
        if found:
            lines = found[:10] + ([f"and {len(found) - 10} more"] if len(found) > 10 else [])
            where = self.root
            raise DataError("\n".join(lines), where=where, do="restore the files or pack the source again")


def _keep(source: Source, kept: Sequence[np.ndarray]) -> Source:
    """The source reduced to these of its kept samples, per shard and in rising order."""
    if sum(map(len, kept)) == source.samples:
        return source
    if source.rows is not None:
        kept = [old[new] for old, new in zip(source.rows, kept, strict=True)]
    return replace(source, rows=tuple(kept))


def _complaint(path: Path, shard: Shard) -> str | None:
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        return f"missing shard {shard.name}"
    if size < shard.bytes:
        return f"shard {shard.name} is cut off: {size} of {shard.bytes} bytes"
    return f"shard {shard.name} is not the packed one: {size} bytes, not {shard.bytes}" if size > shard.bytes else None


def of(root: str | Path, sources: Iterable[Source], *, place: bool = True) -> Catalog:
    """A catalog of these sources, sorted by name, with the union of their classes; `place`: their files lie in root."""
    ordered = tuple(sorted(sources, key=lambda s: s.name))
    if place:
        ordered = tuple(replace(s, root=str(root)) for s in ordered)
    return Catalog(str(root), VERSION, ordered, tuple(sorted({c for s in ordered for c in s.classes})))


def text(catalog: Catalog) -> str:
    """What `catalog.json` holds. Raises DataError for a filtered catalog: its shards hold more than it counts."""
    if filtered := [source.name for source in catalog.sources if source.rows is not None]:
        raise DataError(f"{filtered[0]} is filtered", do="write the whole catalog; filter where it is read")
    sources = [{k: v for k, v in asdict(source).items() if k not in ("root", "rows")} for source in catalog.sources]
    value = {
        "version": catalog.version,
        "fingerprint": catalog.fingerprint,
        "samples": catalog.samples,
        "sources": sources,
    }
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def save(catalog: Catalog) -> Path:
    """Write `catalog.json` into the catalog's folder, whole or not at all."""
    path = Path(catalog.root) / FILE_NAME
    part = path.with_name(f".{FILE_NAME}.part")
    part.write_text(text(catalog), encoding="utf-8")
    os.replace(part, path)
    return path


def load(*roots: str | Path, cache: Cache | None = None) -> Catalog:
    """The catalog of one folder or fsspec URL, or of several together; raises DataError when one cannot be used.

    A root may also name its `catalog.json`. Files of a URL are copied to `cache` when they are needed.
    """
    loaded = [_load(str(root), cache) for root in roots]
    sources = [source for catalog in loaded for source in catalog.sources]
    names = [source.name for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(
            f"two catalogs hold a source named {twice[0]!r}",
            where=" and ".join(c.root for c in loaded),
            do="pack one of them under another name",
        )
    return replace(of(", ".join(c.root for c in loaded), sources, place=False), cache=cache)


def _load(root: str, cache: Cache | None) -> Catalog:
    root = root.removesuffix(FILE_NAME).rstrip("/") or "."
    file, where = f"{root}/{FILE_NAME}", f"{root}/{FILE_NAME}"
    try:
        store = Store(root, cache, OPENING)
        value = json.loads(store.read(FILE_NAME) if store.remote else Path(file).read_bytes())
        version = value["version"]
        if version == VERSION:
            return of(root, [_source(s) for s in value["sources"]])
    except FileNotFoundError as error:
        raise DataError("no catalog here", where=where, do="make one with: foundation shards pack") from error
    except OSError as error:
        what = f"the catalog cannot be read: {error.strerror}"
        raise DataError(what, where=where, do="correct the path or the permissions") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"the catalog cannot be read: {error!r}", where=where, do="pack again") from error
    raise DataError(
        f"the catalog has version {version}; this program reads version {VERSION}",
        where=where,
        do="pack again with this program, or use the one that packed it",
    )


def _source(value: dict[str, Any]) -> Source:
    """A source from the catalog file, which may come from anywhere: names and hashes become parts of paths."""
    if value.keys() & {"root", "rows"}:
        raise ValueError("a catalog file does not say where it lies")
    source = Source(
        **value
        | {
            "shards": tuple(Shard(**shard) for shard in value["shards"]),
            "metadata": Sidecar(**value["metadata"]),
            "classes": tuple(value["classes"]),
            "amplitude": Amplitude(**value["amplitude"]),
        }
    )
    files: list[Shard | Sidecar] = [*source.shards, source.metadata]
    hashes = [*(f.sha256 for f in files), *(s.index_sha256 for s in source.shards)]
    counts = [*(f.bytes for f in files), *(n for s in source.shards for n in (s.samples, s.index_bytes))]
    rule = source.amplitude
    if wrong := next((f.name for f in files if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", f.name)), None):
        raise ValueError(f"file name {wrong[:200]!r}")
    if wrong := next((h for h in hashes if not re.fullmatch("[0-9a-f]{64}", h)), None):
        raise ValueError(f"sha256 {wrong!r}")
    if not all(type(n) is int and n > 0 for n in counts):
        raise ValueError("a count or a size that is no positive whole number")
    if wrong := next((s.name for s in source.shards if s.samples * 4 * 512 > s.bytes), None):  # two members a sample
        raise ValueError(f"more samples than fit into {wrong}")
    if not all(type(name) is str for name in source.classes):
        raise ValueError("a class is no text")
    if check_name(source.name) and (source.split not in SPLITS or source.dtype not in DTYPES):
        raise ValueError(f"split {source.split!r}, dtype {source.dtype!r}")
    if not (0 < rule.scale < math.inf and 0 <= rule.decibels < math.inf):
        raise ValueError(f"amplitude {rule}")
    return source
