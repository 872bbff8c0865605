"""SAMPLE: measured MSTAR chips paired with synthetic ones (Lewis et al., Proc. SPIE 10987, 2019)."""

from __future__ import annotations

import re
from typing import ClassVar

from shards.sources.base import Item, Part
from shards.sources.named import Named

MEASURED = {"product": "chip"}
SYNTHETIC = {"product": "simulated"}


class Sample(Named):
    """128 x 128 chips as published: `png_images/{decibel,qpm}/{real,synth}/CLASS/*.png` and complex
    `mat_files/{real,synth}/CLASS/*.mat` (variable `complex_img`), the angles in the names.

    The renderings are parts, since they show the same chips: decibel and qpm (quarter-power magnitude) make up the
    5,380 images used for pretraining; leave some out with --include. The measured half are MSTAR chips taken at
    depressions of 14 to 17 degrees: do not pretrain on it before a test on MSTAR without looking at the audit.
    """

    kind = "sample"
    description = "SAMPLE: 1,345 measured and 1,345 synthetic chips of 10 vehicles, two renderings and complex"
    url = "https://github.com/benjaminlewis-afrl/SAMPLE_dataset_public"
    licence = "Distribution A: approved for public release"
    parts: ClassVar = {name: Part("pretrain", 2_690) for name in ("decibel", "qpm", "complex")}
    columns: ClassVar = {"band": "X", "polarisation": "HH", "calibration": "uncalibrated"}
    pattern = re.compile(
        r"(?:png_images/(?P<rendering>decibel|qpm)|mat_files)/(?P<origin>real|synth)/(?P<label>\w+)/"
        r"(?P=label)_(?P=origin)_[A-Z]_elevDeg_(?P<elevation>\d{3})_azCenter_(?P<azimuth>\d{3})_\d+"
        r"_serial_(?P<serial>\w+)\.(?(rendering)png|mat)$"
    )
    expected = (
        "png_images/qpm/real/t72/t72_real_A_elevDeg_016_azCenter_013_77_serial_812.png, or the like under "
        "png_images/decibel or mat_files (.mat)"
    )

    def item(self, name: str, match: re.Match[str]) -> Item:
        """Part, class and angles from the path; the elevation of the radar is its depression seen from the target."""
        meta = {
            **(MEASURED if match["origin"] == "real" else SYNTHETIC),
            "depression": float(match["elevation"]),
            "azimuth": float(match["azimuth"]),
            "serial": match["serial"],
        }
        return Item(name, match["rendering"] or "complex", match["label"], meta)
