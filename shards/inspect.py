"""Look at a catalog: one row of facts per source, and a sheet of its chips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from shards.addressed import permutation
from shards.catalog import Catalog, Source
from shards.reader import CorruptSample, Reader, Sample

_CELL, _TEXT, _GAP = 112, 14, 4
_GAMMA = 0.5  # amplitude → brightness: without it only the strongest scatterers would be seen


def summary(catalog: Catalog) -> list[dict[str, Any]]:
    """One row per source: name, split, samples, shards, MB, dtype, size range, classes, scale, mean, left out.

    With the channels, where a source has more than one.
    """
    channels = {s.name: s.statistics.get("channels", 1) for s in catalog.sources}
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
                **({"channels": channels[s.name]} if max(channels.values()) > 1 else {}),
                "size": low if low == high else f"{low} to {high}",
                "classes": len(s.classes),
                "scale": float(f"{s.amplitude.scale:.4g}"),
                "mean": float(f"{s.statistics['mean'] / s.amplitude.scale:.4g}"),
                "left out": sum(s.statistics["rejected"].values()),
            }
        )
    return rows


def contact_sheet(catalog: Catalog, path: Path | str, columns: int = 8) -> Path:
    """Write a PNG with a title and two rows of chips for every source; returns its path."""
    reader, bands, first = Reader(catalog), [], 0
    for source in catalog.sources:
        scale = f"scale {source.amplitude.scale:g}"
        rule = f"{scale}, {source.amplitude.decibels:g} dB" if source.amplitude.decibels else scale
        title = f"{source.name} ({source.split}): {source.samples} x {source.dtype}, {rule}"
        bands.append(source_sheet(reader, source, first, columns, title))
        first += source.samples
    sheet = Image.new("L", (bands[0].width, sum(band.height for band in bands)), 24)
    top = 0
    for band in bands:
        sheet.paste(band, (0, top))
        top += band.height
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "PNG")
    return path


def source_sheet(reader: Reader, source: Source, first: int, columns: int = 8, title: str = "") -> Image.Image:
    """Two rows of chips of one source, whose sample ids begin at `first`, each above its class and size.

    Chips are chosen by a fixed shuffle. Those of a row stand on one line, so that a label is right below its chip.
    A damaged one has its place, without a picture.
    """
    order = permutation(0, "contact sheet", torch.zeros(1, dtype=torch.int64), source.samples)[0, : 2 * columns]
    samples = [readable(reader, first + number) for number in order.tolist()]
    pictures = [thumbnail(sample, _CELL) for sample in samples]
    lines = range(0, len(pictures), columns)
    heights = [max(picture.height for picture in pictures[line : line + columns]) for line in lines]
    top = _TEXT + _GAP if title else _GAP
    size = columns * (_CELL + _GAP) + _GAP, top + sum(heights) + len(heights) * (_TEXT + _GAP)
    sheet = Image.new("L", size, 24)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, 2), title, fill=255)
    for line, height in zip(lines, heights, strict=True):
        for column, (sample, picture) in enumerate(list(zip(samples, pictures, strict=True))[line : line + columns]):
            x = _GAP + column * (_CELL + _GAP)
            sheet.paste(picture, (x + (_CELL - picture.width) // 2, top + height - picture.height))
            draw.text((x + _CELL // 2, top + height), _label(reader, sample)[: _CELL // 6], fill=180, anchor="ma")
        top += height + _TEXT + _GAP
    return sheet


def _label(reader: Reader, sample: Sample | None) -> str:
    """Class and size of a chip."""
    if sample is None:
        return "damaged"
    pixels = "x".join(map(str, sample.pixels.shape[-2:]))
    return pixels if sample.label < 0 else f"{reader.catalog.classes[sample.label]} {pixels}"


def readable(reader: Reader, number: int) -> Sample | None:
    """The sample, or None when its bytes are damaged."""
    try:
        return reader[number]
    except CorruptSample:
        return None


def values(sample: Sample) -> np.ndarray:
    """The first channel of a chip as a model is given it, float32 [H, W] in [0, 1]: see catalog.Amplitude."""
    share = sample.pixels[0].astype(np.float32) / sample.scale
    if sample.decibels:
        share = 1 + 20 * np.log10(np.maximum(share, 1e-12)) / sample.decibels
    return np.clip(share, 0, 1)


def thumbnail(sample: Sample | None, side: int) -> Image.Image:
    """The first channel as an 8-bit picture of at most `side` pixels a side; small chips grow by a whole factor.

    Brightness is the square root of the value, or the value where it is in decibels. None: a grey square that says so.
    """
    if sample is None:
        empty = Image.new("L", (side, side), 60)
        ImageDraw.Draw(empty).text((side // 2, side // 2), "damaged", fill=180, anchor="mm")
        return empty
    brightness = values(sample) ** (1 if sample.decibels else _GAMMA)
    picture = Image.fromarray(np.rint(255 * brightness).astype(np.uint8))
    if factor := side // max(picture.size):
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture.thumbnail((side, side), Image.Resampling.BOX)
    return picture
