"""Detection sets with COCO annotations: HRSID, SARDet-100K and others."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from shards.errors import DataError
from shards.schema import Rejected
from shards.sources.base import Item
from shards.sources.detection import Box, ByEnd, Detection
from shards.sources.sidecar import parse_json


class Coco(Detection):
    """Images with one or several COCO .json files.

    A file whose name holds one of train, val and test gives its images that part. A file that holds none or several of
    them (HRSID's `train_test2017.json`) only adds the images that no other file lists, as part `all`.
    """

    kind = "coco"
    description = "images with COCO boxes (HRSID, SARDet-100K): whole, in tiles, or one chip per box"
    url = "https://github.com/chaozhong2010/HRSID, https://github.com/zcablii/SARDet_100K"
    licence = "HRSID: GPL-3.0; SARDet-100K: research, with the terms of the ten sets in it"

    def items(self) -> Iterator[Item | Rejected]:
        """Every image that an annotation file lists, and as Rejected what does not fit together."""
        images, claims = self.images(), dict[str, str]()
        find = ByEnd(images).find
        annotations = self.side_files(".json")
        if not annotations:
            yield Rejected("*.json", "bad", "no annotation file (*.json) found")
            return
        for name in sorted(annotations, key=lambda name: (not part_of(name), name)):
            part = part_of(name)
            try:
                listed = list(_read(parse_json(self.files.read(name), name), name))
            except DataError as error:
                yield Rejected(name, "bad", error.what)
                continue
            for file_name, boxes in listed:
                image = find(file_name, part)
                if image is None:
                    yield Rejected(
                        f"{name}: {file_name}", "bad", f"{name} names {file_name}: there is not one such image"
                    )
                elif image not in claims:
                    claims[image] = name
                    if self.wanted(image):
                        yield self.item(image, part, boxes)
                elif part and self.wanted(image):
                    yield Rejected(image, "bad", f"{claims[image]} and {name} both list it")
        for image in sorted(set(filter(self.wanted, images)) - set(claims)):
            yield Rejected(image, "bad", "no annotation file lists it")


def part_of(name: str) -> str:
    """The one of train, val and test that a file's name holds as a word, or nothing."""
    words = set(re.split(r"[^a-z]+", PurePosixPath(name).stem.lower())) & {"train", "val", "test"}
    return words.pop() if len(words) == 1 else ""


def _read(content: Any, name: str) -> Iterator[tuple[str, list[Box]]]:
    """Each image of a COCO file by the name it is given there, with its boxes; raises DataError."""
    try:
        labels = {entry["id"]: str(entry["name"]) for entry in content["categories"]}
        boxes: dict[Any, list[Box]] = defaultdict(list)
        for entry in content["annotations"]:
            x, y, width, height = (float(value) for value in entry["bbox"])
            boxes[entry["image_id"]].append(Box(labels[entry["category_id"]], x, y, width, height))
        yield from [(str(entry["file_name"]), boxes[entry["id"]]) for entry in content["images"]]
    except (KeyError, TypeError, ValueError) as error:
        what = f"{name} is not a COCO file: {type(error).__name__}: {error}"
        raise DataError(what, where=name, do="exclude it, or fetch it again") from error
