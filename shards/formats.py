"""Image files → native-dtype arrays, and what makes a file unusable: PNG, JPEG, TIFF, .npy, .mat, and MSTAR chips.

Files come from anywhere: sizes are read from headers and refused before anything is allocated, what a file may expand
to is bounded by its own size, and whatever a library raises for damaged bytes becomes a DataError.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePosixPath

import numpy as np
from PIL import ImageFile, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

from shards import matfile
from shards.errors import DataError
from shards.phoenix import decode_phoenix, is_phoenix, polar
from shards.schema import DTYPES, amplitude_of, image_shape

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".npy", ".mat")
SIDE_SUFFIXES = (".csv", ".txt", ".json", ".xml", ".md", ".pdf", ".html", ".xls", ".xlsx", ".py", ".m", ".db")
MIN_SIDE = 2
MAX_BANDS = 64
MAX_PIXELS = 1 << 29  # of one image that is read whole
MAX_PIXELS_PER_BYTE = 4096  # of an encoded image: more than any code but that of a blank image reaches
ROUNDING = 1e-6  # of the largest value: what 64-bit values may lose as 32-bit ones (their rounding is 6e-8)
# What the image of a .mat file is called when the file holds several: SAMPLE, and names in common use.
MAT_IMAGES = ("complex_img", "complex_image", "image", "img", "data")
MAT_MAGNITUDES, MAT_PHASES = ("magnitude", "mag", "amplitude", "amp"), ("phase", "pha", "ang", "angle")
_OPENERS: tuple[tuple[tuple[bytes, ...], type[ImageFile.ImageFile]], ...] = (
    ((b"\x89PNG\r\n\x1a\n",), PngImagePlugin.PngImageFile),
    ((b"\xff\xd8\xff",), JpegImagePlugin.JpegImageFile),
    ((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), TiffImagePlugin.TiffImageFile),
)
_MODES = ("L", "RGB", "I;16", "I;16B", "I;16L", "I;16N", "I", "F")


def decode(data: bytes, name: str) -> np.ndarray:
    """The image in a file's bytes, [H, W] or [C, H, W] of a dtype of the schema; raises DataError that names the file.

    Three equal colour channels become one. Integers of other widths become uint16 when they fit, 64-bit floats and
    complex numbers 32-bit ones when only rounding is lost. `.npy` may hold bands, and int16 pairs on a last axis of 2.
    """
    if not data:
        raise DataError("empty file (0 bytes)", where=name, do="fetch it again or exclude it")
    suffix = PurePosixPath(name).suffix.lower()
    if suffix == ".npy":
        pixels = narrow(_decode_npy(data, name), name)
    elif suffix == ".mat":
        pixels = narrow(_choose(matfile.read(data, name), name), name)
    elif is_phoenix(data):
        pixels = decode_phoenix(data, name)[0]
    else:
        pixels = _decode_image(data, name)
    check(pixels, name)
    return pixels


def check(pixels: np.ndarray, name: str) -> None:
    """Raise DataError unless the pixels can be a sample: right dtype and size, finite, not negative, not all zero."""
    if pixels.dtype.name not in DTYPES:
        raise DataError(
            f"pixels are {pixels.dtype.name}", where=name, do=f"convert amplitudes to one of {', '.join(DTYPES)}"
        )
    pairs = pixels.dtype == np.int16
    if pairs and (pixels.ndim < 3 or pixels.shape[-1] != 2):
        what = f"int16 pixels of shape {pixels.shape} are not pairs of I and Q on a last axis of 2"
        raise DataError(what, where=name, do="store pairs, or convert amplitudes to uint16")
    if pixels.ndim - pairs not in (2, 3):
        raise DataError(f"pixels of shape {pixels.shape} are not [H, W] or [C, H, W]", where=name, do="reshape them")
    height, width = image_shape(pixels)
    if min(height, width) < MIN_SIDE:
        what = "an image without pixels" if 0 in (height, width) else "a chip one pixel wide has no structure"
        raise DataError(f"{what}: {height}x{width}", where=name, do="exclude it")
    if pixels.ndim - pairs == 3 and not 1 <= len(pixels) <= MAX_BANDS:
        raise DataError(f"{len(pixels)} bands: 1 to {MAX_BANDS} are read", where=name, do="store one image a file")
    with np.errstate(all="ignore"):  # a magnitude that overflows is found as infinite
        amplitude = amplitude_of(pixels)
    if amplitude.dtype.kind == "f":
        if not np.isfinite(amplitude).all():
            bad = int((~np.isfinite(amplitude)).sum())
            raise DataError(f"{bad} pixels are NaN or infinite", where=name, do="mask or crop them away, or exclude it")
        if (amplitude < 0).any():
            raise DataError("negative pixels are not amplitudes", where=name, do="convert (dB values?) to amplitude")
    if not amplitude.any():
        raise DataError("every pixel is zero", where=name, do="exclude it")


def narrow(pixels: np.ndarray, name: str) -> np.ndarray:
    """The same values in a dtype of the schema and native byte order; raises DataError where values would be lost."""
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    kind, size = pixels.dtype.kind, pixels.dtype.itemsize
    if pixels.dtype.name in DTYPES or kind not in "iufc":
        return pixels
    if kind in "iu":
        low, high = (int(pixels.min()), int(pixels.max())) if pixels.size else (0, 0)
        if low < 0 or high > 65535:
            what = f"integers from {low} to {high} do not fit 16 bits without sign"
            raise DataError(what, where=name, do="convert to uint16 or float32 amplitude")
        return pixels.astype(np.uint16)
    with np.errstate(all="ignore"):
        result = pixels.astype(np.complex64 if kind == "c" else np.float32)
        peak = np.abs(pixels).max() if pixels.size and size > result.dtype.itemsize else np.inf
        # Values that are not finite, here or after the conversion, are what `check` reports.
        if np.isfinite(peak) and not np.abs(pixels - result).max() <= ROUNDING * peak:
            what = f"{pixels.dtype.name} values up to {peak:.3g} do not fit 32-bit floats"
            raise DataError(what, where=name, do="scale them")
    return result


@contextmanager
def _explained(what: str, name: str, do: str) -> Iterator[None]:
    """Damaged bytes make libraries raise almost anything; all of it means that this file cannot be used."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{what}: {error}", where=name, do=do) from error


