"""OpenSARShip 1 and 2: ship chips of Sentinel-1 with AIS records (Huang et al., JSTARS 2018)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np

from shards.errors import DataError
from shards.schema import Record, Rejected
from shards.sources.base import Corpus, Item, Options
from shards.sources.files import Files
from shards.sources.scenes import check_block, explained
from shards.sources.sidecar import known, numbers, parse_xml

_CHIP = re.compile(r"(?P<label>.+)_x(?P<x>\d+)_y(?P<y>\d+)(?:_(?P<channel>[vh]{2}))?\.tiff?", re.IGNORECASE)
# Channels of a chip by the polarisation code in the name of a Sentinel-1 product: SNAP writes them in this order.
_CHANNELS = {"DV": ("VH", "VV"), "DH": ("HH", "HV"), "SV": ("VV",), "SH": ("HH",)}


class OpenSarShip(Corpus):
    """Unpacked scene archives: `SCENE/Patch/CLASS_xX_yY.tif` and `SCENE/Ship.xml`.

    GRD chips are float32 DN [2, H, W] or [H, W]; SLC chips hold the parts of each channel in bands and become
    complex64. The renderings of the same chips (Patch_Cal, Patch_RGB, Patch_Uint8) are passed over. The vessels'
    identities (MMSI, name) are not taken into the metadata.
    """

    kind = "opensarship"
    description = "OpenSARShip 1 or 2: Sentinel-1 ship chips with AIS class"
    url = "http://opensar.sjtu.edu.cn"
    licence = "research; contains modified Copernicus Sentinel data 2015-2016"
    modules = ("rasterio",)
    columns: ClassVar = {"sensor": "Sentinel-1", "band": "C"}
    extra: ClassVar = {
        "product": "GRD or SLC (default GRD); a source holds one of them, for their pixels differ in type",
        "polarisation": "take this channel only, e.g. VV (default: all that a chip has)",
    }

    def __init__(self, files: Files, options: Options | None = None) -> None:
        super().__init__(files, options)
        self.product = self.options.extra.get("product", "GRD").upper()
        self.polarisation = self.options.extra.get("polarisation", "").upper()
        if self.product not in ("GRD", "SLC"):
            raise DataError(f"product={self.product} is unknown", do="choose product=GRD or product=SLC")
        if self.polarisation not in ("", "HH", "HV", "VH", "VV"):
            raise DataError(f"polarisation={self.polarisation} is unknown", do="choose from HH, HV, VH, VV")

    def items(self) -> Iterator[Item | Rejected]:
        """The chips of `Patch` of every scene of the chosen product, class from the name of the file."""
        ship_lists = {
            PurePosixPath(n).parent: n for n in self.files.names if PurePosixPath(n).name.lower() == "ship.xml"
        }
        for name in filter(self.wanted, self.files.names):
            path = PurePosixPath(name)
            folder = path.parent.parent
            if path.parent.name != "Patch":
                continue
            scene = folder.name or Path(self.files.root).resolve().name.removesuffix(".tar")
            code = re.match(r"S1[A-D]_\w\w_(GRD|SLC)\w?_\d\w([SD][VH])_", scene)
            chip = _CHIP.fullmatch(path.name)
            if code and code[1] != self.product:
                continue
            if not code or not chip:
                missing = "CLASS_xX_yY.tif" if code else "the folder of a Sentinel-1 product"
                yield Rejected(name, "bad", f"its name does not fit {missing}")
            elif folder not in ship_lists:
                yield Rejected(name, "bad", f"{name} has no {folder / 'Ship.xml'}")
            else:
                channels = (chip["channel"].upper(),) if chip["channel"] else _CHANNELS[code[2]]
                if not self.polarisation or self.polarisation in channels:
                    place = {"x": int(chip["x"]), "y": int(chip["y"]), "polarisation": "+".join(channels)}
                    said = {"platform": f"Sentinel-{scene[1:3]}", "product": code[1], "scene": scene}
                    yield Item(name, "", chip["label"], {**said, **place}, (ship_lists[folder],))

    def load(self, item: Item) -> Iterator[Record | Rejected]:
        """The chip, with what Ship.xml says about its ship."""
        meta, (ships,) = dict(item.meta), item.reads
        channels = meta["polarisation"].split("+")
        try:
            found = _ships(self.files.read(ships), ships).get((meta["x"], meta["y"]), {})
            pixels = _read(self.files.read(item.name), item.name, len(channels), meta["product"] == "SLC")
        except DataError as error:
            yield Rejected(item.name, "bad", error.what)
            return
        if self.polarisation:
            pixels = pixels[[channels.index(self.polarisation)]]
            meta["polarisation"] = self.polarisation
        pixels = pixels[0] if len(pixels) == 1 else pixels
        yield from self.cut(pixels, Item(item.name, item.part, item.label, {**meta, **found}))


@lru_cache(maxsize=8)
def _ships(data: bytes, name: str) -> dict[tuple[int, int], dict[str, Any]]:
    """What a Ship.xml says of each ship, by the centre of its chip in the scene; metres and degrees."""
    found = {}
    for ship in parse_xml(data, name).iter("ship"):
        x, y = numbers(ship, "Center_x"), numbers(ship, "Center_y")
        if x and y:
            angle, length, width = (
                next((value for value in numbers(ship, *tags) if value > 0), None)
                for tags in (("Incidence", "Incidence_angle", "IncidenceAngle"), ("Length",), ("Width",))
            )
            found[int(x[0]), int(y[0])] = known(look_angle=angle, length=length, width=width)
    return found


def _read(data: bytes, name: str, channels: int, pairs: bool) -> np.ndarray:
    """A chip as float32 or complex64 [C, H, W]; two bands of `pairs` are a channel. Raises DataError."""
    import rasterio

    with explained(name), warnings.catch_warnings(), rasterio.MemoryFile(data) as memory:
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with memory.open(driver="GTiff") as dataset:
            check_block(dataset.count * dataset.height * dataset.width * 8, "a chip", name)
            pixels = dataset.read()
    if pairs and len(pixels) == 2 * channels and pixels.dtype == np.float32:
        pixels = (pixels[0::2] + 1j * pixels[1::2]).astype(np.complex64)
    if len(pixels) != channels or pixels.dtype.name not in ("float32", "complex64"):
        what = f"{len(pixels)} bands of {pixels.dtype} are not {channels} channels of float32, or of pairs of them"
        raise DataError(what, where=name, do="exclude it")
    return pixels
