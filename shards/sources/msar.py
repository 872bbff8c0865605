"""MSAR-1.0: detection chips of ships, tanks, aircraft and bridges, HISEA-1 and Gaofen-3 (Chen et al., 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import ClassVar

from shards.errors import DataError
from shards.schema import Rejected
from shards.sources.base import Corpus, Item, Part
from shards.sources.sidecar import parse_xml


class Msar(Corpus):
    """`JPEGImages/NAME.jpg` (24 bit, three equal channels, 256 x 256; some bridges 2048 x 2048: use --tile) and
    `Annotations/NAME.xml` (Pascal VOC), under any folder.

    A chip holds many objects: its class is that of its boxes when they have only one, and it has none otherwise.
    """

    kind = "msar"
    description = "MSAR-1.0: 28,449 chips with ships, oil tanks, aircraft, bridges; HISEA-1 and Gaofen-3"
    url = "https://radars.ac.cn/web/data/getData?dataType=MSAR"
    licence = "research"
    parts: ClassVar = {"": Part("pretrain", (28_449, 28_499))}
    columns: ClassVar = {"band": "C", "product": "chip", "calibration": "uncalibrated"}

    def items(self) -> Iterator[Item | Rejected]:
        """Every image with the class of its annotation; annotations without an image, or damaged, as Rejected."""
        for name in self.files.names:
            path = PurePosixPath(name)
            if path.suffix.lower() == ".xml" and path.parent.name == "Annotations" and not path.name.startswith("."):
                image = f"{name.removesuffix(f'Annotations/{path.name}')}JPEGImages/{path.stem}.jpg"
                if image not in self.files and self.wanted(image):
                    yield Rejected(name, "bad", f"its image {image} is missing")
            elif self.wanted(name):
                if path.suffix.lower() != ".jpg" or path.parent.name != "JPEGImages":
                    expected = "JPEGImages/*.jpg and Annotations/*.xml"
                    yield Rejected(name, "bad", f"not a file of {self.kind}; expected {expected}")
                    continue
                annotation = f"{name.removesuffix(f'JPEGImages/{path.name}')}Annotations/{path.stem}.xml"
                label = None
                if self.options.labels and annotation in self.files:
                    try:
                        label = only_class(self.files.read(annotation), annotation)
                    except DataError as error:
                        yield Rejected(annotation, "bad", error.what)
                yield Item(name, label=label)


def only_class(xml: bytes, name: str) -> str | None:
    """The class that all boxes of a Pascal VOC annotation share, or None; raises DataError when it is no such file."""
    names = {(box.findtext("name") or "").strip().lower() for box in parse_xml(xml, name).iter("object")}
    return names.pop() or None if len(names) == 1 else None
