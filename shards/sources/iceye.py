"""ICEYE single look complex products in HDF5 (ICEYE Level 1 Product Format Specification, version 2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np

from shards.errors import DataError
from shards.hdf5 import facts
from shards.sources.scenes import Scene, Scenes, check_block, inside_border, radar_band
from shards.sources.sidecar import known

_LIGHT_SPEED = 299_792_458.0


class Iceye(Scenes):
    """ICEYE SLC: `s_i` and `s_q` become int16 pairs (float32 products: complex64), in the order they are stored.

    Tiles of 256 pixels where the user names none.
    """

    kind = "iceye"
    description = "ICEYE SLC (HDF5) scenes, cut into tiles of 256 pixels unless told otherwise"
    url = "https://www.iceye.com/free-data"
    licence = "ICEYE's own terms, not verified"
    modules = ("h5py",)
    suffixes = (".h5", ".hdf5")
    columns: ClassVar = {"sensor": "ICEYE", "band": "X", "product": "SLC"}

    def open(self, path: Path, name: str) -> AbstractContextManager[Scene]:
        """See Scenes.open; the scene's id is the product's name."""
        return _open(path, name)


@contextmanager
def _open(path: Path, name: str) -> Iterator[Scene]:
    import h5py

    with h5py.File(path, "r", locking=False) as file:
        parts = [_dataset(file, part, name) for part in ("s_i", "s_q")]
        shapes, dtypes = {part.shape for part in parts}, {part.dtype.newbyteorder("=") for part in parts}
        if len(shapes) > 1 or len(dtypes) > 1 or parts[0].ndim != 2 or parts[0].dtype.name not in ("int16", "float32"):
            what = " and ".join(f"{part.shape} {part.dtype}" for part in parts)
            raise DataError(f"s_i and s_q are no pair of int16 or float32 images: {what}", where=name, do="exclude it")
        for part in parts:
            check_block(prod(part.chunks or (1,)) * part.dtype.itemsize, f"a stored chunk of {part.chunks}", name)

        def rows(top: int, bottom: int) -> tuple[np.ndarray, np.ndarray | None]:
            real, imaginary = (part[top:bottom] for part in parts)
            if real.dtype.kind == "f":
                pixels = (real + 1j * imaginary).astype(np.complex64)
            else:
                pixels = np.stack((real, imaginary), axis=-1).astype(np.int16)
            return pixels, inside_border(pixels)

        height, width = parts[0].shape
        yield Scene(height, width, 2 * parts[0].dtype.itemsize, _columns(path, name), rows)


def _dataset(file: Any, part: str, name: str) -> Any:
    """A dataset whose bytes are in this very file: HDF5 can also point to others by path."""
    import h5py

    if not isinstance(file.get(part, getlink=True), h5py.HardLink) or not isinstance(file.get(part), h5py.Dataset):
        raise DataError(f"no image {part}: not an ICEYE SLC product", where=name, do="exclude it")
    if file[part].external or file[part].is_virtual:
        raise DataError(f"{part} is stored in other files", where=name, do="exclude it")
    return file[part]


FACTS = (
    *("satellite_name", "product_name", "polarization", "acquisition_mode", "carrier_frequency", "calibration_factor"),
    *("range_sampling_rate", "slant_range_spacing", "range_spacing", "azimuth_ground_spacing", "azimuth_spacing"),
    *("satellite_look_angle", "incidence_center"),
)


def _columns(path: Path, name: str) -> dict[str, Any]:
    fact = facts(path, FACTS, name)

    def number(*names: str) -> float | None:
        found = (fact[name] for name in names)
        return next((float(value) for value in found if isinstance(value, int | float)), None)

    rate, factor = number("range_sampling_rate"), number("calibration_factor")
    across = number("slant_range_spacing", "range_spacing") or (_LIGHT_SPEED / 2 / rate if rate else None)
    steps = [step for step in (across, number("azimuth_ground_spacing", "azimuth_spacing")) if step]
    return known(
        platform=fact["satellite_name"],
        band=radar_band(number("carrier_frequency")),
        polarisation=fact["polarization"],
        mode=fact["acquisition_mode"],
        spacing=max(steps, default=None),
        look_angle=number("satellite_look_angle", "incidence_center"),
        scene=fact["product_name"] or PurePosixPath(name).stem,
        calibration=f"power = {factor:.6g} (I^2 + Q^2)" if factor else "uncalibrated",
    )
