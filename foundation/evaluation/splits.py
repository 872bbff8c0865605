"""Explicit splits: files that list every train and test image by the hash of its pixels, with class and group.

JSON, one image a line, so that people and `diff` can read it: a sha256 of the content, counts, then the images. A score
names the sha256 of its split. Hashes are of the pixels as they are read, [C, H, W]: they do not depend on the packing.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from foundation.evaluation.features import Listing
from foundation.files import write_whole
from shards.catalog import Catalog
from shards.errors import DataError
from shards.schema import COLUMNS, canonical_json, content_hash
from shards.stream import Reader

FORMAT = 1
SIDES = ("train", "test")
SHOWN = 3


class Row(NamedTuple):
    """One image: hash of its pixels, its key in the catalog, class, group (empty: not known) and split."""

    hash: str
    key: str
    label: str
    group: str
    split: str


@dataclass(frozen=True)
class Split:
    """The images of a split, sorted; `column` is the metadata that gives their groups."""

    rows: tuple[Row, ...]
    column: str = "scene"

    @property
    def sha256(self) -> str:
        """Names the content: images, classes, groups, sides; not their keys, which are counters of a packing."""
        facts = sorted((r.hash, r.label, r.group, r.split) for r in self.rows)
        return hashlib.sha256(canonical_json([self.column, facts])).hexdigest()

    def side(self, name: str) -> list[Row]:
        """The images of train or test."""
        return [row for row in self.rows if row.split == name]

    def counts(self) -> dict[str, dict[str, int]]:
        """Images by side and class."""
        return {side: dict(sorted(Counter(row.label for row in self.side(side)).items())) for side in SIDES}

    def shared_groups(self) -> list[str]:
        """Known groups that lie on both sides."""
        train, test = ({row.group for row in self.side(side) if row.group} for side in SIDES)
        return sorted(train & test)

    def text(self) -> str:
        """What the file holds."""
        head = {"format": FORMAT, "sha256": self.sha256, "group": self.column, "counts": self.counts()}
        head["columns"] = list(Row._fields)
        lines = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in self.rows)
        return json.dumps(head, indent=1, ensure_ascii=False)[:-2] + f',\n "images": [\n{lines}\n ]\n}}\n'


def write(split: Split, path: Path) -> Path:
    """Write the file, whole or not at all."""
    return write_whole(path, split.text())


def read(path: Path) -> Split:
    """The split in a file. Raises DataError when it cannot be read or its content is not what its sha256 says.

    A file without `sha256` is taken as it is: it was made by hand.
    """
    do = "write it again: foundation splits CATALOG --out FILE; or, if the change is meant, take its sha256 out"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        rows = tuple(Row(*image) for image in value["images"])
        split, told = Split(rows, value.get("group", "scene")), value.get("sha256")
        if value["format"] != FORMAT or not all(isinstance(part, str) for row in rows for part in row):
            raise ValueError(f"format {value['format']!r}, or an image is not five texts")
        if wrong := sorted({row.split for row in rows} - {*SIDES}):
            raise ValueError(f"split {wrong[0]!r} is neither train nor test")
    except OSError as error:
        raise DataError(
            f"the split file cannot be read: {error.strerror}", where=str(path), do="name a file"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"this is no split file: {error!r}", where=str(path), do=do) from error
    if told is not None and told != split.sha256:
        what = f"the split file was changed: its content has sha256 {split.sha256[:12]}, not {str(told)[:12]}"
        raise DataError(what, where=str(path), do=do)
    return split


def check(split: Split, where: str, allow_shared_groups: bool = False) -> None:
    """Raise DataError when a side is empty, an image lies on both, or (unless allowed) a known group does."""
    for side in SIDES:
        if not split.side(side):
            do = f"list images with the split {side!r}, or pack a labelled {side} split"
            raise DataError(f"the {side} side of the split is empty", where=where, do=do)
    train = {row.hash: row for row in split.side("train")}
    if both := [(train[row.hash], row) for row in split.side("test") if row.hash in train]:
        shown = _first(f"{a.hash[:12]} ({a.key} = {b.key})" for a, b in both)
        what = f"{len(both):,} images lie in train and in test: {shown}"
        raise DataError(what, where=where, do="leave each on one side; scores on seen images mean nothing")
    check_groups(split, where, allow_shared_groups)


def check_groups(split: Split, where: str, allow_shared_groups: bool = False) -> None:
    """Raise DataError when (unless allowed) a known group lies on both sides."""
    if (shared := split.shared_groups()) and not allow_shared_groups:
        raise DataError(
            f"{len(shared):,} groups ({split.column}) lie in train and in test: {_first(shared)}",
            where=where,
            do="keep a group on one side, or pass --allow-shared-groups: every score will say so",
        )


def _first(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:SHOWN]) + ", ..." * (len(names) > SHOWN)


def groups(catalog: Catalog, column: str) -> list[str]:
    """The group of each sample, in sample order; empty where the metadata do not know it.

    Raises DataError for a column that does not exist.
    """
    if column not in COLUMNS:
        do = f"choose from {', '.join(COLUMNS)}"
        raise DataError(f"the metadata have no column {column!r}", where=catalog.root, do=do)
    values = catalog.table([column])[column].to_pylist()
    return ["" if value is None else str(value) for value in values]


def of_listings(train: Listing, test: Listing, known: Sequence[Sequence[str]], column: str = "scene") -> Split:
    """The split that two listings are; `known` gives the groups by sample id, for each of the two.

    Not by key: keys are counters of a source, and those of two sources may be the same.
    """
    rows = [
        Row(h, key, part.classes[label], named[i], side)
        for side, part, named in zip(SIDES, (train, test), known, strict=True)
        for h, key, label, i in zip(part.hashes, part.keys, part.y.tolist(), part.ids, strict=True)
    ]
    return Split(tuple(sorted(rows, key=lambda r: (SIDES.index(r.split), r.label, r.hash, r.key))), column)


def listings(split: Split, catalog: Catalog, where: str) -> tuple[Listing, Listing]:
    """The train and test samples that a split names, in the catalog's order, numbered by the classes of train.

    Raises DataError «the split file does not match the catalog» when a listed image is not in the catalog or has
    another class there, and when a class occurs in test only.
    """
    reader = Reader(catalog)
    wanted = {row.hash for row in split.rows}
    found: dict[str, list[tuple[int, str, str]]] = defaultdict(list)
    for number in range(len(reader)):
        sample = reader[number]
        if (name := content_hash(sample.pixels)) in wanted:
            label = catalog.classes[sample.label] if sample.label >= 0 else "no class"
            found[name].append((number, sample.key, label))
    missing, other, taken = [], [], []
    for row in split.rows:
        here = found[row.hash]
        if not here:
            missing.append(f"{row.hash[:12]} ({row.key})")
            continue
        # An image may be packed twice, with and without its class, and keys of two sources may be the same counters.
        place = here.pop(max(range(len(here)), key=lambda i: (here[i][2] == row.label, here[i][1] == row.key)))
        if place[2] != row.label:
            other.append(f"{row.hash[:12]} ({place[1]}) is {row.label} in the file and {place[2]} in the catalog")
        taken.append((place, row))
    wrong = [f"{len(missing):,} images are not in it: {_first(missing)}"] if missing else []
    wrong += [f"the classes of {len(other):,} images differ: {_first(other)}"] if other else []
    if wrong:
        raise DataError(
            f"the split file does not match the catalog: {'; '.join(wrong)}",
            where=f"{where}, {catalog.root}",
            do="name the catalog it was made from, or make it again: foundation splits CATALOG --out FILE",
        )
    classes = tuple(sorted({row.label for row in split.side("train")}))
    if unknown := sorted({row.label for row in split.side("test")} - {*classes}):
        what = f"the test side has classes that the train side does not have: {', '.join(unknown)}"
        raise DataError(what, where=where, do="list training images of these classes, or leave them out of test")
    taken.sort(key=lambda pair: pair[0][0])
    train, test = ([(place, row) for place, row in taken if row.split == side] for side in SIDES)
    return _listing(reader, train, classes), _listing(reader, test, classes)


def _listing(reader: Reader, taken: Sequence[tuple[tuple[int, str, str], Row]], classes: tuple[str, ...]) -> Listing:
    y = torch.tensor([classes.index(row.label) for _, row in taken], dtype=torch.int64)
    ids, keys = (tuple(place[i] for place, _ in taken) for i in (0, 1))
    names: Any = (ids, y, classes, keys, tuple(row.hash for _, row in taken))
    return Listing(reader, *names)
