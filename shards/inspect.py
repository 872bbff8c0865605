"""Look at a catalog: one row of facts per source, and a sheet of its chips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from shards.addressed import permutation
from shards.catalog import Catalog
from shards.stream import Reader, Sample

_CELL, _TEXT, _GAP = 112, 14, 4
_GAMMA = 0.5  # amplitude → brightness: without it only the strongest scatterers would be seen


def summary(catalog: Catalog) -> list[dict[str, Any]]:
    """One row per source: name, split, samples, shards, MB, dtype, size range, classes, scale, mean, left out."""
    rows = []
    for s in catalog.sources:
        low, high = ("x".join(str(s.statistics[side][i]) for side in ("height", "width")) for i in (0, 2))
        rows.append(
            {
                "source": s.name,
                "split": s.split,
                "samples": s.samples,
                "shards": len(s.shards),
                "MB": round(sum(shard.bytes for shard in s.shards) / 1e6, 1),
                "dtype": s.dtype,
                "size": low if low == high else f"{low} to {high}",
                "classes": len(s.classes),
                "scale": s.amplitude.scale,
                "mean": round(s.statistics["mean"] / s.amplitude.scale, 4),
                "left out": sum(s.statistics["rejected"].values()),
            }
        )
    return rows


def contact_sheet(catalog: Catalog, path: Path | str, columns: int = 8, rows_per_source: int = 2) -> Path:
    """Write a PNG with `rows_per_source` rows of chips for every source, each chip under its class; returns its path.

    Brightness is the square root of the amplitude. Chips are chosen by a fixed shuffle and shrunk to fit, never grown.
    """
    reader, path = Reader(catalog), Path(path)
    step = _CELL + _TEXT + _GAP
    bands = [min(rows_per_source, -(-s.samples // columns)) for s in catalog.sources]
    height = sum(rows * step + _TEXT + _GAP for rows in bands)
    sheet = Image.new("L", (columns * (_CELL + _GAP) + _GAP, height), 24)
    draw, top, first = ImageDraw.Draw(sheet), 0, 0
    for source, rows in zip(catalog.sources, bands, strict=True):
        scale = f"scale {source.amplitude.scale:g}"
        title = f"{source.name} ({source.split}): {source.samples} x {source.dtype}, {scale}"
        draw.text((_GAP, top + 2), title, fill=255)
        top += _TEXT + _GAP
        order = permutation(0, "contact sheet", torch.zeros(1, dtype=torch.int64), source.samples)[0]
        for place, number in enumerate(order[: rows * columns].tolist()):
            row, column = divmod(place, columns)
            x, y = _GAP + column * (_CELL + _GAP), top + row * step
            sample = reader[first + number]
            sheet.paste(_thumbnail(sample), (x, y))
            size = "x".join(map(str, sample.pixels.shape[-2:]))
            name = size if sample.label < 0 else f"{catalog.classes[sample.label]} {size}"
            draw.text((x, y + _CELL), name[: _CELL // 6], fill=180)
        top += rows * step
        first += source.samples
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "PNG")
    return path


def _thumbnail(sample: Sample) -> Image.Image:
    """The first channel of a chip as an 8-bit picture of at most _CELL pixels a side."""
    amplitude = np.clip(sample.pixels[0].astype(np.float32) / sample.scale, 0, 1)
    picture = Image.fromarray(np.rint(255 * amplitude**_GAMMA).astype(np.uint8))
    picture.thumbnail((_CELL, _CELL), Image.Resampling.BOX)
    return picture
