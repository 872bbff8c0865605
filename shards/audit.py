"""What a catalog repeats, and what it shares with the sets that scores are measured on.

Images are compared by content hash and by likeness, scenes by their id. Of the catalogs only Parquet files are read.

A scene id means something inside one kind of source (Source.origin["kind"]): two corpora may both have a scene "P0001".
Ids of 24 characters and more are names of products (Sentinel-1, ICEYE, ...), unique by themselves, and are compared
across kinds.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from shards import likeness
from shards.catalog import Catalog, Source
from shards.errors import DataError
from shards.rejections import REJECTED, reasons
from shards.schema import COLUMNS, Rejected

if TYPE_CHECKING:
    import pyarrow as pa

LISTED = 1000  # of each finding so many are listed; counts are of all
_PRODUCT_NAME = 24


@dataclass(frozen=True)
class Place:
    """A sample: the catalog it is in (0 the audited one, then those in `against`), its sample id there, its names."""

    catalog: int
    number: int
    source: str
    split: str
    key: str
    file: str

    def __str__(self) -> str:
        return f"{self.source}: {self.file}"


@dataclass(frozen=True)
class Pair:
    """Two samples and their distance (shards.likeness; None: identical pixels). A leak: learnt, tested."""

    first: Place
    second: Place
    distance: float | None


@dataclass(frozen=True)
class SharedScene:
    """A scene on both sides: samples by source among those to learn from, and among those tested."""

    scene: str
    learnt: Mapping[str, int]
    tested: Mapping[str, int]

    def __str__(self) -> str:
        return f"{self.scene} ({', '.join(self.learnt)} = {', '.join(self.tested)})"


@dataclass(frozen=True)
class Column:
    """A metadata column of a source: samples that have it; the commonest values (text) or the span (numbers)."""

    filled: int
    distinct: int
    values: Mapping[str, int]
    span: tuple[float, float] | None


@dataclass(frozen=True)
class SourceFacts:
    """A source in numbers; `rejected` counts what was left out, by reason with its numbers replaced by #."""

    name: str
    split: str
    kind: str
    samples: int
    dtype: str
    classes: Mapping[str, int]
    columns: Mapping[str, Column]
    rejected: Mapping[str, int]


