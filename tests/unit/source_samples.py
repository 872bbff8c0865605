"""Small sources for the tests: images and scenes as files, tars of them, and what a kind of source makes of them."""

from __future__ import annotations

import pickle
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shards.schema import Record, Rejected
from shards.sources import corpus
from shards.sources.base import Item, Options
from shards.sources.files import Files

WIDE, HIGH = 60, 40


def image(path: Path, seed: int = 0, colour: bool = False) -> np.ndarray:
    """Write an 8-bit PNG or JPEG of 40 x 60 pixels and return it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(1, 255, (HIGH, WIDE)).astype(np.uint8)
    Image.fromarray(np.stack([pixels] * 3, axis=-1) if colour else pixels).save(path)
    return pixels


GDAL_DTYPES = {"int16": "complex_int16"}
BOMB = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]><x>&b;</x>'


def speckle(*shape: int, dtype: str = "uint16", seed: int = 0) -> np.ndarray:
    """Pixels of a schema dtype without a single zero."""
    random = np.random.default_rng(seed)
    if dtype == "complex64":
        return (random.normal(size=shape) + 1j * random.normal(size=shape)).astype(np.complex64)
    if dtype == "int16":
        return random.integers(1, 30_000, (*shape, 2)).astype(np.int16)
    return random.integers(1, 200, shape).astype(dtype)


def write_tiff(path: Path, pixels: np.ndarray, tags: dict[str, str] | None = None, **profile: Any) -> Path:
    """A GeoTIFF of [H, W] or [C, H, W] pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = GDAL_DTYPES.get(pixels.dtype.name, pixels.dtype.name)
    if pixels.dtype == np.int16:
        pixels = pixels[..., 0].astype(np.float32) + 1j * pixels[..., 1].astype(np.float32)
    bands = pixels.reshape(-1, *pixels.shape[-2:])
    count, height, width = bands.shape
    rasterio = pytest.importorskip("rasterio")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(
            path, "w", driver="GTiff", height=height, width=width, count=count, dtype=dtype, **profile
        ) as file:
            file.write(bands)
            if tags:
                file.update_tags(**tags)
    return path


def to_tar(folder: Path) -> Path:
    path = folder.with_name(f"{folder.name}.tar")
    with tarfile.open(path, "w") as archive:
        for path_inside in sorted(folder.iterdir()):
            archive.add(path_inside, arcname=path_inside.name)
    return path


def take(kind: str, root: Path, **options: Any) -> tuple[list[Record], list[Rejected]]:
    """All records and rejections of a source."""
    source = pickle.loads(pickle.dumps(corpus(kind)(Files(root), Options(**options))))
    found = []
    for item in source.items():
        found += [item] if isinstance(item, Rejected) else list(source.load(item))
    return [r for r in found if isinstance(r, Record)], [r for r in found if isinstance(r, Rejected)]


def assert_windows(records: list[Record], scene: np.ndarray, tile: int) -> None:
    """Every record is the window of `scene` at its place, in the scene's dtype."""
    pairs = scene.dtype == np.int16
    for record in records:
        rows, columns = (slice(record.meta[at], record.meta[at] + tile) for at in ("top", "left"))
        window = scene[..., rows, columns, :] if pairs else scene[..., rows, columns]
        assert record.pixels.dtype == scene.dtype
        assert record.pixels.shape == window.shape
        assert record.pixels.tobytes() == window.tobytes()


def listed(kind: str, root: Path, **options: Any) -> tuple[list[Item], list[Rejected]]:
    found = list(corpus(kind)(Files(root), Options(**options)).items())
    return [f for f in found if isinstance(f, Item)], [f for f in found if isinstance(f, Rejected)]
