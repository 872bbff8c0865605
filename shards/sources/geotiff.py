"""GeoTIFF and cloud-optimised GeoTIFF scenes through GDAL, read in their native dtype."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np

from shards.errors import DataError
from shards.formats import MAX_BANDS
from shards.sources.base import Options
from shards.sources.files import Files
from shards.sources.scenes import Scene, Scenes, check_block
from shards.sources.sidecar import known

# GDAL's name of a dtype → what a shard holds (GDAL names the pairs complex_int16 and reads them as complex64).
_NATIVE = {
    "uint8": np.uint8,
    "uint16": np.uint16,
    "float32": np.float32,
    "complex64": np.complex64,
    "complex_int16": np.int16,
}
_GDAL = {"GDAL_CACHEMAX": 32 << 20, "GDAL_NUM_THREADS": 1}  # blocks are read once; the default is 5 % of all memory
ID_LENGTH = 16  # of a file name that is taken to name one scene wherever it stands
_METRES_PER_DEGREE = 111_320.0
_POLARISATIONS = ("HH", "HV", "VH", "VV")
_TAGS = {
    "sensor": ("sensor", "instrument", "constellation"),
    "platform": ("platform", "satellite", "satellite_name", "mission"),
    "band": ("radar_band", "frequency_band"),
    "polarisation": ("polarisation", "polarization", "polarizations"),
    "product": ("product_type",),
}


class GeoTiff(Scenes):
    """Any GeoTIFF: uint8, uint16, float32, complex (CInt16 becomes int16 pairs), 1 to n bands as [C, H, W].

    Nodata, masks and NaN are outside the imaged area and become 0. Tiles of 256 pixels where the user names none. The
    scene's id is the name of the file without suffix; one under 16 characters (`0001`) may be that of many scenes, and
    the path inside the source stands for it (`train/0001`).
    """

    kind = "geotiff"
    description = "GeoTIFF or COG scenes, cut into tiles of 256 pixels unless told otherwise"
    url = "https://www.capellaspace.com, https://umbra.space and others publish open scenes"
    licence = "as its publisher says; Capella and Umbra open data: CC BY 4.0 as commonly stated"
    modules = ("rasterio",)
    suffixes = (".tif", ".tiff")
    extra: ClassVar = {"bands": "bands to read, from 1, e.g. bands=1,2 (default: all but an alpha band)"}

    def __init__(self, files: Files, options: Options | None = None) -> None:
        super().__init__(files, options)
        text = self.options.extra.get("bands", "")
        try:
            self.bands = tuple(int(part) for part in text.split(",")) if text else ()
        except ValueError as error:
            raise DataError(f"bands={text} names no bands", do="give numbers from 1, e.g. bands=1,2") from error

    def open(self, path: Path, name: str) -> AbstractContextManager[Scene]:
        """See Scenes.open."""
        return open_tiff(path, name, self.bands)


@contextmanager
def open_tiff(path: Path, name: str, bands: tuple[int, ...] = ()) -> Iterator[Scene]:
    """A GeoTIFF as a Scene with the columns its tags and georeference give; no `bands`: all but alpha.

    Raises DataError for dtypes a shard does not hold, and rasterio's errors for damaged files.
    """
    import rasterio
    from rasterio.enums import ColorInterp

    with warnings.catch_warnings(), rasterio.Env(**_GDAL):
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        # The driver is named because others (VRT) are small texts that make GDAL open further files and addresses.
        opened = rasterio.open(path, driver="GTiff")
    with opened as dataset:
        if dataset.count > MAX_BANDS:  # of a header that lies, GDAL would describe each of thousands
            raise DataError(f"{dataset.count} bands: 1 to {MAX_BANDS} are read", where=name, do="store fewer a file")
        pictures = zip(dataset.indexes, dataset.colorinterp, strict=True)
        chosen = bands or [band for band, use in pictures if use != ColorInterp.alpha]
        if absent := set(chosen) - set(dataset.indexes):
            raise DataError(f"no band {min(absent)}: it has {dataset.count}", where=name, do="correct the option bands")
        dtypes = {dataset.dtypes[band - 1] for band in chosen}
        if len(dtypes) > 1 or not dtypes <= set(_NATIVE):
            found = ", ".join(sorted(dtypes))
            raise DataError(f"pixels are {found}", where=name, do=f"convert them to one of {', '.join(_NATIVE)}")
        native = np.dtype(_NATIVE[dtypes.pop()])
        pixel_bytes = len(chosen) * native.itemsize * (2 if native == np.int16 else 1)
        height, width = max(dataset.block_shapes)
        check_block(height * width * pixel_bytes, f"a stored block of {height}x{width} pixels", name)

        def rows(top: int, bottom: int) -> tuple[np.ndarray, np.ndarray | None]:
            return _read(dataset, chosen, native, top, bottom)

        yield Scene(dataset.height, dataset.width, pixel_bytes, _columns(dataset, chosen, name), rows)


def _read(dataset: Any, bands: Any, native: np.dtype, top: int, bottom: int) -> tuple[np.ndarray, np.ndarray | None]:
    import rasterio
    from rasterio.enums import MaskFlags

    bands, window, valid = list(bands), ((top, bottom), (0, dataset.width)), None
    with rasterio.Env(**_GDAL):
        pixels = dataset.read(bands, window=window)
        if pixels.dtype.kind == "c" and dataset.nodata is not None:  # GDAL would compare the real part only
            valid = (pixels != dataset.nodata).all(axis=0)
        elif any(MaskFlags.all_valid not in dataset.mask_flag_enums[band - 1] for band in bands):
            valid = (dataset.read_masks(bands, window=window) > 0).all(axis=0)
    if pixels.dtype.kind in "fc" and not (finite := np.isfinite(pixels).all(axis=0)).all():
        valid = finite if valid is None else valid & finite
    if valid is not None:
        pixels[:, ~valid] = 0
    if native == np.int16:
        pixels = np.stack((pixels.real, pixels.imag), axis=-1).astype(np.int16)
    return (pixels[0] if len(pixels) == 1 else pixels), valid


def _columns(dataset: Any, bands: Any, name: str) -> dict[str, Any]:
    tags = {key.lower(): value for key, value in dataset.tags().items()}
    said = {column: next((tags[key] for key in keys if key in tags), None) for column, keys in _TAGS.items()}
    named = [(dataset.descriptions[band - 1] or "").upper() for band in bands]
    named = [next((p for p in _POLARISATIONS if p in description), "") for description in named]
    if all(named):
        said["polarisation"] = "+".join(named)
    path = PurePosixPath(name)
    scene = path.stem if len(path.stem) >= ID_LENGTH else path.with_suffix("").as_posix()
    return known(**said, scene=scene, spacing=_spacing(dataset))


def _spacing(dataset: Any) -> float | None:
    """Metres between pixels, the larger of the two directions; degrees are converted at the scene's latitude."""
    transform, crs = dataset.transform, dataset.crs
    if crs is None or transform.is_identity:
        return None
    if crs.is_geographic:
        latitude = transform.f + transform.d * dataset.width / 2 + transform.e * dataset.height / 2
        north = _METRES_PER_DEGREE
        east = north * math.cos(math.radians(latitude))
    else:
        east = north = crs.linear_units_factor[1]
    steps = ((transform.a, transform.d), (transform.b, transform.e))
    return max(math.hypot(x * east, y * north) for x, y in steps)
