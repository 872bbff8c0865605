"""Image files → native-dtype arrays, and what makes a file unusable: PNG, JPEG and TIFF through Pillow, and .npy."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError

from shards.errors import DataError
from shards.schema import DTYPES

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".npy")
SIDE_SUFFIXES = (".csv", ".txt", ".json", ".xml", ".md")
MIN_SIDE = 2
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


def decode(data: bytes, name: str) -> np.ndarray:
    """The image in a file's bytes: uint8, uint16 or float32 [H, W]; raises DataError that names the file.

    Three equal colour channels become one. Integers that Pillow reads as 32-bit become uint16 when they fit.
    """
    if not data:
        raise DataError("empty file (0 bytes)", where=name, do="fetch it again or exclude it")
    pixels = _decode_npy(data, name) if PurePosixPath(name).suffix.lower() == ".npy" else _decode_image(data, name)
    check(pixels, name)
    return pixels


def check(pixels: np.ndarray, name: str) -> None:
    """Raise DataError unless the pixels can be a sample: right dtype and size, finite, not negative, not all zero."""
    if pixels.dtype.name not in DTYPES:
        raise DataError(
            f"pixels are {pixels.dtype.name}", where=name, do=f"convert amplitudes to one of {', '.join(DTYPES)}"
        )
    if pixels.ndim not in (2, 3):
        raise DataError(f"pixels of shape {pixels.shape} are not [H, W] or [C, H, W]", where=name, do="reshape them")
    height, width = pixels.shape[-2:]
    if min(height, width) < MIN_SIDE:
        what = "an image without pixels" if 0 in (height, width) else "a chip one pixel wide has no structure"
        raise DataError(f"{what}: {height}x{width}", where=name, do="exclude it")
    if pixels.dtype.kind == "f":
        if not np.isfinite(pixels).all():
            bad = int((~np.isfinite(pixels)).sum())
            raise DataError(f"{bad} pixels are NaN or infinite", where=name, do="mask or crop them away, or exclude it")
        if (pixels < 0).any():
            raise DataError("negative pixels are not amplitudes", where=name, do="convert (dB values?) to amplitude")
    if not pixels.any():
        raise DataError("every pixel is zero", where=name, do="exclude it")


def _decode_npy(data: bytes, name: str) -> np.ndarray:
    try:
        pixels = np.load(io.BytesIO(data), allow_pickle=False)
    except _DAMAGED as error:
        raise DataError(f"not a readable .npy array: {error}", where=name, do="save it with numpy.save") from error
    if not isinstance(pixels, np.ndarray):
        raise DataError("not a single .npy array", where=name, do="save it with numpy.save")
    pixels = pixels[0] if pixels.ndim == 3 and len(pixels) == 1 else pixels
    if pixels.ndim != 2:
        raise DataError(f"an array of shape {pixels.shape} is not one image", where=name, do="store [H, W]")
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


def _decode_image(data: bytes, name: str) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a large scene is not an attack, and damage raises below
            image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "TIFF"))
    except UnidentifiedImageError as error:
        raise DataError("not an image: no PNG, JPEG or TIFF", where=name, do="fetch it again or exclude it") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"the image is too large: {error}", where=name, do="cut the scene into tiles first") from error
    except _DAMAGED as error:
        raise DataError(f"damaged image: {error}", where=name, do="fetch it again or exclude it") from error
    try:
        image.load()
    except _DAMAGED as error:
        raise DataError(f"truncated or damaged image: {error}", where=name, do="fetch it again") from error
    pixels = np.asarray(image)
    if image.mode == "RGB":
        if (pixels != pixels[..., :1]).any():
            raise DataError(
                "a colour image: its three channels differ",
                where=name,
                do="exclude it, or convert it to one channel of amplitude",
            )
        return np.ascontiguousarray(pixels[..., 0])
    if image.mode == "L":
        return pixels
    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I"):
        if pixels.size and (pixels.min() < 0 or pixels.max() > 65535):
            raise DataError(
                f"integers from {pixels.min()} to {pixels.max()} do not fit 16 bits without sign",
                where=name,
                do="convert to uint16 or float32 amplitude",
            )
        return pixels.astype(np.uint16)
    if image.mode == "F":
        return pixels.astype(np.float32)
    raise DataError(
        f"unsupported pixel mode {image.mode!r}", where=name, do="convert to one channel of 8 or 16 bits, or float32"
    )