@dataclass(frozen=True)
class Findings:
    """What `audit` found. Lists hold the first LISTED of each kind, `counts` counts all.

    `exact`: groups of samples with identical pixels. `near`: pairs of different pixels that look like copies, closest
    first. `leaked`, `leaked_near`, `leaked_scenes`: what is learnt and also tested.
    """

    sources: tuple[SourceFacts, ...]
    counts: Mapping[str, int]
    exact: tuple[tuple[Place, ...], ...]
    near: tuple[Pair, ...]
    leaked: tuple[Pair, ...]
    leaked_near: tuple[Pair, ...]
    leaked_scenes: tuple[SharedScene, ...]

    @property
    def clean(self) -> bool:
        """Whether nothing that is learnt is tested."""
        return not (self.leaked or self.leaked_near or self.leaked_scenes)

    def as_json(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return json.loads(json.dumps(asdict(self)))


def overlap(learnt: Catalog, tested: Catalog) -> list[str]:
    """«learnt = tested» for every test image whose pixels are also among those to learn from."""
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = ["sha256", "from"]
    test = tested.table(columns).combine_chunks()
    hits = [table.filter(pc.is_in(table["sha256"], value_set=test["sha256"])) for table in learnt.tables(columns)]
    known = pa.concat_tables(hits).combine_chunks()
    test = test.filter(pc.is_in(test["sha256"], value_set=known["sha256"]))
    if not len(test):
        return []
    twins = known.take(pc.index_in(test["sha256"], value_set=known["sha256"]))
    sides = (twins["source"], twins["from"], test["source"], test["from"])
    return [f"{a}: {b} = {c}: {d}" for a, b, c, d in zip(*(side.to_pylist() for side in sides), strict=True)]


def shared_scenes(learnt: Catalog, tested: Catalog) -> list[SharedScene]:
    """Scenes that both catalogs have samples of, by id."""
    return _shared(_scenes(learnt.sources, learnt), _scenes(tested.sources, tested))


@dataclass(frozen=True)
class Copies:
    """Test images that look like copies of others to learn from: «learnt ~ tested», and how many could not be compared.

    `learnt_without` and `tested_without` count images that were packed without a descriptor.
    """

    names: tuple[str, ...]
    learnt_without: int
    tested_without: int


def near_overlap(learnt: Catalog, tested: Catalog) -> Copies:
    """Near duplicates across the two catalogs, for each test image the closest; identical images are not among them.

    About ten seconds of one core per million images to learn from, which are read shard by shard (shards.likeness).
    """
    columns = ["sha256", "from", "likeness"]
    test = tested.table(columns)
    index = likeness.Index(_descriptors(test["likeness"]))
    known, best, without = test["sha256"].to_pylist(), dict[int, tuple[float, str]](), 0
    identical = set[int]()
    for table in learnt.tables(columns):
        without += table["likeness"].null_count
        for i, j, distance in index.near(_descriptors(table["likeness"])):
            if table["sha256"][i].as_py() == known[j]:
                identical.add(j)
            elif distance < best.get(j, (np.inf, ""))[0]:
                best[j] = distance, f"{table['source'][i]}: {table['from'][i]}"
    names = [f"{best[j][1]} ~ {test['source'][j]}: {test['from'][j]}" for j in sorted(best.keys() - identical)]
    return Copies(tuple(names), without, test["likeness"].null_count)


def _descriptors(column: pa.ChunkedArray) -> np.ndarray:
    """Descriptors uint8 [N, 128]; a sample without one gets zeros."""
    empty = bytes(likeness.BYTES)
    return np.frombuffer(b"".join(d or empty for d in column.to_pylist()), np.uint8).reshape(-1, likeness.BYTES)


def refuse_overlap(learnt: Catalog, tested: Catalog, near: bool = True) -> None:
    """Raise DataError when an image to learn from is also a test image or comes from the scene of one.

    With `near`, also when it looks like a copy of one: with another gain, mirrored, turned, compressed.
    """
    images, shared = overlap(learnt, tested), shared_scenes(learnt, tested)
    copies = near_overlap(learnt, tested).names if near else ()
    found: dict[str, Sequence[str]] = {"images": images, "scenes": [str(scene) for scene in shared]}
    what = [f"{len(names)} {kind} to learn from are also test {kind}" for kind, names in found.items() if names]
    if copies:
        what.append(f"{len(copies)} test images look like copies of images to learn from")
    if not what:
        return
    kinds = (*found.values(), copies)
    names = [name for kind in kinds for name in kind[:3]]
    source = next(iter(shared[0].learnt)) if shared and not images else names[0].partition(":")[0]
    accept = "data.overlap=allow" + (" or, if they are no copies, with data.overlap=identical" if copies else "")
    raise DataError(
        "; ".join(what),
        where="; ".join(names) + ("; ..." if len(names) < sum(map(len, kinds)) else ""),
        do=f"leave them out, e.g. data.filter=\"source != '{source}'\", or accept it with {accept}; "
        "scores on what was learnt mean nothing",
    )


def audit(catalog: Catalog, against: Sequence[Catalog] = (), *, near: bool = True) -> Findings:
    """Audit a catalog, alone and against catalogs that are evaluated on.

    Learnt is what stands in other splits than test; tested are its test split and those of `against` (all of one that
    has no test split). Sources that are the same data in both are looked at once. `near` False skips likeness, which
    takes about a minute per million samples.
    """
    rows = _Rows(catalog, against)
    contents, first = np.unique(rows.contents, return_index=True)
    learnt, tested = (_first_rows(rows.contents, mask, len(contents)) for mask in (rows.learnt, rows.tested))
    groups, repeats = _groups(rows.contents, len(contents))
    found = likeness.pairs(rows.likeness(first)) if near else []
    both = np.flatnonzero((learnt >= 0) & (tested >= 0))
    crossing = [
        (learnt[a], tested[b], d) for i, j, d in found for a, b in ((i, j), (j, i)) if learnt[a] >= 0 and tested[b] >= 0
    ]
    scenes = _shared(rows.scenes(rows.learns), rows.scenes(rows.tests))
    counts = {
        "samples": catalog.samples,
        "compared with": len(rows.contents) - catalog.samples,
        "groups of identical images": len(groups),
        "repeated images": repeats,
        "near duplicates": len(found),
        "test images that are learnt": int(np.isin(rows.contents[rows.tested], both).sum()),
        "test images with a near duplicate that is learnt": len({b for _, b, _ in crossing}),
        "test scenes that are learnt": len(scenes),
    }
    return Findings(
        sources=tuple(facts(catalog)),
        counts=counts,
        exact=tuple(tuple(rows.places(group)) for group in groups[:LISTED]),
        near=rows.pairs((first[i], first[j], d) for i, j, d in found[:LISTED]),
        leaked=rows.pairs((learnt[c], tested[c], None) for c in both[:LISTED]),
        leaked_near=rows.pairs(crossing[:LISTED]),
        leaked_scenes=tuple(scenes[:LISTED]),
    )


class _Rows:
    """The samples of all catalogs in one numbering: contents int64 [N] (equal pixels, equal number), masks bool [N]."""

    def __init__(self, catalog: Catalog, against: Sequence[Catalog]) -> None:
        import pyarrow as pa

        self.parts: list[tuple[int, Source, int]] = []  # catalog, source, sample id of its first sample there
        self.catalogs = [catalog, *against]
        without_test = {n for n, one in enumerate(self.catalogs) if n and all(s.split != "test" for s in one.sources)}
        self.learns: list[bool] = []
        self.tests: list[bool] = []
        seen: dict[str, int] = {}
        tables: list[pa.Table] = []
        for number, one in enumerate(self.catalogs):
            start = 0
            for source in one.sources:
                part = seen.setdefault(json.dumps(source.identity()[2:]), len(tables))  # whatever its name and split
                if part == len(tables):
                    self.parts.append((number, source, start))
                    tables.append(one.table(["sha256", "key", "from", "likeness"], source))
                    self.learns.append(False)
                    self.tests.append(False)
                self.learns[part] |= number == 0 and source.split != "test"
                self.tests[part] |= source.split == "test" or number in without_test
                start += source.samples
        self.part = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        self.starts = np.cumsum([0, *(len(table) for table in tables)])
        self.table: pa.Table = pa.concat_tables(tables).combine_chunks()
        hashes = self.table["sha256"].combine_chunks()
        self.contents = hashes.dictionary_encode().indices.to_numpy().astype(np.int64)
        self.learnt, self.tested = np.array(self.learns)[self.part], np.array(self.tests)[self.part]

    def likeness(self, rows: np.ndarray) -> np.ndarray:
        """Descriptors uint8 [len(rows), 128]; a sample without one gets zeros."""
        return _descriptors(self.table["likeness"].take(rows))

    def places(self, rows: Sequence[int] | np.ndarray) -> list[Place]:
        """Where these rows are."""
        taken = self.table.select(["key", "from"]).take(np.asarray(rows, np.int64))
        found = []
        for row, key, file in zip(rows, taken["key"].to_pylist(), taken["from"].to_pylist(), strict=True):
            catalog, source, start = self.parts[self.part[row]]
            number = int(start + row - self.starts[self.part[row]])
            found.append(Place(catalog, number, source.name, source.split, key, file))
        return found

    def pairs(self, rows: Iterable[tuple[int, int, float | None]]) -> tuple[Pair, ...]:
        """Pairs of rows with their distance, as places."""
        listed = list(rows)
        firsts, seconds = self.places([a for a, _, _ in listed]), self.places([b for _, b, _ in listed])
        return tuple(Pair(a, b, row[2]) for a, b, row in zip(firsts, seconds, listed, strict=True))

    def scenes(self, wanted: Sequence[bool]) -> dict[str, Counter[str]]:
        """Scenes of the wanted parts."""
        found: dict[str, Counter[str]] = {}
        for (number, source, _), want in zip(self.parts, wanted, strict=True):
            if want:
                for scene, samples in _scenes([source], self.catalogs[number]).items():
                    found.setdefault(scene, Counter()).update(samples)
        return found


def _first_rows(contents: np.ndarray, mask: np.ndarray, number: int) -> np.ndarray:
    """First row of each content among the masked rows, int64 [number]; -1 where there is none."""
    found = np.full(number, -1, np.int64)
    rows = np.flatnonzero(mask)[::-1]
    found[contents[rows]] = rows
    return found


def _groups(contents: np.ndarray, number: int) -> tuple[list[np.ndarray], int]:
    """Rows of each content that occurs more than once, in order of the first row, and how many are repeats."""
    counts = np.bincount(contents, minlength=number)
    rows = np.flatnonzero(counts[contents] > 1)
    rows = rows[np.argsort(contents[rows], kind="stable")]  # contents are numbered in order of their first row
    groups = np.split(rows, np.flatnonzero(np.diff(contents[rows])) + 1) if len(rows) else []
    return groups, len(rows) - len(groups)


def _scenes(sources: Iterable[Source], catalog: Catalog) -> dict[str, Counter[str]]:
    """Comparable scene id → samples by source."""
    found: dict[str, Counter[str]] = {}
    for source in sources:
        kind = str(source.origin.get("kind", ""))
        for value in catalog.table(["scene"], source)["scene"].drop_null().value_counts().to_pylist():
            scene = value["values"] if len(value["values"]) >= _PRODUCT_NAME else f"{kind} scene {value['values']}"
            found.setdefault(scene, Counter())[source.name] += value["counts"]
    return found


def _shared(learnt: Mapping[str, Counter[str]], tested: Mapping[str, Counter[str]]) -> list[SharedScene]:
    return [SharedScene(s, dict(learnt[s]), dict(tested[s])) for s in sorted(learnt.keys() & tested.keys())]


def facts(catalog: Catalog) -> Iterable[SourceFacts]:
    """The sources of a catalog in numbers, from its metadata."""
    refused = _rejected(catalog)
    for source in catalog.sources:
        table = catalog.table([*COLUMNS, "class"], source)
        classes = table["class"].drop_null().value_counts().to_pylist()
        yield SourceFacts(
            name=source.name,
            split=source.split,
            kind=str(source.origin.get("kind", "")),
            samples=source.samples,
            dtype=source.dtype,
            classes=dict(sorted((v["values"], v["counts"]) for v in classes)),
            columns={name: _column(table[name].drop_null(), kind) for name, (kind, _) in COLUMNS.items()},
            rejected=dict(refused.get((source.root, source.name), Counter()).most_common()),
        )


def _column(values: pa.ChunkedArray, kind: type) -> Column:
    import pyarrow.compute as pc

    if not len(values):
        return Column(0, 0, {}, None)
    if kind is float:
        span = pc.min_max(values).as_py()
        return Column(len(values), pc.count_distinct(values).as_py(), {}, (span["min"], span["max"]))
    counts = Counter({str(v["values"]): v["counts"] for v in values.value_counts().to_pylist()})
    return Column(len(values), len(counts), dict(counts.most_common(5)), None)


def _rejected(catalog: Catalog) -> dict[tuple[str, str], Counter[str]]:
    """What packing left out, by root and source: reasons, whose numbers differ from file to file, without them."""
    some = [source for source in catalog.sources if any(source.statistics["rejected"].values())]
    found = {(s.root, s.name): Counter[str]() for s in some}
    for source in {s.root: s for s in some}.values():
        try:
            text = catalog.store(source).read(REJECTED).decode()
        except DataError:  # a list for people, which a copy of the catalog may do without: the counts remain
            continue
        for line in filter(None, text.splitlines()):
            value = json.loads(line)
            if (source.root, value["source"]) in found:
                left_out = Rejected(value["file"], value["kind"], value["reason"])
                found[source.root, value["source"]].update(reasons([left_out]))
    for one in some:
        counts = found[one.root, one.name]
        if not counts:
            counts.update({kind: count for kind, count in one.statistics["rejected"].items() if count})
    return found
