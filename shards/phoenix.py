"""Raw MSTAR chips: an ASCII header, then big-endian float32 magnitudes, then phases in radians.

Format as the header itself states it (`PhoenixHeaderLength`, `native_header_length`, `NumberOfRows`,
`NumberOfColumns`), and as the readers that AFRL distributes with the MSTAR public release take it.
"""

from __future__ import annotations

import re

import numpy as np

from shards.errors import DataError

MAGIC = b"[PhoenixHeaderVer"
END = b"[EndofPhoenixHeader]"
MAX_HEADER = 1 << 16


def is_phoenix(data: bytes) -> bool:
    """Whether a file begins with a Phoenix header."""
    return MAGIC in data[:64]


def polar(magnitude: np.ndarray, phase: np.ndarray) -> np.ndarray:
    """complex64 of magnitudes ≥ 0 and phases in radians, float arrays of one shape."""
    return (magnitude * (np.cos(phase) + 1j * np.sin(phase))).astype(np.complex64)


def decode_phoenix(data: bytes, name: str) -> tuple[np.ndarray, dict[str, str]]:
    """(pixels, header) of a chip: complex64 [H, W], or float32 amplitude when the file has no phase block.

    The header is returned as it stands (TargetType, TargetSerNum, TargetAz, MeasuredDepression, Polarization, ...).
    Raises DataError for a header that contradicts the file: nothing is allocated that the file does not hold.
    """
    end = data.find(END, 0, MAX_HEADER)
    if not is_phoenix(data) or end < 0:
        raise _bad("no complete Phoenix header", name)
    lines = (line.split("=", 1) for line in data[:end].decode("ascii", "replace").splitlines() if "=" in line)
    header = {key.strip(): value.strip() for key, value in lines}
    length = _count(header, "PhoenixHeaderLength", name)
    native = _count(header, "native_header_length", name, default="0")
    rows, columns = _count(header, "NumberOfRows", name), _count(header, "NumberOfColumns", name)
    start, pixels = length + native, rows * columns
    if length < end + len(END):
        raise _bad(f"PhoenixHeaderLength {length} ends inside the header", name)
    present = len(data) - start
    if native and 0 <= present - 4 * pixels < 4 * pixels:
        raise DataError("a full scene of 16-bit magnitudes, no chip", where=name, do="exclude it, or cut it into tiles")
    if not pixels or present not in (4 * pixels, 8 * pixels):
        what = (
            f"the header announces {rows}x{columns} float32 magnitudes (and phases), {max(present, 0):,} bytes follow"
        )
        raise _bad(what, name)
    blocks = np.frombuffer(data, ">f4", offset=start).reshape(-1, rows, columns).astype(np.float32)
    if (blocks[0] < 0).any():
        raise _bad("negative magnitudes", name)
    if len(blocks) == 1:
        return blocks[0], header
    with np.errstate(all="ignore"):  # a phase that is not finite is found by the check of the pixels
        return polar(blocks[0], blocks[1]), header


def _count(header: dict[str, str], field: str, name: str, default: str = "") -> int:
    value = header.get(field, default)
    if not re.fullmatch(r"[0-9]{1,9}", value):
        raise _bad(f"{field} is {value[:40]!r}, a number was expected" if value else f"no {field} in the header", name)
    return int(value)


def _bad(what: str, name: str) -> DataError:
    return DataError(f"damaged MSTAR chip: {what}", where=name, do="fetch it again or exclude it")
