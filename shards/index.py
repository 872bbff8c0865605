"""The index of a shard: where each sample lies, so that any sample is two reads away and nothing is held in memory.

`NAME.idx` beside `NAME.tar` is a plain `.npy` of fixed-size rows. It can always be rebuilt from the shard with `build`.
Both files are read as hostile: whatever bytes they hold, the outcome is rows or a DataError.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from shards.catalog import Catalog, Shard
from shards.errors import DataError
from shards.schema import DTYPES, NPY_MAGIC

CODECS = ("raw", "zstd")
MAX_PIXELS = 1 << 30  # bytes of one sample, so that no lie about a shape takes the machine's memory
MAX_JSON = 1 << 20
_NPY_HEAD = 128  # numpy pads the header of every array of this format to this
_BLOCK, _PIECE = 512, 1 << 20
_KEY = rb"[A-Za-z0-9_-]{1,200}"
_NPY = re.compile(
    NPY_MAGIC + rb"\x01\x00\x76\x00\{'descr': '[<|](u1|u2|f4|c8|i2)', 'fortran_order': False, "
    rb"'shape': \(((?:\d{1,10}, ){1,3}\d{1,10})\), \} *\n"
)
_IDX = re.compile(rb"'key', '\|S(\d{1,3})'.*'shape': \((\d{1,12}),\)", re.DOTALL)
_STORED = tuple(np.dtype(name).newbyteorder("<") for name in DTYPES)
_WIDTHS = tuple(np.dtype(name).itemsize * (2 if name == "int16" else 1) for name in DTYPES)  # bytes of one pixel
_CODES = {np.dtype(name).str[1:].encode(): code for code, name in enumerate(DTYPES)}


def row_dtype(key_bytes: int) -> np.dtype:
    """One row of an index; `key_bytes`: length of the longest key.

    `offset`, `stored`, `crc`: first byte, number and zlib.crc32 of the stored bytes, which are the pixels (raw) or the
    whole compressed member (zstd); `meta_offset`, `meta_bytes`: the JSON; `label`: in the source's class list, -1 none;
    `shape`: [C, H, W]; `dtype`, `codec`: places in DTYPES and CODECS.
    """
    numbers = [("offset", "<u8"), ("stored", "<u8"), ("crc", "<u4"), ("meta_offset", "<u8"), ("meta_bytes", "<u4")]
    rest = [("label", "<i4"), ("shape", "<u4", (3,)), ("dtype", "u1"), ("codec", "u1"), ("key", f"S{key_bytes}")]
    return np.dtype([*numbers, *rest])


def path_of(tar: Path) -> Path:
    """Where the index of a shard lies."""
    return tar.with_suffix(".idx")


def build(tar: Path, classes: Sequence[str]) -> np.ndarray:
    """Scan a shard and make its rows; `classes` is the class list of its source. Raises DataError for a bad shard."""
    numbers = {name: i for i, name in enumerate(classes)}
    rows = []
    try:
        with open(tar, "rb") as file:
            members = _members(file, tar.stat().st_size)
            for name, begin, size in members:
                key, _, suffix = name.partition(b".")
                text, meta_offset, meta_bytes = next(members, (b"", 0, 0))
                if suffix not in (b"npy", b"npy.zst") or text != key + b".json":
                    raise ValueError(f"{name.decode()} is no sample with its JSON after it")
                described = _described(file, begin, size, suffix == b"npy.zst", name.decode())
                label = _label(file, meta_offset, meta_bytes, numbers, text.decode())
                offset, stored, crc, shape, dtype, codec = described
                rows.append((offset, stored, crc, meta_offset, meta_bytes, label, shape, dtype, codec, key))
        if not rows:
            raise ValueError("it holds no sample")
    except (OSError, tarfile.TarError, ValueError) as error:
        raise DataError(f"the shard cannot be read: {error}", where=str(tar), do="pack the source again") from error
    return np.array(rows, row_dtype(max(len(row[-1]) for row in rows)))


def _members(file: BinaryIO, total: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, first byte and size of each member. Only plain files with short names: what packing writes, and no more."""
    place, seen = 0, set()
    while True:
        file.seek(place)
        header = file.read(_BLOCK)
        if header == bytes(_BLOCK):
            break
        try:
            member = tarfile.TarInfo.frombuf(header, "ascii", "surrogateescape")
        except tarfile.HeaderError as error:
            raise ValueError(f"its end is missing or damaged: at byte {place} is no header of a member") from error
        name = member.name.encode("ascii", "surrogateescape")
        if not member.isreg() or not re.fullmatch(_KEY + rb"\.(npy|npy\.zst|json)", name) or name in seen:
            raise ValueError(f"member {member.name!r} is not part of a sample")
        if not 0 <= member.size <= total - place - _BLOCK:
            raise ValueError(f"{member.name} is cut off: {member.size} bytes at byte {place} of {total}")
        seen.add(name)
        yield name, place + _BLOCK, member.size
        place += _BLOCK + math.ceil(member.size / _BLOCK) * _BLOCK
    if not 2 * _BLOCK <= total - place <= 2 * tarfile.RECORDSIZE or (header + file.read()).strip(b"\0"):
        raise ValueError("its end is missing or damaged")


