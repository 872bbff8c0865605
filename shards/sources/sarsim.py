"""SARSim: simulated X-band chips of vehicles (Malmgren-Hansen et al., IEEE GRSL 14(9), 2017)."""

from __future__ import annotations

import re
from typing import ClassVar

from shards.sources.base import Item, Part
from shards.sources.named import Named


class SarSim(Named):
    """8-bit PNG chips of 139 x 139; the file name carries the background (grass, medium, roads) and the vehicle.

    How the two are joined is not documented: taken as `BACKGROUND_VEHICLE...png`, the vehicle being the letters after
    the background, in any folder. A name without such letters gives a chip without a class.
    """

    kind = "sarsim"
    description = "SARSim: 21,168 simulated X-band chips of 7 types of vehicle on 3 backgrounds, 139 x 139"
    url = "https://doi.org/10.1109/LGRS.2017.2717486"
    licence = "research"
    parts: ClassVar = {"": Part("pretrain", 21_168)}
    columns: ClassVar = {"sensor": "SARSim", "band": "X", "product": "simulated", "calibration": "uncalibrated"}
    pattern = re.compile(
        r"(?:^|/)(?:[^/]*_)?(?P<background>grass|medium|roads)_(?P<vehicle>[a-z]{2,})?[^/]*\.png$", re.IGNORECASE
    )
    expected = "BACKGROUND_VEHICLE...png with grass, medium or roads as background"

    def item(self, name: str, match: re.Match[str]) -> Item:
        """The vehicle is the class."""
        label = match["vehicle"].lower() if match["vehicle"] else None
        return Item(name, label=label, meta={"background": match["background"].lower()})
