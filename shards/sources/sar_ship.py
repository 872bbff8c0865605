"""SAR-Ship-Dataset: ship chips of Gaofen-3 and Sentinel-1 (Wang et al., Remote Sensing 11:765, 2019)."""

from __future__ import annotations

import re
from typing import ClassVar

from shards.sources.base import Item, Part
from shards.sources.named import Named

SENSORS = {"gao": "Gaofen-3", "sen": "Sentinel-1"}


class SarShip(Named):
    """JPEG chips of 256 x 256 in one folder, YOLO boxes in `.txt` files beside them; every chip holds ships: no class.

    Names may begin with sensor and polarisation (`Gao_ship_hh_...`, `Sen_ship_vv_...`): read where they are there.
    39,729 chips from 102 Gaofen-3 and 108 Sentinel-1 scenes; an earlier release had 43,819.
    """

    kind = "sar-ship"
    description = "SAR-Ship-Dataset: 39,729 ship chips of Gaofen-3 and Sentinel-1, 256 x 256, unlabelled"
    url = "https://github.com/CAESAR-Radi/SAR-Ship-Dataset"
    licence = "research"
    parts: ClassVar = {"": Part("pretrain", (39_729, 43_819))}
    columns: ClassVar = {"band": "C", "product": "chip", "calibration": "uncalibrated"}
    pattern = re.compile(r"(?:^|/)(?:(?P<sensor>gao|sen)_ship_(?P<mode>[hv]{2})_)?[^/]+\.jpe?g$", re.IGNORECASE)
    expected = "a flat folder of .jpg chips, e.g. Gao_ship_hh_0201608.jpg"

    def item(self, name: str, match: re.Match[str]) -> Item:
        """Sensor and polarisation from the name."""
        if match["sensor"] is None:
            return Item(name)
        return Item(name, meta={"sensor": SENSORS[match["sensor"].lower()], "polarisation": match["mode"].upper()})