def _described(file: BinaryIO, begin: int, size: int, packed: bool, name: str) -> tuple[Any, ...]:
    """Offset, stored bytes, crc32, shape, dtype and codec of the array in a member."""
    file.seek(begin)
    head = file.read(min(size, _PIECE))
    inflated, content = (size, head) if not packed else _inflated(head)
    shape, dtype = _shape(content[:_NPY_HEAD], name)
    if math.prod(shape) * _WIDTHS[dtype] != inflated - _NPY_HEAD:
        raise ValueError(f"{name} has a shape that does not fit its {inflated} bytes")
    skip = 0 if packed else _NPY_HEAD
    crc, left = zlib.crc32(head[skip:]), size - len(head)
    while left > 0 and (piece := file.read(min(left, _PIECE))):
        crc, left = zlib.crc32(piece, crc), left - len(piece)
    return begin + skip, size - skip, crc, shape, dtype, int(packed)


def _shape(head: bytes, name: str) -> tuple[tuple[int, ...], int]:
    """[C, H, W] and the dtype's code from the header of a `.npy`, without evaluating it."""
    found = _NPY.fullmatch(head)
    if not found:
        raise ValueError(f"{name} is no array of this format")
    code, shape = _CODES[found[1]], tuple(int(side) for side in found[2].split(b", "))
    if DTYPES[code] == "int16":
        shape, last = shape[:-1], shape[-1]
        if last != 2:
            raise ValueError(f"{name}: int16 must be pairs of I and Q")
    shape = shape if len(shape) == 3 else (1, *shape)
    if len(shape) != 3 or min(shape) < 1 or math.prod(shape) * _WIDTHS[code] > MAX_PIXELS:
        raise ValueError(f"{name} has the shape {shape}")
    return shape, code


def _label(file: BinaryIO, begin: int, size: int, numbers: Mapping[str, int], name: str) -> int:
    """The class number that the JSON of a sample states."""
    if size > MAX_JSON:
        raise ValueError(f"{name} has {size} bytes")
    file.seek(begin)
    try:
        label = json.loads(file.read(size))["class"]
        return -1 if label is None else numbers[label]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{name} does not state a class of this source: {error!r}"[:300]) from error


def _inflated(head: bytes) -> tuple[int, bytes]:
    """Size of what a zstd frame holds, and its first bytes."""
    import zstandard

    try:
        size = int(zstandard.get_frame_parameters(head).content_size)
        unpack = zstandard.ZstdDecompressor(max_window_size=MAX_PIXELS).decompressobj()
        content = b""
        for begin in range(0, len(head), 64):  # in small steps: a frame may hold thousands of times its size
            content += unpack.decompress(head[begin : begin + 64])
            if len(content) >= _NPY_HEAD:
                break
    except zstandard.ZstdError as error:
        raise ValueError(f"a damaged zstd frame: {error}") from error
    return size, content


