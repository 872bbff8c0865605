"""FUSAR-Ship: Gaofen-3 chips matched to AIS, and sea and land (Hou et al., Sci. China Inf. Sci. 63:140303, 2020)."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, ClassVar

from shards.errors import DataError
from shards.schema import Rejected
from shards.sources.base import Item, Part
from shards.sources.named import Named

CLASSES = (
    *("Bridges", "CoastalLands_island", "LandPatches", "SeaClutterWaves", "SeaPatches"),
    *("Cargo", "Fishing", "Tanker", "OtherShip", "StrongFalseAlarms"),
)
TRAIN = dict(zip(CLASSES, (1023, 707, 1137, 1378, 1250, 366, 248, 150, 312, 299), strict=True))  # 6,870
TEST = dict(zip(CLASSES, (438, 303, 487, 590, 535, 156, 106, 64, 133, 128), strict=True))  # 2,940
NUMBERS = ("centerLookAngle", "heightspace", "widthspace", "length", "width")
FIELDS = ("id", "polarMode", "centerLookAngle", "heightspace", "widthspace", "path")


class FusarShip(Named):
    """512 x 512 chips, either as released, `CATEGORY[/SUBCATEGORY]/NAME.tiff` with `meta.csv`, or as the ten-class
    benchmark used with SAR-JEPA, `{Train,Val}/CLASS/...` (its Val is the test part).

    As released nothing is split, and the class is the category: from meta.csv where it has the chip, else the folder
    above the subcategory (chips called Ship_...), else the chip's own folder. `look_angle` is the incidence angle at
    the scene centre; polarMode (DH, DV: not one polarisation of the schema) is kept as `polar_mode`.
    """

    kind = "fusar-ship"
    description = "FUSAR-Ship: 512 x 512 chips of ships, sea and land, Gaofen-3; ten-class split 6,870 / 2,940"
    url = "https://emwlab.fudan.edu.cn/resources/list.htm"
    licence = "research"
    parts: ClassVar = {"train": Part("train", TRAIN), "test": Part("test", TEST)}
    columns: ClassVar = {"sensor": "Gaofen-3", "band": "C", "product": "chip", "calibration": "uncalibrated"}
    pattern = re.compile(
        rf"(?:^|/)(?:(?P<split>Train|Val|Test)/(?P<label>{'|'.join(CLASSES)})/(?:[^/]+/)*[^/]+\.(?:jpe?g|png|tiff?)$"
        r"|[^/.][^/]*/(?:[^/]+/)?[^/]+\.tiff?$)"
    )
    expected = "Cargo/BulkCarrier/Ship_C01S02N0001.tiff, or Train/Cargo/NAME.png with a benchmark class"

    def items(self) -> Iterator[Item | Rejected]:
        """Every chip, with what meta.csv knows of it; a meta.csv that cannot be used as Rejected."""
        yield from self._table[1]
        yield from super().items()

    def item(self, name: str, match: re.Match[str]) -> Item:
        """Part and class from the folders, the rest from meta.csv."""
        path = PurePosixPath(name)
        row = self._table[0].get(path.stem, {})
        meta = {key: value for key, value in row.items() if key != "category"}
        if match["split"]:
            return Item(name, "train" if match["split"] == "Train" else "test", match["label"], meta)
        above = path.parent.parent.name if path.name.startswith("Ship_") else ""
        return Item(name, label=row.get("category") or above or path.parent.name, meta=meta)

    @cached_property
    def _table(self) -> tuple[dict[str, dict[str, Any]], list[Rejected]]:
        """What every meta.csv of the source says of a chip, by its name without suffix, and which are unusable."""
        rows: dict[str, dict[str, Any]] = {}
        refused = []
        for name in (name for name in self.files.names if PurePosixPath(name).name == "meta.csv"):
            try:
                table = csv.DictReader(io.StringIO(self.files.read(name).decode("utf-8-sig", "replace")))
                if missing := [field for field in FIELDS if field not in (table.fieldnames or ())]:
                    raise ValueError(f"no column {', '.join(missing)}")
                rows |= {PurePosixPath(row["id"] or "").stem: described(row) for row in table}
            except (csv.Error, ValueError, DataError) as error:
                refused.append(Rejected(name, "bad", f"expected columns {', '.join(FIELDS)}: {error}"))
        return rows, refused


def described(row: dict[str, str | None]) -> dict[str, Any]:
    """Columns of one row of meta.csv; what is empty or no number is left out."""
    numbers = {key: _number(row.get(key)) for key in NUMBERS}
    mode = (row["polarMode"] or "").strip()
    found = {
        "look_angle": numbers["centerLookAngle"],
        "spacing": max(filter(None, (numbers["heightspace"], numbers["widthspace"])), default=None),
        "length": numbers["length"],
        "width": numbers["width"],
        "mmsi": (row.get("mmsi") or "").strip(),
        "polar_mode": mode,
        "polarisation": mode if mode in ("HH", "HV", "VH", "VV") else "",
        "category": re.split(r"[\\/]", (row["path"] or "").strip())[0],
    }
    return {key: value for key, value in found.items() if value not in (None, "")}


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
