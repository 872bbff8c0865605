"""Files for the campaign of hostile input (tests/hostile.py): sound ones, ones that must be refused, and damage."""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
from PIL import Image

Rng = np.random.Generator
EDGES = (0, 1, 2, 127, 128, 255, 32767, 65535, 100_000, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
DTYPES = ("uint8", "uint16", "float32", "complex64", "int16")


def noise(rng: Rng, dtype: str, side: int = 0) -> np.ndarray:
    """Pixels of a schema dtype, all bits in use, none of them zero."""
    height, width = (side, side) if side else rng.integers(8, 24, 2).tolist()
    if dtype == "complex64":
        return (rng.normal(size=(height, width)) + 1j * rng.normal(size=(height, width))).astype(np.complex64)
    if dtype == "int16":
        return rng.integers(-32768, 32768, (height, width, 2)).astype(np.int16) | 1
    if dtype == "float32":
        return rng.gamma(1.0, 10.0 ** rng.integers(-6, 7), (height, width)).astype(np.float32) + np.float32(1e-9)
    return rng.integers(1, np.iinfo(dtype).max + 1, (height, width)).astype(dtype)


def saved(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    """An image file made by Pillow."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def npy(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, pixels)
    return file.getvalue()


def mat(compressed: bool = False, **variables: Any) -> bytes:
    file = io.BytesIO()
    scipy.io.savemat(file, variables, do_compression=compressed)
    return file.getvalue()


def phoenix(pixels: np.ndarray, order: str = ">", **fields: Any) -> bytes:
    """A raw MSTAR chip: magnitudes, and phases where the pixels are complex."""
    rows, columns = pixels.shape
    header = {"native_header_length": 0, "NumberOfColumns": columns, "NumberOfRows": rows, "TargetAz": 12.5, **fields}
    text = "[PhoenixHeaderVer01.04]\nPhoenixHeaderLength= {:05d}\n" + "".join(f"{k}= {v}\n" for k, v in header.items())
    text += "[EndofPhoenixHeader]\n"
    blocks = [np.abs(pixels), np.angle(pixels)] if np.iscomplexobj(pixels) else [pixels]
    return text.format(len(text) - 1).encode() + b"".join(block.astype(f"{order}f4").tobytes() for block in blocks)


Encoder = Callable[[np.ndarray], bytes]
_ARRAYS: dict[str, Encoder] = {
    "plain.npy": npy,
    "big-endian.npy": lambda p: npy(p.astype(p.dtype.newbyteorder(">"))),
    "columns-first.npy": lambda p: npy(np.asfortranarray(p)),
    "one-band.npy": lambda p: npy(p[None]),
}
_MATS: dict[str, Encoder] = {
    "plain.mat": lambda p: mat(image=p, note="text"),
    "zipped.mat": lambda p: mat(True, image=p, taps=np.ones(5)),
}
_IMAGES: dict[str, Encoder] = {
    "plain.png": lambda p: saved(p, "PNG"),
    "plain.tif": lambda p: saved(p, "TIFF"),
    "deflated.tif": lambda p: saved(p, "TIFF", compression="tiff_adobe_deflate"),
}
# Ways to write pixels of a dtype that keep every bit of them.
SOUND: dict[str, dict[str, Encoder]] = {
    "uint8": _IMAGES | _ARRAYS | _MATS | {"grey.png": lambda p: saved(np.stack([p] * 3, -1), "PNG")},
    "uint16": _IMAGES | _ARRAYS | _MATS,
    "float32": {k: v for k, v in _IMAGES.items() if k.endswith("tif")} | _ARRAYS | _MATS
    | {"double.npy": lambda p: npy(p.astype(np.float64)), "chip.015": phoenix},
    "complex64": _ARRAYS | _MATS | {"double.npy": lambda p: npy(p.astype(np.complex128))},
    "int16": _ARRAYS,
}  # fmt: skip


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, extra: bytes = b"", data: bytes = zlib.compress(b"\0" * 10)) -> bytes:
    """A PNG that announces any size, with `data` (compressed) as its pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def npy_head(shape: str, descr: str = "<f4") -> bytes:
    head = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + b"\0" * 64


def tiff(
    width: int, height: int, data: bytes, compression: int = 1, bits: int = 8, order: str = "<", bands: int = 1
) -> bytes:
    """A TIFF of one strip that announces any size, `bits` an element, and may be wrong about everything."""
    tags = [(256, width), (257, height), (258, bits), (259, compression), (262, 1), (273, 0), (277, bands)]
    tags += [(278, height), (279, len(data)), (339, 3 if bits > 16 else 1)]
    start = 8 + 2 + 12 * len(tags) + 4
    entries = (struct.pack(f"{order}HHII", tag, 4, 1, start if tag == 273 else value) for tag, value in tags)
    magic = b"II*\0" if order == "<" else b"MM\0*"
    directory = struct.pack(f"{order}IH", 8, len(tags)) + b"".join(entries) + b"\0" * 4
    return magic + directory + data


@cache
def zeros() -> bytes:
    """24 MiB of nothing, compressed."""
    return zlib.compress(bytes(24 << 20))


@cache
def mat_bomb() -> bytes:
    """A .mat file with one compressed array of 24 MiB."""
    size = 24 << 20
    head = struct.pack("<IIIIIIIIiiHHI", 14, size + 56, 6, 8, 6, 0, 5, 8, 1024, size >> 13, 1, 1, ord("a"))
    body = zlib.compress(head + struct.pack("<II", 9, size) + bytes(size))
    return mat(a=np.ones(2))[:128] + struct.pack("<II", 15, len(body)) + body


@cache
def npz_bomb() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, image=np.zeros((2048, 2048)))
    return file.getvalue()


class Payload:
    """What unpickling would turn into a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def refused(rng: Rng, outside: Path) -> dict[str, bytes]:
    """Files that must not become samples, whatever the dtype of their source; `outside`: a file nobody may create."""
    float_pixels, words = noise(rng, "float32", 16), noise(rng, "uint16", 16)
    swapped = float_pixels.view(np.uint32).byteswap().view(np.float32)
    spoilt = np.where(rng.random((16, 16)) < 0.1, np.nan, float_pixels)
    jpeg, plain = saved(noise(rng, "uint8", 16), "JPEG"), mat(image=float_pixels)
    at = jpeg.index(b"\xff\xc0") + 5
    text = "x" * int(rng.integers(1, 300))
    return {
        "empty.png": b"",
        "text.jpg": text.encode(),
        "virtual.tif": b'<VRTDataset rasterXSize="9" rasterYSize="9"><SourceFilename>/etc/passwd</SourceFilename>',
        "huge.png": png(100_000, 100_000),
        "huge.jpg": jpeg[:at] + struct.pack(">HH", 65500, 65500) + jpeg[at + 4 :],
        "huge.tif": tiff(100_000, 100_000, bytes(99)),
        "huge-deflated.tif": tiff(100_000, 100_000, zeros(), 8),
        "bands.tif": tiff(16, 16, rng.bytes(512), bands=32767),
        "huge.npy": npy_head("(100000, 100000)"),
        "huger.npy": npy_head("(9999999999, 9999999999, 9999999999)"),
        "negative.npy": npy_head("(-4, -4)"),
        "nested.npy": npy_head("(" * 3000),
        "huge.015": phoenix(float_pixels, NumberOfRows=100_000, NumberOfColumns=100_000),
        "bomb.npz": npz_bomb(),
        "bomb.mat": mat_bomb(),
        "bomb.png": png(5000, 5000, data=zeros()),
        "bomb-text.png": png(64, 64, chunk(b"zTXt", b"k\0\0" + zeros())),
        "bomb-profile.png": png(64, 64, chunk(b"iCCP", b"k\0\0" + zeros())),
        "bomb-international.png": png(64, 64, chunk(b"iTXt", b"k\0\1\0\0\0" + zeros())),
        "bomb.tif": tiff(4096, 4096, zeros(), 8),
        "nan.tif": saved(spoilt.astype(np.float32), "TIFF"),
        "nan.npy": npy(spoilt.astype(np.float32)),
        "inf.npy": npy(np.where(np.isnan(spoilt), np.inf, float_pixels)),
        "nan-complex.npy": npy((spoilt * 1j).astype(np.complex64)),
        "nan.mat": mat(image=spoilt),
        "nan.015": phoenix(spoilt.astype(np.float32)),
        "wrong-order.npy": npy(swapped),
        "wrong-order.mat": plain[:126] + plain[127:125:-1] + plain[128:],
        "wrong-order.015": phoenix(float_pixels, order="<"),
        "wrong-order.tif": tiff(16, 16, swapped.tobytes(), bits=32, order="<"),
        "wrong-mark.tif": b"MM\0*" + saved(words, "TIFF")[4:],
        "object.npy": b"\x93NUMPY\x01\x00" + npy_head("(1,)", "|O")[8:-64] + pickle.dumps(Payload(outside)),
        "record.npy": npy_head("(4, 4)", "<f4,<f4"),
        "colour.png": saved(rng.integers(0, 255, (16, 16, 3)).astype(np.uint8), "PNG"),
        "zero.png": saved(np.zeros((16, 16), np.uint8), "PNG"),
        "decibel.npy": npy(-float_pixels),
        "cut.png": saved(noise(rng, "uint8", 16), "PNG")[:-40],
        "cut.npy": npy(words)[:-1],
    }


def mutated(data: bytes, rng: Rng, other: bytes = b"") -> tuple[str, bytes]:
    """Damage of one to three kinds, half of it in the first 512 bytes: (its name, the bytes)."""
    body, names = bytearray(data), []
    for _ in range(int(rng.integers(1, 4))):
        if not body:
            break
        near = min(len(body), 512)
        at = int(rng.integers(near) if rng.random() < 0.5 else rng.integers(len(body)))
        size = int(rng.integers(1, 65))
        name = str(rng.choice(["flip", "byte", "word", "digits", "cut", "drop", "repeat", "splice", "zeros", "tail"]))
        if name == "flip":
            body[at] ^= 1 << int(rng.integers(8))
        elif name == "byte":
            body[at] = int(rng.integers(256))
        elif name == "word":
            width, order = int(rng.choice([2, 4, 8])), str(rng.choice(["little", "big"]))
            value = EDGES[int(rng.integers(len(EDGES)))] % (1 << 8 * width)
            body[at : at + width] = value.to_bytes(width, order)  # type: ignore[arg-type]
        elif name == "digits":
            found = list(re.finditer(rb"\d+", body[:4096]))
            if found:
                match = found[int(rng.integers(len(found)))]
                number = str(EDGES[int(rng.integers(len(EDGES)))]).encode()
                same = number[: len(match[0])].rjust(len(match[0]), b"0")
                body[slice(*match.span())] = same if rng.random() < 0.5 else number
        elif name == "cut":
            del body[at:]
        elif name == "drop":
            del body[at : at + size]
        elif name == "repeat":
            body[at:at] = body[at : at + size] * int(rng.integers(1, 20))
        elif name == "splice":
            source, start = other or data, int(rng.integers(len(other or data)))
            body[at : at + size] = source[start : start + size]
        elif name == "zeros":
            body[at : at + size] = bytes(len(body[at : at + size]))
        else:
            body += rng.bytes(size * 20)
        names.append(name)
    return "+".join(names), bytes(body)


def tar_members(rng: Rng, good: bytes, outside: Path) -> Iterator[tuple[str, bytes]]:
    """(what it is, raw bytes of a tar) of members that must not be read; `good` is an image that would be."""

    def one(name: str, data: bytes = b"", form: int = tarfile.GNU_FORMAT, **fields: Any) -> bytes:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        for field, value in fields.items():
            setattr(info, field, value)
        padded = data + bytes(-len(data) % 512)
        return info.tobuf(form, "utf-8", "surrogateescape") + padded

    number = int(rng.integers(1000))
    yield "parent", one(f"../../{outside.name}-{number}.png", good)
    yield "parent inside", one(f"a/../../{outside.name}-{number}.png", good)
    yield "absolute", one(f"{outside}-{number}.png", good)
    yield "long parent", one("../" * 60 + f"{number}.png", good)
    yield "pax parent", one("p" * 120, good, tarfile.PAX_FORMAT, pax_headers={"path": f"../{outside.name}.png"})
    links = {"symbolic": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE}
    for what, kind in links.items():
        yield f"{what} link", one(f"a/{what}-{number}.png", type=kind, linkname=str(outside))
    for what, kind in {"character": tarfile.CHRTYPE, "block": tarfile.BLKTYPE, "fifo": tarfile.FIFOTYPE}.items():
        yield what, one(f"a/{what}-{number}.png", type=kind, devmajor=1, devminor=5)
    yield "sparse", one(f"a/sparse-{number}.png", good, type=tarfile.GNUTYPE_SPARSE)
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**60)}
    body = b"1\n0\n512\n".ljust(512, b"\0") + good
    yield "pax sparse", one(f"a/pax-sparse-{number}.png", body, tarfile.PAX_FORMAT, pax_headers=pax)


def head(kind: bytes, size: int, body: bytes = b"", name: str = "a/x.png") -> bytes:
    """A member of a tar whose header says this size, whatever it holds."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, max(size, 0)
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if size < 0:
        block[124:136] = (2**96 + size).to_bytes(12, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + body + bytes(-len(body) % 512)


def tar_wholes(rng: Rng, good: bytes) -> Iterator[tuple[str, bytes]]:
    """(what it is, an archive) whose headers lie, so that all of it may be refused, in words."""

    plain, end = head(tarfile.REGTYPE, len(good), body=good), bytes(1024)
    record = b"30 mtime=" + b"1" * 20 + b"\n"
    yield "many pax headers", head(b"x", len(record), body=record) * 3000 + plain + end
    yield "many long names", head(b"L", 4, body=b"abc\0") * 3000 + plain + end
    yield "huge pax header", head(b"x", 2 << 20, body=b"%d comment=" % (2 << 20) + b"x" * (2 << 20)) + plain + end
    yield "pax header of 100 GB", head(b"x", 100 << 30, body=record) + plain + end
    yield "pax lengths", head(b"x", 32, body=b"0 path=x\n".ljust(32, b"\0")) + plain + end
    yield "pax digits", head(b"x", 6000, body=b"9" * 5990 + b" path=x\n\0") + plain + end
    yield "a size that leads back", plain + head(tarfile.REGTYPE, -512) + plain + end
    back = b"13 size=-512\n"
    yield "a pax size that leads back", plain + head(b"x", len(back), body=back) + plain + end
    for value in (b"-1", b"9" * 30, b"1e9", b"nan", b"\xff"):
        body = b"%d size=%s\n" % (len(value) + 9, value)
        yield f"pax size {value!r}", head(b"x", len(body), body=body) + plain + end
    for size in (-1, -512, -1024, -(2**40), 2**62):
        for kind in (tarfile.REGTYPE, b"x", b"L", b"S"):
            yield f"size {size} of {kind!r}", head(kind, size) + plain + end
    for key, value in (("map", "1"), ("map", "9" * 99), ("size", "x"), ("numblocks", str(2**62)), ("major", "1")):
        text = f"GNU.sparse.{key}={value}\n"
        body = f"{len(text) + 3} {text}".encode()
        yield f"pax sparse {key}", head(b"x", len(body), body=body) + plain + end
    yield "sparse table", head(b"S", 512, body=b"\xff" * 512) + plain + end
    yield "compressed", b"\x1f\x8b" + rng.bytes(3000)
    yield "cut", (plain + end)[:700]


def odd_names() -> list[str]:
    """File names that a file system takes and that are meant to be taken for something else."""
    names = ["-rf", "new\nline", "$(touch x)", "a;b|c", "%2e%2e%2fup", "dots..", "\u202egnp", "x" * 200, "con"]
    return [*names, "tab\t", "back\\slash", os.fsdecode(b"\xff\xfe")]
