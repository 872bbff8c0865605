"""What the detection corpora share: images as they are, in tiles, or one chip around each annotated box."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import ClassVar, NamedTuple

import numpy as np

from shards.errors import DataError
from shards.formats import IMAGE_SUFFIXES, decode
from shards.schema import Record, Rejected, image_shape
from shards.sources.base import Corpus, Item, Options, Part
from shards.sources.files import Files

SIDE = 128
# The validation images of these sets are published to choose a model by, not to score it: they count as training data.
# `all` are the images of a set that says nothing about parts.
PARTS = {"train": Part("train"), "val": Part("train"), "test": Part("test"), "all": Part("pretrain")}


class Box(NamedTuple):
    """An annotated object: class, left, top, width and height in pixels."""

    label: str
    x: float
    y: float
    width: float
    height: float


class Detection(Corpus):
    """Base of the kinds with boxes. Items carry their boxes in `meta["boxes"]`, which records do not repeat."""

    parts = PARTS
    extra: ClassVar = {
        "chips": "tiles: whole images, or their tiles, without class (default); objects: one chip per box, with class",
        "side": f"side of the chip around a box, in pixels (default {SIDE})",
    }

    def __init__(self, files: Files, options: Options | None = None) -> None:
        super().__init__(files, options)
        self.chips = self.options.extra.get("chips", "tiles")
        side = self.options.extra.get("side", str(SIDE))
        if self.chips not in ("tiles", "objects"):
            raise DataError(f"chips={self.chips} is unknown", do="choose chips=tiles or chips=objects")
        if not side.isdecimal() or int(side) < 2:
            raise DataError(f"side={side} is no side of a chip", do="give a number of pixels from 2")
        self.side = int(side)

    def load(self, item: Item) -> Iterator[Record | Rejected]:
        """The tiles of an image, or a chip for each of its boxes."""
        boxes = item.meta["boxes"]
        plain = replace(item, meta={key: value for key, value in item.meta.items() if key != "boxes"})
        if self.chips == "tiles":
            yield from super().load(plain)
            return
        try:
            pixels = decode(self.files.read(item.name), item.name)
        except DataError as error:
            yield Rejected(item.name, "bad", error.what)
            return
        for number, box in enumerate(boxes):
            yield self._chip(pixels, plain, number, box)

    def _chip(self, pixels: np.ndarray, item: Item, number: int, box: Box) -> Record | Rejected:
        """The square of the option `side` centred on a box, moved inside the image where it would stick out."""
        key, (height, width) = f"{item.name}#{number}", image_shape(pixels)
        x, y = box.x + box.width / 2, box.y + box.height / 2
        if not (box.width > 0 and box.height > 0 and 0 <= x <= width and 0 <= y <= height):
            return Rejected(key, "bad", f"the box {box[1:]} is empty or outside its image of {height}x{width}")
        left, top = (max(0, min(round(at - self.side / 2), end - self.side)) for at, end in ((x, width), (y, height)))
        window = pixels[..., top : top + self.side, left : left + self.side]
        inside = [box.x - left, box.y - top, box.width, box.height]
        return self.record(window.copy(), replace(item, label=box.label), key, top=top, left=left, box=inside)

    def item(self, name: str, part: str, boxes: Iterable[Box]) -> Item | Rejected:
        """An image with its boxes; where chips of objects are asked for and it has none, it is left out as flat."""
        found = tuple(boxes)
        if self.chips == "objects" and not found:
            return Rejected(name, "flat", "no object is annotated in it")
        return Item(name, part or "all", meta={"boxes": found})

    def images(self) -> list[str]:
        """The paths of all images, wanted or not: what the user left out is not missing."""
        return [name for name in self.files.names if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]

    def side_files(self, suffix: str) -> list[str]:
        """The paths of all annotation files of one type, hidden and excluded ones left out."""
        return [
            name
            for name in self.files.names
            if name.lower().endswith(suffix)
            and not any(part.startswith(".") for part in PurePosixPath(name).parts)
            and not any(fnmatchcase(name, pattern) for pattern in self.options.exclude)
        ]


class ByEnd:
    """Paths found by their last parts: annotations name images without the folders above them."""

    def __init__(self, names: Iterable[str]) -> None:
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for name in names:
            self._by_name[PurePosixPath(name).name].append(name)

    def find(self, end: str, prefer: str = "") -> str | None:
        """The one path that ends in `end`; among several the one below a folder `prefer`, else None."""
        end = PurePosixPath(end.replace("\\", "/")).as_posix()
        found = [name for name in self._by_name[PurePosixPath(end).name] if f"/{name}".endswith(f"/{end}")]
        if len(found) > 1:
            found = [name for name in found if prefer and prefer in PurePosixPath(name).parent.name.lower()]
        return found[0] if len(found) == 1 else None
