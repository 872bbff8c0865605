"""Detection sets with Pascal VOC annotations: SSDD, LS-SSDD and others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from shards.errors import DataError
from shards.schema import Rejected
from shards.sources.base import Item
from shards.sources.coco import part_of
from shards.sources.detection import Box, ByEnd, Detection
from shards.sources.sidecar import numbers, parse_xml, texts


class Voc(Detection):
    """`JPEGImages` with one `Annotations/STEM.xml` each, and the parts of `ImageSets/Main/{train,val,test}.txt`.

    Without lists, a folder called JPEGImages_train or Annotations_test gives the part; SSDD comes in both forms.
    """

    kind = "voc"
    description = "images with Pascal VOC boxes (SSDD, LS-SSDD): whole, in tiles, or one chip per box"
    url = "https://github.com/TianwenZhang0825/Official-SSDD"
    licence = "research"

    def items(self) -> Iterator[Item | Rejected]:
        """Every image with its boxes, and as Rejected what does not fit together."""
        images, annotations = self.images(), self.side_files(".xml")
        find, used = ByEnd(annotations).find, set[str]()
        listed, problems = self._lists(images)
        yield from problems
        for image in filter(self.wanted, images):
            path = PurePosixPath(image)
            folder = path.parent.name.replace("JPEGImages", "Annotations")
            wanted = path.parent.with_name(folder) / f"{path.stem}.xml" if folder else path.with_suffix(".xml")
            annotation = wanted.as_posix() if wanted.as_posix() in self.files else find(f"{path.stem}.xml")
            if annotation is None:
                yield Rejected(image, "bad", f"{image} has no annotation {wanted}")
                continue
            used.add(annotation)
            parts = listed.get(path.stem, set()) if listed else {part_of(path.parent.name)}
            if len(parts) != 1:
                where = "several lists" if parts else "no list"
                yield Rejected(image, "bad", f"{where} of ImageSets/Main name it")
                continue
            try:
                yield self.item(image, parts.pop(), self._boxes(annotation))
            except DataError as error:
                yield Rejected(annotation, "bad", error.what)
        stems = {PurePosixPath(image).stem for image in images}
        for name in annotations:
            if name not in used and (stem := PurePosixPath(name).stem) not in stems:
                yield Rejected(name, "bad", f"{name} belongs to no image {stem}")

    def _boxes(self, name: str) -> list[Box]:
        """The boxes of an annotation; raises DataError."""
        boxes = []
        for number, entry in enumerate(parse_xml(self.files.read(name), name).iter("object")):
            label = next(texts(entry, "name"), "")
            sides = [numbers(entry, side)[:1] for side in ("xmin", "ymin", "xmax", "ymax")]
            if not label or not all(sides):
                what = f"{name}: object {number} has no name or no box"
                raise DataError(what, where=name, do="correct or exclude it")
            left, top, right, bottom = (side[0] for side in sides)
            boxes.append(Box(label, left, top, right - left, bottom - top))
        return boxes

    def _lists(self, images: list[str]) -> tuple[dict[str, set[str]], list[Rejected]]:
        """Stem → parts that list it, and the stems without image; both empty when the set came without lists."""
        stems = {PurePosixPath(image).stem for image in images}
        listed: dict[str, set[str]] = {}
        problems = []
        for name in self.side_files(".txt"):
            path = PurePosixPath(name)
            if path.stem not in ("train", "val", "test") or path.parts[-3:-1] != ("ImageSets", "Main"):
                continue
            for stem in self.files.read(name).decode("utf-8", "replace").split():
                if stem in stems:
                    listed.setdefault(stem, set()).add(path.stem)
                else:
                    problems.append(Rejected(f"{name}: {stem}", "bad", f"{name} names {stem}: no such image"))
        return listed, problems
