"""MSTAR public targets: raw Phoenix chips of AFRL, and image copies of them (Ross et al., Proc. SPIE 3370, 1998)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from shards.errors import DataError
from shards.formats import check, decode
from shards.phoenix import decode_phoenix, is_phoenix
from shards.schema import Record, Rejected
from shards.sources.base import Item, Options, Part
from shards.sources.files import Files
from shards.sources.named import Named

CLASSES = ("2S1", "BMP2", "BRDM2", "BTR60", "BTR70", "D7", "T62", "T72", "ZIL131", "ZSU234")
TRAIN = dict(zip(CLASSES, (299, 233, 298, 256, 233, 299, 299, 232, 299, 299), strict=True))  # 2,747 at 17 degrees
TEST = dict(zip(CLASSES, (274, 195, 274, 195, 196, 274, 273, 196, 274, 274), strict=True))  # 2,425 at 15 degrees
STANDARD = {"BMP2": "9563", "T72": "132"}  # the vehicles of the ten-class standard; others are variants
NUMBERS = {"azimuth": "TargetAz", "depression": "MeasuredDepression"}
SPACINGS = ("RangePixelSpacing", "CrossRangePixelSpacing")


class Mstar(Named):
    """The ten-class standard (SOC): trained on chips at 17 degrees depression, tested on chips at 15 degrees.

    Raw: `{17,15}_DEG/COLx/SCENEy/TARGET/NAME.NNN`, or `{17,15}_DEG/TARGET/SN_SERIAL/NAME.NNN`, under any folder;
    pixels are complex. Copies: `{train,test}/CLASS/*.jpeg` (also .jpg, .png), with folders for depression and serial
    allowed. Of BMP2 and T72 the vehicles 9563 and 132 count; --option variants=yes takes all, as parts of their own.
    Chips at other depressions and of other targets (SLICY, ...) are the part "other", meant for pretraining.
    """

    kind = "mstar"
    description = "MSTAR: 2,747 train (17 deg) and 2,425 test (15 deg) chips of 10 vehicles, raw or as images"
    url = "https://www.sdms.afrl.af.mil/index.php?collection=mstar"
    licence = "public release by AFRL SDMS, research"
    parts: ClassVar = {
        "train": Part("train", TRAIN),
        "test": Part("test", TEST),
        "train-variants": Part("train", {**TRAIN, "BMP2": 698, "T72": 691}),
        "test-variants": Part("test", {**TEST, "BMP2": 587, "T72": 582}),
        "other": Part("pretrain"),
    }
    columns: ClassVar = {
        "sensor": "STARLOS",
        "platform": "Twin Otter",
        "band": "X",
        "polarisation": "HH",
        "product": "chip",
    }
    extra: ClassVar = {"variants": "yes: every serial number of BMP2 and T72 (3,671 train, 3,203 test); default no"}
    pattern = re.compile(
        r"(?:(?:^|[/-])(?P<split>train|test)[^/]*/)?(?:(?P<angle>\d\d)_DEG/(?:COL\d+/SCENE\d+/)?)?"
        r"(?P<target>[A-Z0-9]+(?:[_-]\d+)*)(?:[/_]SN_(?P<serial>\w+))?/[^/]+\.(?:\d{3}|jpe?g|png)$",
        re.IGNORECASE,
    )
    expected = "17_DEG/COL1/SCENE1/BRDM_2/NAME.001, 17_DEG/T72/SN_132/NAME.015 or train/T72/NAME.jpeg"

    def __init__(self, files: Files, options: Options | None = None) -> None:
        super().__init__(files, options)
        if (chosen := self.options.extra.get("variants", "no")) not in ("yes", "no"):
            raise DataError(f"the option variants of mstar is {chosen!r}", do="use yes or no")
        self.variants = chosen == "yes"

    def item(self, name: str, match: re.Match[str]) -> Item | Rejected:
        """Part and class from the folders; a variant that was not asked for as Rejected."""
        label = re.sub(r"[_-]", "", match["target"]).upper()
        angle = int(match["angle"]) if match["angle"] else {"train": 17, "test": 15}.get((match["split"] or "").lower())
        if angle is None:
            return Rejected(name, "bad", f"neither depression nor split in its path; expected {self.expected}")
        serial = (match["serial"] or STANDARD.get(label, "")).upper()
        meta = {"depression": float(angle), **({"serial": serial} if match["serial"] else {})}
        if label not in CLASSES or angle not in (15, 17):
            return Item(name, "other", label, meta)
        if not self.variants and serial != STANDARD.get(label, serial):
            reason = f"{label} {serial} is a variant of the standard vehicle {STANDARD[label]}: variants=yes takes it"
            return Rejected(name, "other", reason)
        return Item(name, ("train" if angle == 17 else "test") + ("-variants" if self.variants else ""), label, meta)

    def load(self, item: Item) -> Iterator[Record | Rejected]:
        """A raw chip with what its header says, or an image copy."""
        try:
            data = self.files.read(item.name)
            if is_phoenix(data):
                pixels, header = decode_phoenix(data, item.name)
                check(pixels, item.name)
            else:
                pixels, header = decode(data, item.name), {}
        except DataError as error:
            yield Rejected(item.name, "bad", error.what)
            return
        yield from self.cut(pixels, replace(item, meta={**item.meta, **described(header)}))


def described(header: Mapping[str, str]) -> dict[str, Any]:
    """Columns and details from a Phoenix header; fields that are absent or no numbers are left out."""
    numbers = {column: _number(header.get(field, "")) for column, field in NUMBERS.items()}
    spacings = [_number(header.get(field, "")) for field in SPACINGS]
    numbers["spacing"] = max((value for value in spacings if value), default=None)
    texts = {"polarisation": header.get("Polarization", "")[:2], "scene": header.get("ParentScene", "")}
    texts |= {"target_type": header.get("TargetType", ""), "serial": header.get("TargetSerNum", "").upper()}
    return {key: value for key, value in {**numbers, **texts}.items() if value not in (None, "")}


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
