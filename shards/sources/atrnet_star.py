"""ATRNet-STAR (NUDT4MSTAR): 40 civilian vehicles seen from the air in X and Ku band (Liu et al., arXiv 2501.13354)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import ClassVar

from shards.errors import DataError
from shards.schema import Record, Rejected
from shards.sources.base import Corpus, Item, Options, Part
from shards.sources.files import Files
from shards.sources.sidecar import known, numbers, parse_xml, texts

_CALIBRATION = {"ground": "8 bit, nonlinearly quantised by the publisher", "slant": "uncalibrated"}
_SUFFIXES = {"ground": (".tif", ".tiff"), "slant": (".mat",)}
_CHIP = re.compile(r"(?P<band>X|KU)_(?P<polarisation>[HV]{2})_(?P<depression>\d+)_(?P<azimuth>\d+)_\w+", re.IGNORECASE)


class AtrnetStar(Corpus):
    """`CONFIGURATION/{train,test}/CLASS/BAND_POLARISATION_DEPRESSION_AZIMUTH_ID.{tif,mat,xml}`.

    The innermost folder of the source that begins with train or test says the part; else a source of that very name.
    Ground range is uint8 of 128 pixels, nonlinearly quantised by its publisher; slant range is complex64. SOC-40 is the
    whole set; the counts are those of its ground range, the other configurations and the slant range have fewer.
    """

    kind = "atrnet-star"
    description = "ATRNet-STAR: 40 vehicle types in X and Ku band, ground range (8 bit) or slant range (complex)"
    url = "https://huggingface.co/datasets/waterdisappear/ATRNet-STAR"
    licence = "not verified"
    parts: ClassVar = {
        "train": Part("train", 68_091),
        "test": Part("test", 29_284),
    }
    columns: ClassVar = {"sensor": "airborne SAR", "platform": "unmanned aircraft"}
    extra: ClassVar = {"range": "ground (8 bit, default) or slant (complex)"}

    def __init__(self, files: Files, options: Options | None = None) -> None:
        super().__init__(files, options)
        self.range = self.options.extra.get("range", "ground")
        if self.range not in _SUFFIXES:
            raise DataError(f"range={self.range} is unknown", do="choose range=ground or range=slant")

    def items(self) -> Iterator[Item | Rejected]:
        """Every chip of the chosen range, class from its folder; one without its .xml as Rejected."""
        above = Path(self.files.root).resolve().name.lower().removesuffix(".tar")
        above = above if above in ("train", "test") else ""  # a source may be one part
        for name in filter(self.wanted, self.files.names):
            path = PurePosixPath(name)
            if path.suffix.lower() not in _SUFFIXES[self.range]:
                continue
            chip, annotation = _CHIP.fullmatch(path.stem), path.with_suffix(".xml").as_posix()
            folders = [folder.lower() for folder in (above, *path.parent.parts)]
            part = next((p for folder in folders[-2::-1] for p in ("train", "test") if folder.startswith(p)), "")
            if not chip or not part:
                missing = "BAND_POLARISATION_DEPRESSION_AZIMUTH_ID" if part else "train/CLASS or test/CLASS"
                yield Rejected(name, "bad", f"its path does not fit {missing}")
                continue
            if annotation not in self.files:
                yield Rejected(name, "bad", f"{name} has no annotation {annotation}")
                continue
            meta = {
                "band": "Ku" if chip["band"].upper() == "KU" else "X",
                "polarisation": chip["polarisation"].upper(),
                "depression": float(chip["depression"]),
                "azimuth": float(chip["azimuth"]),
                "product": "SLC" if self.range == "slant" else "chip",
                "calibration": _CALIBRATION[self.range],
            }
            yield Item(name, part, path.parent.name, meta, (annotation,))

    def load(self, item: Item) -> Iterator[Record | Rejected]:
        """The chip, with what its .xml says; read here, not in items, so that processes share the 100,000 files."""
        (annotation,) = item.reads
        try:
            root = parse_xml(self.files.read(annotation), annotation)
        except DataError as error:
            yield Rejected(item.name, "bad", error.what)
            return
        said = known(
            # The name of a kind of ground, not the id of an image: the published split has every one on both sides.
            background=next(texts(root, "scene_name"), None),
            resolution=max(numbers(root, "range_resolution", "cross_range_resolution"), default=None),
        )
        yield from super().load(replace(item, meta={**item.meta, **said}))
