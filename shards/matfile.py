"""The numeric arrays of a MATLAB 5-7 file, read without trust.

Own code, because the common reader (scipy.io.loadmat) can be brought down by damaged files: wrong type codes end the
process, and compressed elements are expanded without limit. Layout: MathWorks, "MAT-File Format", chapter 1 (level 5).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator

import numpy as np

from shards.errors import DataError

# Type codes of stored data, and classes of arrays (cells, structures, objects, text and sparse arrays are passed over).
STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
MATRIX, COMPRESSED = 14, 15
COMPLEX, LOGICAL = 0x0800, 0x0200
MAX_EXPANDED = 1 << 31
MAX_RATIO, FREE = 64, 1 << 24  # noise hardly compresses: more than 64 times the file + 16 MiB is an attack


def read(data: bytes, name: str) -> dict[str, np.ndarray]:
    """Variable name → array, its dtype that of the MATLAB class (complex128 or complex64 where it is complex).

    Raises DataError for anything but a sound file of level 5, and for one that expands beyond all measure.
    """
    if data[:128].startswith(b"MATLAB 7.3") or data.startswith(b"\x89HDF"):
        raise DataError("a MATLAB 7.3 (HDF5) file is not read here", where=name, do="save it with -v7")
    order = {b"IM": "<", b"MI": ">"}.get(data[126:128])
    if order is None:
        raise _bad("not a MATLAB file of level 5 to 7", name)
    try:
        with np.errstate(all="ignore"):  # values beyond the class of their array are damage that the pixels show
            return dict(_arrays(data, order, name))
    except (ValueError, zlib.error, OverflowError) as error:
        raise _bad(str(error), name) from error


def _arrays(data: bytes, order: str, name: str) -> Iterator[tuple[str, np.ndarray]]:
    budget = min(MAX_EXPANDED, FREE + MAX_RATIO * len(data))
    at = 128
    while at < len(data):
        kind, body, after = _element(data, at, order, padded=False)
        if kind == COMPRESSED:
            expander = zlib.decompressobj()
            expanded = expander.decompress(body, budget + 1)
            budget -= len(expanded)
            if budget < 0:
                raise _bad(f"its {len(data):,} bytes expand beyond all measure", name)
            if not expander.eof:
                raise ValueError("a compressed array is cut off")
            kind, body, _ = _element(expanded, 0, order, padded=False)
        if kind == MATRIX and (found := _array(body, order)):
            yield found
        at = after


def _array(body: bytes | memoryview, order: str) -> tuple[str, np.ndarray] | None:
    """Name and values of one array, None when it is not numeric."""
    flags, at = _values(body, 0, order)
    dims, at = _values(body, at, order)
    title, at = _values(body, at, order)
    if not len(flags) or int(flags[0]) & 0xFF not in CLASSES or int(flags[0]) & LOGICAL:
        return None
    shape = [int(side) for side in dims]
    if len(shape) < 2 or len(shape) > 32 or min(shape) < 0:
        raise ValueError(f"an array has the shape {shape[:4]}")
    dtype = np.dtype(CLASSES[int(flags[0]) & 0xFF])
    parts = []
    for _ in range(2 if int(flags[0]) & COMPLEX else 1):
        values, at = _values(body, at, order)
        if len(values) != math.prod(shape):
            raise ValueError(f"an array of the shape {shape[:4]} holds {len(values)} values")
        parts.append(values.astype(dtype).reshape(shape, order="F"))
    array = parts[0]
    if len(parts) == 2:
        array = np.empty(array.shape, np.complex64 if dtype == np.float32 else np.complex128)
        array.real, array.imag = parts
    return bytes(title.astype(np.uint8)).decode("ascii", "replace"), array


def _values(body: bytes | memoryview, at: int, order: str) -> tuple[np.ndarray, int]:
    """The numbers of the data element at `at`, and where the next one begins."""
    kind, raw, after = _element(body, at, order)
    if kind not in STORED:
        raise ValueError(f"an array holds data of type {kind}")
    dtype = np.dtype(order + STORED[kind])
    if len(raw) % dtype.itemsize:
        raise ValueError(f"{len(raw)} bytes are no whole number of {dtype.name}")
    return np.frombuffer(raw, dtype), after


def _element(data: bytes | memoryview, at: int, order: str, padded: bool = True) -> tuple[int, memoryview, int]:
    """(type code, its bytes, where the next element begins) of the element at `at`."""
    view = memoryview(data)
    if at + 8 > len(view):
        raise ValueError("it is cut off")
    kind, size = (int(word) for word in np.frombuffer(view, f"{order}u4", 2, at))
    if kind >> 16:  # a small element: up to 4 bytes of data stand in the tag
        kind, size, start, after = kind & 0xFFFF, kind >> 16, at + 4, at + 8
        if size > 4:
            raise ValueError(f"a small element announces {size} bytes")
    else:
        start = at + 8
        after = start + (-(-size // 8) * 8 if padded else size)
    if start + size > len(view):
        raise ValueError("it is cut off")
    return kind, view[start : start + size], after


def _bad(what: str, name: str) -> DataError:
    return DataError(f"damaged .mat file: {what}", where=name, do="save it again with MATLAB's -v7, or exclude it")
