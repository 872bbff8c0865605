"""The generic source: images in ImageFolder layout (the parent folder names the class)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import PurePosixPath

from shards.formats import IMAGE_SUFFIXES
from shards.schema import Record, Rejected
from shards.sources.base import Corpus, Item


class Folder(Corpus):
    """Every image of a folder, tar or bucket; an image in no folder has no class."""

    kind = "folder"
    description = "any folder, .tar or bucket of images; the parent folder of an image is its class"

    def items(self) -> Iterator[Item | Rejected]:
        """Every wanted file; one that is no image as Rejected."""
        for name in self.files.names:
            if not self.wanted(name):
                continue
            path = PurePosixPath(name)
            if path.suffix.lower() in IMAGE_SUFFIXES:
                yield Item(name, label=path.parent.name or None)
            else:
                yield Rejected(name, "bad", "not an image format that is read here (exclude it, or convert it)")

    def load(self, item: Item) -> Iterator[Record | Rejected]:
        """See Corpus.load; a TIFF that is no plain image may be a scene, which GDAL reads."""
        tiff = PurePosixPath(item.name).suffix.lower() in (".tif", ".tiff")
        for found in super().load(item):
            if tiff and isinstance(found, Rejected) and found.kind == "bad":
                found = replace(found, reason=f"{found.reason} (if it is a GeoTIFF: --kind geotiff)")
            yield found