def _decode_npy(data: bytes, name: str) -> np.ndarray:
    file = io.BytesIO(data)
    formats = np.lib.format
    with _explained("not a readable .npy array", name, "save it with numpy.save"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        version = formats.read_magic(file)
        readers = {(1, 0): formats.read_array_header_1_0, (2, 0): formats.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"format version {version}")
        shape, fortran, dtype = readers[version](file)
        if dtype.kind not in "biufc" or dtype.names or dtype.subdtype:
            raise ValueError(f"its values are {dtype}, no numbers")
        if any(type(side) is not int or side < 0 for side in shape):
            raise ValueError(f"its shape is {shape}")
        announced, present = math.prod(shape) * dtype.itemsize, len(data) - file.tell()
        if announced != present:
            raise ValueError(f"its header announces {announced:,} bytes of values, {present:,} follow")
        pixels = np.frombuffer(data, dtype, offset=file.tell()) if announced else np.empty(0, dtype)
        pixels = pixels.reshape(shape, order="F" if fortran else "C")
    pairs = dtype.name == "int16"  # of either byte order
    bands_last = pixels.ndim == 3 and not pairs and pixels.shape[-1] <= 4 < pixels.shape[0]
    if bands_last or not 2 <= pixels.ndim <= 4:
        what = f"an array of shape {pixels.shape} is not one image"
        raise DataError(what, where=name, do="store [H, W] or [C, H, W], int16 pairs with a last axis of 2")
    one_band = len(pixels) == 1 and pixels.ndim == (4 if pairs else 3)
    return pixels[0] if one_band else pixels


def _choose(arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """The image among the variables of a .mat file: the only one that is two-dimensional, or the one so named."""
    images = {key: value for key, value in arrays.items() if value.ndim == 2 and min(value.shape) >= MIN_SIDE}
    by_name = {key.lower(): value for key, value in images.items()}
    magnitude = next((by_name[key] for key in MAT_MAGNITUDES if key in by_name), None)
    phase = next((by_name[key] for key in MAT_PHASES if key in by_name), None)
    if magnitude is not None and phase is not None and magnitude.shape == phase.shape:
        if not (np.isrealobj(magnitude) and np.isrealobj(phase) and (magnitude >= 0).all()):
            raise DataError("its magnitudes are negative or complex", where=name, do="store the complex image")
        return polar(magnitude, phase)
    if len(images) == 1:
        return next(iter(images.values()))
    for key in MAT_IMAGES:
        if key in by_name:
            return by_name[key]
    held = ", ".join(f"{key} {'x'.join(map(str, value.shape))}" for key, value in sorted(arrays.items())[:6])
    what = f"{len(images)} variables could be the image (numeric are: {held or 'none'})"
    raise DataError(what, where=name, do=f"keep one, or name it {MAT_IMAGES[0]}")


def _decode_image(data: bytes, name: str) -> np.ndarray:
    opener = next((opener for magics, opener in _OPENERS if data.startswith(magics)), None)
    if opener is None:
        raise DataError("not an image: no PNG, JPEG or TIFF", where=name, do="fetch it again or exclude it")
    # The reader of one format, not Image.open: that has a limit of its own, one for the whole process.
    with _explained("damaged image", name, "fetch it again or exclude it"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damage that matters raises
        image = opener(io.BytesIO(data))
        width, height = image.size
        if width * height > min(MAX_PIXELS, MAX_PIXELS_PER_BYTE * len(data)):
            what = f"{width}x{height} pixels in a file of {len(data):,} bytes are not read whole"
            raise DataError(what, where=name, do="cut the scene into tiles first, or exclude a damaged file")
        if image.mode == "RGB" and any(";16" in str(tile) for tile in image.tile):  # Pillow would keep 8 bits of them
            raise DataError("three channels of 16 bits", where=name, do="store one channel of 16 bits")
        if image.mode not in _MODES:
            do = "convert to one channel of 8 or 16 bits, or float32"
            raise DataError(f"unsupported pixel mode {image.mode!r}", where=name, do=do)
        with _explained("truncated or damaged image", name, "fetch it again"):
            opener(io.BytesIO(data)).verify()  # the checksums of a PNG, which loading passes over
            image.load()
        pixels = np.asarray(image)
    if image.mode != "RGB":
        return narrow(pixels, name)
    if (pixels != pixels[..., :1]).any():
        do = "exclude it, or convert it to one channel of amplitude"
        raise DataError("a colour image: its three channels differ", where=name, do=do)
    return np.ascontiguousarray(pixels[..., 0])
