"""What a sample is: its two tar members, its key, and the records that sources hand to the packer."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from shards.errors import DataError

VERSION = 1
SPLITS = ("pretrain", "train", "test")
DTYPES = ("uint8", "uint16", "float32")
NPY_MAGIC = b"\x93NUMPY"


@dataclass(frozen=True)
class Record:
    """One chip from a source: pixels [H, W] or [C, H, W], where it came from, its class (None: no label)."""

    pixels: np.ndarray
    key: str
    label: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rejected:
    """A file or tile that does not become a sample: "bad" cannot be used, "small" and "flat" were asked for."""

    key: str
    kind: Literal["bad", "small", "flat"]
    reason: str


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


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