def decompress(stored: bytes | bytearray, shape: Sequence[int], dtype: np.dtype) -> bytearray:
    """The pixels in a zstd member, in a buffer an array may own; `shape` with the last axis of pairs. DataError."""
    import zstandard

    expected = math.prod(shape) * dtype.itemsize + _NPY_HEAD
    try:
        if expected - _NPY_HEAD > MAX_PIXELS or zstandard.get_frame_parameters(stored).content_size != expected:
            raise ValueError(f"it does not hold {expected} bytes")
        content = bytearray(zstandard.ZstdDecompressor(max_window_size=MAX_PIXELS).decompress(stored))
    except (zstandard.ZstdError, ValueError) as error:
        raise DataError(f"a compressed sample cannot be read: {error}", do="pack the source again") from error
    del content[:_NPY_HEAD]
    return content


def unpack(row: np.void, stored: bytes | bytearray) -> np.ndarray:
    """The pixels [C, H, W] (int16 pairs [C, H, W, 2]) in the stored bytes of a row; raises DataError."""
    dtype = _STORED[row["dtype"]]
    shape = row["shape"].tolist() + [2] * (dtype == np.int16)
    return np.frombuffer(decompress(stored, shape, dtype) if row["codec"] else stored, dtype).reshape(shape)


def encode(rows: np.ndarray) -> bytes:
    """The bytes of an index file."""
    file = io.BytesIO()
    np.lib.format.write_array(file, rows, version=(1, 0), allow_pickle=False)
    return file.getvalue()


def write(rows: np.ndarray, tar: Path) -> str:
    """Write the index beside its shard, whole or not at all; returns its sha256."""
    path, data = path_of(tar), encode(rows)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)
    return hashlib.sha256(data).hexdigest()


class IndexFile:
    """An open index: `row(i)` is one read at a known place. Raises DataError when `path` is no index.

    `file`: the same, already open and unbuffered. `identity`: device, inode, bytes and time of change.
    """

    def __init__(self, path: Path, file: BinaryIO | None = None) -> None:
        self.path = path
        try:
            self._file = file or open(path, "rb", buffering=0)  # noqa: SIM115 - stays open until `close`
            try:
                stat = os.fstat(self._file.fileno())
                self.identity = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
                self.dtype, self._length, self._begin = _layout(self._file.read(1024), stat.st_size)
            except (OSError, ValueError):
                self._file.close()
                raise
        except FileNotFoundError as error:
            raise DataError("missing index", where=str(path), do=_advice(path)) from error
        except (OSError, ValueError) as error:
            raise DataError(f"the index cannot be read: {error}", where=str(path), do=_advice(path)) from error

    def __len__(self) -> int:
        return self._length

    def row(self, i: int) -> np.void:
        """Row i, 0 ≤ i < len."""
        if not 0 <= i < self._length:
            raise IndexError(f"row {i} of {self._length}")
        return self._read(i, 1)[0]

    def rows(self) -> np.ndarray:
        """All rows."""
        return self._read(0, self._length)

    def fileno(self) -> int:
        """The descriptor of the file."""
        return self._file.fileno()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read(self, first: int, count: int) -> np.ndarray:
        size = count * self.dtype.itemsize
        data = os.pread(self._file.fileno(), size, self._begin + first * self.dtype.itemsize)
        if len(data) < size:
            raise DataError("the index was cut off while it was read", where=str(self.path), do=_advice(self.path))
        return np.frombuffer(data, self.dtype)


def _layout(head: bytes, size: int) -> tuple[np.dtype, int, int]:
    """Row dtype, number of rows and first byte of an index of `size` bytes that begins with `head`."""
    found = _IDX.search(head)
    if not found:
        raise ValueError("it has no header of an index")
    dtype, count = row_dtype(int(found[1])), int(found[2])
    empty = io.BytesIO()
    layout = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(empty, layout)
    begin = len(empty.getvalue())
    if head[:begin] != empty.getvalue() or not dtype["key"].itemsize:
        raise ValueError("it has no header of an index")
    if size != begin + count * dtype.itemsize:
        raise ValueError(f"{size} bytes cannot be {count} rows")
    return dtype, count, begin


