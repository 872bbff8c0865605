"""What every kind of source shares: a subclass of Corpus is one file of facts, a layout, and maybe a decoder."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any, ClassVar

import numpy as np

from shards.errors import DataError
from shards.formats import SIDE_SUFFIXES, decode
from shards.schema import Record, Rejected, amplitude_of, image_shape
from shards.sources.files import Files


@dataclass(frozen=True)
class Item:
    """A file of a corpus that becomes one sample or several: path inside the source, published part, class, columns.

    `reads` are the side files of the source that `load` reads for it: when one of them changes, the item is read again.
    """

    name: str
    part: str = ""
    label: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    reads: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """A published part of a corpus: the split it belongs to, and its number of files: in all, or per class.

    Several totals are accepted where publications disagree.
    """

    split: str
    counts: int | tuple[int, ...] | Mapping[str, int] | None = None


@dataclass(frozen=True)
class Options:
    """How a source is read.

    labels: take classes. include, exclude: globs over the path inside the source (`*` also matches `/`). tile: images
    with a longer side are cut into tiles of this side, `overlap` pixels shared by neighbours, the last row and column
    aligned to the border. min_std: a tile whose amplitude has std < min_std · mean, or is all zero, is flat and left
    out; speckle alone has std / mean ≤ 0.52 (single look), so 0.6 keeps the tiles that hold more than sea. max_nodata:
    the largest share of a tile that may lie outside the imaged area. min_side: shorter images are left out. extra:
    options of one kind.
    """

    labels: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    tile: int | None = None
    overlap: int = 0
    min_std: float = 0.0
    max_nodata: float = 0.0
    min_side: int = 0
    extra: Mapping[str, str] = field(default_factory=dict)


class Corpus:
    """One kind of source. Picklable, so that processes can share the work of `load`.

    Class attributes are its facts: `kind` (its name in commands), `description`, `url` (where to obtain it),
    `licence`, `modules` (packages it needs beyond the core), `parts` (published parts with their counts; none: the
    user's split holds), `columns` (what is the same for every sample), `extra` (its own options → help text).
    """

    kind: ClassVar[str]
    description: ClassVar[str]
    url: ClassVar[str] = ""
    licence: ClassVar[str] = ""
    modules: ClassVar[tuple[str, ...]] = ()
    parts: ClassVar[Mapping[str, Part]] = {}
    columns: ClassVar[Mapping[str, Any]] = {}
    extra: ClassVar[Mapping[str, str]] = {}

    def __init__(self, files: Files, options: Options | None = None) -> None:
        self.files, self.options = files, options or Options()
        for name in set(self.options.extra) - set(self.extra):
            near = difflib.get_close_matches(name, self.extra, n=1)
            known = ", ".join(self.extra) or "none"
            raise DataError(
                f"{self.kind} has no option {name!r}",
                do=f"did you mean {near[0]}?" if near else f"its options: {known}",
            )

    def items(self) -> Iterator[Item | Rejected]:
        """Every file that the layout of this corpus explains, in order of name; what it does not explain as Rejected.

        Reads names and side files, never pixels.
        """
        raise NotImplementedError

    def load(self, item: Item) -> Iterator[Record | Rejected]:
        """The samples of one item; a file that cannot be decoded comes as Rejected."""
        try:
            pixels = decode(self.files.read(item.name), item.name)
        except DataError as error:
            yield Rejected(item.name, "bad", error.what)
            return
        yield from self.cut(pixels, item)

    def wanted(self, name: str) -> bool:
        """Whether a path passes include and exclude, and is neither hidden nor a side file (csv, txt, xml, ...)."""
        path = PurePosixPath(name)
        if path.suffix.lower() in SIDE_SUFFIXES or any(part.startswith(".") for part in path.parts):
            return False
        included = not self.options.include or any(fnmatchcase(name, pattern) for pattern in self.options.include)
        return included and not any(fnmatchcase(name, pattern) for pattern in self.options.exclude)

    def unmatched(self) -> list[str]:
        """What to tell about patterns of include and exclude that match no file."""
        patterns = {"--include": self.options.include, "--exclude": self.options.exclude}
        names = self.files.names if any(patterns.values()) else []
        return [
            f"no file matches {option} {pattern!r}"
            for option, found in patterns.items()
            for pattern in found
            if not any(fnmatchcase(name, pattern) for name in names)
        ]

    def record(self, pixels: np.ndarray, item: Item, key: str = "", **meta: Any) -> Record:
        """A record with the corpus's columns, the item's, and `meta`."""
        label = item.label if self.options.labels else None
        return Record(pixels, key or item.name, label, {**self.columns, "file": item.name, **item.meta, **meta})

    def cut(self, pixels: np.ndarray, item: Item) -> Iterator[Record | Rejected]:
        """A whole image as one record, or as tiles when it is larger than the option `tile`."""
        height, width = image_shape(pixels)
        tile = self.options.tile
        if min(height, width) < self.options.min_side:
            yield Rejected(item.name, "small", f"{height}x{width} is below min_side {self.options.min_side}")
        elif tile is None or max(height, width) <= tile:
            yield self.record(pixels, item)
        else:
            for top in starts(height, tile, self.options.overlap):
                for left in starts(width, tile, self.options.overlap):
                    rows, columns = slice(top, top + tile), slice(left, left + tile)
                    pairs = pixels.dtype == np.int16
                    part = pixels[..., rows, columns, :] if pairs else pixels[..., rows, columns]
                    yield self.tile(part, item, top, left)

    def tile(self, pixels: np.ndarray, item: Item, top: int, left: int, valid: np.ndarray | None = None) -> Any:
        """One tile of a scene as Record, or as Rejected when it is flat or too much of it is nodata.

        `valid` bool [H, W]: where the scene was imaged.
        """
        key = f"{item.name}@{top},{left}"
        amplitude = amplitude_of(pixels)
        if valid is not None and (share := 1 - float(valid.mean())) > self.options.max_nodata:
            return Rejected(key, "flat", f"{share:.0%} of the tile is nodata, max_nodata {self.options.max_nodata}")
        mean, std = float(amplitude.mean(dtype=np.float64)), float(amplitude.std(dtype=np.float64))
        if mean == 0 or std < self.options.min_std * mean:
            return Rejected(key, "flat", f"std {std:.4g}, mean {mean:.4g}, min_std {self.options.min_std}")
        return self.record(np.ascontiguousarray(pixels), item, key, top=top, left=left)


def starts(length: int, tile: int, overlap: int = 0) -> list[int]:
    """Where tiles begin along one side; neighbours share `overlap` pixels, the last tile ends at the border."""
    step = tile - overlap
    if step < 1:
        raise DataError(f"an overlap of {overlap} leaves nothing of a tile of {tile}", do="make it smaller than tile")
    found = list(range(0, max(length - tile, 0) + 1, step))
    return found if found[-1] + tile >= length else [*found, length - tile]


def check_counts(corpus: type[Corpus], items: Iterable[Item], where: str) -> None:
    """Raise DataError unless every published part that `items` touch has its published counts, class by class."""
    found: dict[str, Counter[str | None]] = {}
    for item in items:
        found.setdefault(item.part, Counter())[item.label] += 1
    wrong = []
    for name, labels in sorted(found.items()):
        expected = corpus.parts[name].counts if name in corpus.parts else None
        part = f"part {name}: " if name else ""
        if isinstance(expected, Mapping):
            for label in sorted({*expected, *filter(None, labels)}):
                if labels[label] != expected.get(label, 0):
                    wrong.append(
                        f"{part}class {label}: {labels[label]:,} files, published are {expected.get(label, 0):,}"
                    )
        elif expected is not None:
            totals = expected if isinstance(expected, tuple) else (expected,)
            if labels.total() not in totals:
                wrong.append(f"{part}{labels.total():,} files, published are {' or '.join(f'{n:,}' for n in totals)}")
    if wrong:
        raise DataError(
            "\n".join([f"{corpus.kind}: not the published counts", *(f"  {line}" for line in wrong)]),
            where=where,
            do="complete or correct the folder, or accept it as it is with --incomplete",
        )
