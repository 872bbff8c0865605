"""Sentinel-1 SAFE products: GRD (uint16 DN) and SLC (int16 pairs), one scene per measurement file.

Source of the layout: Sentinel-1 Product Specification, S1-RS-MDA-52-7441 (ESA).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from statistics import fmean
from typing import Any, ClassVar

import numpy as np

from shards.errors import DataError
from shards.sources.geotiff import open_tiff
from shards.sources.scenes import Scene, Scenes, inside_border
from shards.sources.sidecar import known, numbers, parse_xml, texts


class Sentinel1(Scenes):
    """One .SAFE folder, or a folder or tar of several; tiles of 256 pixels where the user names none.

    The margins and the lines between bursts, filled with zeros, are outside the imaged area.
    """

    kind = "sentinel-1"
    description = "Sentinel-1 .SAFE products, GRD or SLC, cut into tiles of 256 pixels unless told otherwise"
    url = "https://dataspace.copernicus.eu"
    licence = "free and open; name the source: contains modified Copernicus Sentinel data, and the year"
    modules = ("rasterio",)
    suffixes = (".tif", ".tiff")
    columns: ClassVar = {"sensor": "Sentinel-1", "band": "C"}

    def is_scene(self, name: str) -> bool:
        """The files of `measurement`; a quick look or a map overlay is none."""
        return super().is_scene(name) and PurePosixPath(name).parent.name in ("measurement", "")

    def reads(self, name: str) -> tuple[str, ...]:
        """See Scenes.reads: annotation and calibration annotation."""
        return tuple(side for side in _side_files(name) if side in self.files)

    def open(self, path: Path, name: str) -> AbstractContextManager[Scene]:
        """See Scenes.open; the scene's id is the name of the SAFE product."""
        return self._open(path, name)

    @contextmanager
    def _open(self, path: Path, name: str) -> Iterator[Scene]:
        columns = self._annotated(name)
        with open_tiff(path, name) as scene:

            def rows(top: int, bottom: int) -> tuple[np.ndarray, np.ndarray | None]:
                pixels, _ = scene.rows(top, bottom)
                return pixels, inside_border(pixels)

            yield replace(scene, columns=columns, rows=rows)

    def _annotated(self, name: str) -> dict[str, Any]:
        """The columns of a measurement, from its annotation and its calibration annotation."""
        product, (annotation, calibration) = PurePosixPath(name).parent.parent, _side_files(name)
        if annotation not in self.files:
            raise DataError(f"{name} has no annotation {annotation}", where=name, do="give the whole .SAFE folder")
        meaning = "uncalibrated DN: the product came without calibration annotation"
        if calibration in self.files:
            meaning = _calibration(self.files.read(calibration), calibration)
        scene = product.name or Path(self.files.root).resolve().name.removesuffix(".tar")
        columns = _columns(self.files.read(annotation), annotation)
        return {**columns, "scene": scene.removesuffix(".SAFE"), "calibration": meaning}


def _side_files(name: str) -> tuple[str, str]:
    """The paths of annotation and calibration annotation of a measurement."""
    folder, stem = PurePosixPath(name).parent.parent / "annotation", PurePosixPath(name).stem
    return (folder / f"{stem}.xml").as_posix(), (folder / f"calibration/calibration-{stem}.xml").as_posix()


# The files take a tenth of a second and more to parse, and every row of tiles of a scene asks for the same two.
@lru_cache(maxsize=4)
def _columns(data: bytes, name: str) -> dict[str, Any]:
    root = parse_xml(data, name)
    mission, product, polarisation, mode, swath = (
        next(texts(root, tag), None) for tag in ("missionId", "productType", "polarisation", "mode", "swath")
    )
    angles = numbers(root, "incidenceAngle") or numbers(root, "incidenceAngleMidSwath")
    return known(
        platform=f"Sentinel-1{mission[2:]}" if mission else None,
        product=product,
        polarisation=polarisation,
        mode=mode,
        swath=swath,
        spacing=max(numbers(root, "rangePixelSpacing", "azimuthPixelSpacing"), default=None),
        look_angle=fmean(angles) if angles else None,
    )


@lru_cache(maxsize=4)
def _calibration(data: bytes, name: str) -> str:
    factors = np.array(" ".join(texts(parse_xml(data, name), "sigmaNought")).split(), np.float64)
    if not factors.size:
        return "uncalibrated DN: no sigmaNought in the calibration annotation"
    return f"sigma0 = DN^2 / A^2 with A from {factors.min():.4g} to {factors.max():.4g}, mean {factors.mean():.4g}"