def read(path: Path) -> np.ndarray:
    """All rows of an index file; raises DataError."""
    file = IndexFile(path)
    try:
        return file.rows()
    finally:
        file.close()


def compare(file: IndexFile, tar: int, shard: Shard, classes: int) -> None:
    """Raise DataError, and close `file`, unless it is the packed index of a shard (a descriptor) of so many classes."""
    try:
        rows = file.rows()
        complaint = _disagreement(rows, tar, shard, classes)
        if not complaint and hashlib.sha256(encode(rows)).hexdigest() != shard.index_sha256:
            complaint = "its sha256 is not the packed one"  # else another label or key would go unnoticed
    except OSError as error:
        complaint = f"the shard cannot be read: {error}"
    if complaint:
        file.close()
        raise DataError(f"the index disagrees with its shard: {complaint}", where=str(file.path), do=_advice(file.path))


def _disagreement(rows: np.ndarray, tar: int, shard: Shard, classes: int) -> str:
    """What is wrong with an index, or nothing. Reads two headers, not the shard."""
    if len(rows) != shard.samples:
        return f"{len(rows)} samples, the catalog says {shard.samples}"
    size = np.uint64(os.stat(tar).st_size)
    if (rows["dtype"] >= len(DTYPES)).any() or (rows["codec"] >= len(CODECS)).any() or (rows["shape"] < 1).any():
        return "a shape, dtype or codec is out of range"
    if (rows["label"] < -1).any() or (rows["label"] >= classes).any():
        return "a label is out of range"
    if any(not re.fullmatch(_KEY, key) for key in rows["key"].tolist()):
        return "a key is out of range"
    for begin, count in (("offset", "stored"), ("meta_offset", "meta_bytes")):
        if ((rows[begin] > size) | (rows[count] > size - np.minimum(rows[begin], size))).any():
            return "a sample lies beyond the end"
    # In floats first, where a lie about a shape cannot wrap around.
    pixels = rows["shape"].astype(np.float64).prod(axis=1) * np.array(_WIDTHS)[rows["dtype"]]
    raw = rows["codec"] == 0
    if (
        (pixels > MAX_PIXELS).any()
        or (pixels[raw] != rows["stored"][raw]).any()
        or (rows["meta_bytes"] > MAX_JSON).any()
    ):
        return "a size does not fit its shape"
    for row in rows[raw][[0, -1]] if raw.any() else ():
        if not os.pread(tar, _NPY_HEAD, max(int(row["offset"]) - _NPY_HEAD, 0)).startswith(NPY_MAGIC):
            return f"no array at the place of {row['key'].decode()}"
    return ""


def _advice(path: Path) -> str:
    return f"rebuild it: foundation shards verify {path.parent} --rebuild"


def rebuild(catalog: Catalog) -> int:
    """Write the indexes of all shards of a catalog folder anew, from the shards alone; returns how many.

    Raises DataError for a shard that is not the packed one: an index of it would hide that, and for a catalog at a URL.
    """
    if remote := [source.root for source in catalog.sources if catalog.store(source).remote]:
        raise DataError(
            "indexes are only rebuilt in a folder, this catalog lies behind a URL",
            where=remote[0],
            do="copy it to a folder, rebuild it there, and copy it back: foundation shards copy",
        )
    catalog.check()
    parts = [(Path(s.root) / shard.name, shard, s) for s in catalog.sources for shard in s.shards]
    for tar, shard, source in parts:
        rows = build(tar, source.classes)
        if hashlib.sha256(encode(rows)).hexdigest() != shard.index_sha256:
            raise DataError(
                "the shard has changed: its index would not be the packed one",
                where=str(tar),
                do="restore the shard or pack the source again",
            )
        write(rows, tar)
    return len(parts)
