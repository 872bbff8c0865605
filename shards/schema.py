"""What a sample is: its tar members, its key, what it says about itself, and the records sources hand to the packer.

Pixels keep the dtype of their source: uint8, uint16 or float32 amplitude, complex64, or int16 pairs of I and Q (what
GIS software calls CInt16), whose last axis is 2. Amplitude is derived when a sample is read (`amplitude_of`).
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from shards.errors import DataError

VERSION = 2
SPLITS = ("pretrain", "train", "test")
DTYPES = ("uint8", "uint16", "float32", "complex64", "int16")
NPY_MAGIC = b"\x93NUMPY"
# What a sample may say about itself, beside its class and hash: type and meaning. Filters name these columns.
COLUMNS: dict[str, tuple[type, str]] = {
    "sensor": (str, "instrument, e.g. Sentinel-1"),
    "platform": (str, "what carried it, e.g. Sentinel-1A or an aircraft"),
    "band": (str, "radar band: L, S, C, X, Ku, Ka"),
    "polarisation": (str, "HH, HV, VH, VV; several joined by +, in the order of the channels"),
    "product": (str, "SLC, GRD, chip, simulated, ..."),
    "spacing": (float, "pixel spacing in metres, the larger of range and azimuth"),
    "look_angle": (float, "degrees from nadir at the sensor or, where only that is known, incidence at the ground"),
    "depression": (float, "depression angle, degrees"),
    "azimuth": (float, "aspect of the target, degrees"),
    "scene": (str, "id of the source scene; chips of one scene share it"),
    "calibration": (str, "what a pixel value means, e.g. 'sigma0 = DN^2 / 4e5' or 'uncalibrated'"),
}


@dataclass(frozen=True)
class Record:
    """One chip from a source: pixels [H, W] or [C, H, W] (int16: [..., 2]), where it came from, its class (None: none).

    `meta` holds columns of COLUMNS and whatever else the source knows.
    """

    pixels: np.ndarray
    key: str
    label: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rejected:
    """A file or tile that does not become a sample: "bad" cannot be used, the others the options leave out."""

    key: str
    kind: Literal["bad", "small", "flat", "other"]
    reason: str


def image_shape(pixels: np.ndarray) -> tuple[int, int]:
    """Height and width of pixels of any dtype of the schema."""
    height, width = pixels.shape[-3:-1] if pixels.dtype == np.int16 else pixels.shape[-2:]
    return int(height), int(width)


def amplitude_of(pixels: np.ndarray) -> np.ndarray:
    """Amplitude of pixels: complex64 and int16 pairs become float32 magnitudes, everything else stays as it is."""
    if pixels.dtype == np.complex64:
        return np.abs(pixels)
    if pixels.dtype == np.int16:
        wide = pixels.astype(np.float32)
        return np.hypot(wide[..., 0], wide[..., 1])
    return pixels


def check_name(name: str) -> str:
    """`name` when it can name a source; it becomes part of file names and of keys, which may hold no dot."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        raise DataError(f"{name!r} cannot name a source", do="use up to 64 letters, digits, '-' and '_'")
    return name


def sample_key(source: str, number: int) -> str:
    """The key of the number-th sample of a source: a counter, so no member name ever comes from outside."""
    return f"{source}-{number:08d}"


def npy_bytes(pixels: np.ndarray) -> bytes:
    """The `.npy` file of an array, version 1.0, little-endian, C order."""
    file = io.BytesIO()
    array = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder("<"))
    np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)
    return file.getvalue()


def content_hash(pixels: np.ndarray) -> str:
    """sha256 over dtype, shape and pixels: equal for equal images whatever file they came from."""
    head = f"{pixels.dtype.name}{tuple(pixels.shape)}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def sha256_of(path: Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
