"""SAR-ACD: civil aircraft at airports, Gaofen-3 (Sun et al., IEEE TGRS 60, 2022)."""

from __future__ import annotations

import re
from typing import ClassVar

from shards.sources.base import Item, Part
from shards.sources.named import Named

COUNTS = {"A220": 464, "A320-321": 510, "A330": 512, "ARJ21": 514, "B737": 528, "B787": 504}


class SarAcd(Named):
    """8-bit JPEG chips of 32 to 200 pixels in six class folders; no split is published.

    The folders of B737 and B787 may be called Boeing737 and Boeing787, that of A320/321 just A320. The release holds
    22 groups of identical images, which the audit lists; studies of five classes leave out A320/321.
    """

    kind = "sar-acd"
    description = "SAR-ACD: 3,032 chips of 6 types of aircraft, Gaofen-3 HH at 1 m; no fixed split"
    url = "https://github.com/AICyberTeam/SAR-ACD"
    licence = "open to the community, no formal licence"
    parts: ClassVar = {"": Part("", COUNTS)}
    columns: ClassVar = {"sensor": "Gaofen-3", "band": "C", "polarisation": "HH", "product": "chip"}
    pattern = re.compile(
        r"(?:^|/)(?P<label>A220|A320(?:[ /_-]?A?321)?|A330|ARJ21|(?:B|Boeing)[ _-]?7[38]7)/[^/]+\.(?:jpe?g|png|tiff?)$",
        re.IGNORECASE,
    )
    expected = f"CLASS/*.jpg with a class of {', '.join(COUNTS)}"

    def item(self, name: str, match: re.Match[str]) -> Item:
        """The class from its folder."""
        folder = match["label"].upper()
        label = f"B{folder[-3:]}" if folder.startswith("B") else "A320-321" if folder.startswith("A320") else folder
        return Item(name, label=label)
