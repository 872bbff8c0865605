"""Every readable image keeps its pixels and dtype; every unusable one is refused with its name and its reason."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from shards.errors import DataError
from shards.formats import MAX_BANDS, check, decode
from shards.matfile import read as read_mat
from shards.phoenix import decode_phoenix
from shards.schema import DTYPES


def encoded(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    if kind == "npy":
        np.save(file, pixels)
    else:
        Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def mat(compressed: bool = False, **variables: object) -> bytes:
    file = io.BytesIO()
    scipy.io.savemat(file, variables, do_compression=compressed)
    return file.getvalue()


def phoenix(magnitude: np.ndarray, phase: np.ndarray | None = None, native: int = 0, **fields: object) -> bytes:
    rows, columns = magnitude.shape
    header = {"native_header_length": native, "NumberOfColumns": columns, "NumberOfRows": rows, **fields}
    text = "[PhoenixHeaderVer01.04]\nPhoenixHeaderLength= {:05d}\n" + "".join(f"{k}= {v}\n" for k, v in header.items())
    text += "[EndofPhoenixHeader]\n"
    head = text.format(fields.get("length", len(text) - 1)).encode()  # "{:05d}" is one character longer than its number
    blocks = [magnitude] if phase is None else [magnitude, phase]
    return head + b"\0" * native + b"".join(block.astype(">f4").tobytes() for block in blocks)


def ramp(dtype: str, height: int = 16, width: int = 20) -> np.ndarray:
    return (np.arange(1, height * width + 1).reshape(height, width) % 251).astype(dtype)


SLC = (ramp("float32") * np.exp(1j * ramp("float32"))).astype("complex64")
PAIRS = np.stack([ramp("int16") - 99, -ramp("int16")], -1)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("PNG", "uint8"), ("PNG", "uint16"), ("TIFF", "uint8"), ("TIFF", "uint16"), ("TIFF", "float32")]
    + [("npy", dtype) for dtype in ("uint8", "uint16", "float32", "complex64")],
)
def test_pixels_and_dtype_survive(kind, dtype):
    pixels = ramp(dtype)
    read = decode(encoded(pixels, kind), f"a.{kind.lower()}")
    assert read.dtype == pixels.dtype
    assert (read == pixels).all()


@settings(max_examples=30, deadline=None)
@given(pixels=hnp.arrays(np.uint16, st.tuples(st.integers(2, 9), st.integers(2, 9)), elements=st.integers(1, 65535)))
def test_sixteen_bits_are_never_squeezed_into_eight(pixels):
    assert (decode(encoded(pixels, "PNG"), "a.png") == pixels).all()


def test_jpeg_is_read_and_three_equal_channels_become_one():
    grey = ramp("uint8")
    assert decode(encoded(grey, "JPEG"), "a.jpg").shape == grey.shape
    assert (decode(encoded(np.stack([grey] * 3, axis=2), "PNG"), "a.png") == grey).all()


def test_integers_of_32_bits_become_uint16_when_they_fit():
    pixels = ramp("int32") * 200
    for kind in ("TIFF", "npy"):
        read = decode(encoded(pixels, kind), f"a.{kind.lower()}")
        assert read.dtype == np.uint16
        assert (read == pixels).all()


@pytest.mark.parametrize("dtype", [">u2", ">f4", ">c8", "<u2"])
def test_any_byte_order_and_single_channel_arrays_become_native_planes(dtype):
    read = decode(encoded(ramp("uint16").astype(dtype)[None], "npy"), "a.npy")
    assert read.dtype.isnative
    assert read.shape == (16, 20)
    assert (read == ramp("uint16")).all()


def test_bands_pairs_and_columns_first_arrays_keep_their_place():
    bands = np.stack([ramp("float32"), ramp("float32") * 2])
    assert (decode(encoded(bands, "npy"), "a.npy") == bands).all()
    assert (decode(encoded(np.asfortranarray(bands), "npy"), "a.npy") == bands).all()
    assert (decode(encoded(PAIRS, "npy"), "a.npy") == PAIRS).all()
    assert decode(encoded(np.stack([PAIRS, PAIRS]), "npy"), "a.npy").shape == (2, 16, 20, 2)
    assert decode(encoded(PAIRS[None], "npy"), "a.npy").shape == (16, 20, 2)


@settings(max_examples=50, deadline=None)
@given(
    pixels=hnp.arrays(np.complex128, (3, 4), elements=st.complex_numbers(max_magnitude=1e12, min_magnitude=1e-3)),
    scale=st.sampled_from([1.0, 1e-60, 1e60]),
)
def test_64_bit_numbers_lose_their_rounding_or_are_refused(pixels, scale):
    data = encoded(pixels * scale, "npy")
    if scale == 1.0:
        read = decode(data, "a.npy")
        assert read.dtype == np.complex64
        assert np.abs(read - pixels).max() <= 1e-6 * np.abs(pixels).max()
    else:
        with pytest.raises(DataError, match=r"complex128 values up to .* do not fit 32-bit floats"):
            decode(data, "a.npy")
    real = decode(encoded(np.abs(pixels), "npy"), "a.npy")
    assert real.dtype == np.float32


@pytest.mark.parametrize("compressed", [False, True])
def test_a_mat_file_gives_its_image_by_being_the_only_one_or_by_its_name(compressed):
    whole = {"complex_img": SLC.astype("complex128"), "azimuth": 10.25, "target_name": "T72", "taps": np.ones(30)}
    read = decode(mat(compressed, **whole), "a.mat")
    assert read.dtype == np.complex64
    assert (read == SLC).all()
    read = decode(mat(compressed, **whole, cells=np.array([[SLC, "x"]], object), other=ramp("uint8")), "a.mat")
    assert (read == SLC).all()
    assert decode(mat(compressed, anything=ramp("uint8")), "a.mat").dtype == np.uint8
    assert (decode(mat(compressed, anything=ramp("float64")), "a.mat") == ramp("float32")).all()
    read = decode(mat(compressed, Amp=np.abs(SLC), Phase=np.angle(SLC)), "a.mat")
    assert read.dtype == np.complex64
    assert np.abs(read - SLC).max() < 1e-3
    with pytest.raises(DataError, match=r"2 variables could be the image \(numeric are: a 16x20, b 16x20\)"):
        decode(mat(compressed, a=SLC, b=SLC), "a.mat")
    with pytest.raises(DataError, match="its magnitudes are negative or complex"):
        decode(mat(compressed, mag=-np.abs(SLC), phase=np.angle(SLC)), "a.mat")


@settings(max_examples=60, deadline=None)
@given(
    values=st.sampled_from([*"bBhHiIlLqQfdFD"]).flatmap(
        lambda code: hnp.arrays(code, hnp.array_shapes(min_dims=2, max_dims=3, max_side=5), elements=st.integers(0, 99))
    ),
    compressed=st.booleans(),
)
def test_the_mat_reader_agrees_with_scipy(values, compressed):
    data = mat(compressed, some_name=values, text="abc", s={"field": 1})
    expected = scipy.io.loadmat(io.BytesIO(data))["some_name"]
    found = read_mat(data, "a.mat")
    assert list(found) == ["some_name"]
    assert found["some_name"].dtype == expected.dtype
    assert (found["some_name"] == expected).all()


def test_a_phoenix_chip_gives_complex_pixels_and_its_header():
    data = phoenix(np.abs(SLC), np.angle(SLC), TargetType="t72_tank", MeasuredDepression="17.3", Polarization="HH")
    read, header = decode_phoenix(data, "HB03333.015")
    assert read.dtype == np.complex64
    assert np.abs(read - SLC).max() < 1e-3
    assert (header["TargetType"], header["MeasuredDepression"], header["Polarization"]) == ("t72_tank", "17.3", "HH")
    assert (decode(data, "HB03333.015") == read).all()


def test_a_phoenix_chip_without_phases_is_amplitude_and_a_native_header_is_skipped():
    read = decode(phoenix(ramp("float32")), "a.015")
    assert read.dtype == np.float32
    assert read.dtype.isnative
    assert (read == ramp("float32")).all()
    assert decode(phoenix(np.abs(SLC), np.angle(SLC), native=512), "a.015").shape == SLC.shape


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, extra: bytes = b"", depth: int = 8, colour: int = 0) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")


def npy(shape: str, descr: str = "<f4", data: bytes = b"\0" * 64, pad: int = 0) -> bytes:
    head = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}}}{' ' * pad}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + data


def resized(data: bytes, at: int, size: tuple[int, ...], code: str) -> bytes:
    return data[:at] + struct.pack(code, *size) + data[at + struct.calcsize(code) :]


def bomb(megabytes: int) -> bytes:
    """A .mat file with one compressed array of zeros."""
    size = megabytes << 20
    head = struct.pack("<IIIIIIIIiiHHI", 14, size + 56, 6, 8, 6, 0, 5, 8, 1024, size >> 13, 1, 1, ord("a"))
    press = zlib.compressobj()
    body = press.compress(head + struct.pack("<II", 9, size))
    body += b"".join(press.compress(bytes(1 << 20)) for _ in range(megabytes)) + press.flush()
    return MAT[:128] + struct.pack("<II", 15, len(body)) + body


NOISE = np.random.default_rng(0).integers(1, 255, (64, 64), dtype=np.uint8)
PNG, JPEG, TIFF = (encoded(NOISE, kind) for kind in ("PNG", "JPEG", "TIFF"))
NPY, MAT, CHIP = encoded(SLC, "npy"), mat(complex_img=SLC), phoenix(np.abs(SLC), np.angle(SLC))
ZIPPED = mat(True, complex_img=SLC)
WIDTH = struct.pack("<HHI", 256, 4, 1)  # the tag of a TIFF; that of the height follows
LEVEL_0 = encoded(NOISE, "PNG", compress_level=0)
HUGE_TIFF = resized(TIFF, TIFF.index(WIDTH), (256, 4, 1, 60_000, 257, 4, 1, 60_000), "<HHIIHHII")
NAN = np.where(np.eye(4) > 0, np.nan, 1).astype("float32")
BAD = {
    "empty.png": (b"", r"empty file \(0 bytes\)"),
    "text.png": (b"this is no picture", "not an image"),
    "gif.png": (encoded(ramp("uint8"), "GIF"), "not an image"),
    "cut.png": (PNG[: len(PNG) // 2], "truncated or damaged image"),
    "cut.jpg": (JPEG[: len(JPEG) // 2], "truncated or damaged image"),
    "cut.tif": (TIFF[:-900], "damaged image"),
    "end.png": (PNG[:-14], "truncated or damaged image"),
    "flip.png": (LEVEL_0[:300] + bytes([LEVEL_0[300] ^ 1]) + LEVEL_0[301:], "truncated or damaged image"),
    "head.png": (PNG[:20], "not an image|damaged image"),
    "colour.png": (
        encoded(np.stack([ramp("uint8"), ramp("uint8"), ramp("uint8") + 1], 2), "PNG"),
        "its three channels differ",
    ),
    "alpha.png": (encoded(np.full((8, 8, 4), 9, np.uint8), "PNG"), "unsupported pixel mode 'RGBA'"),
    "bits.png": (encoded(ramp("uint8") > 9, "PNG"), "unsupported pixel mode '1'"),
    "deep.png": (png(64, 64, depth=16, colour=2), "three channels of 16 bits"),
    "dot.png": (encoded(np.ones((1, 1), np.uint8), "PNG"), "one pixel wide has no structure: 1x1"),
    "line.png": (encoded(np.ones((1, 9), np.uint8), "PNG"), "one pixel wide has no structure: 1x9"),
    "none.npy": (encoded(np.zeros((0, 5), np.uint8), "npy"), "an image without pixels: 0x5"),
    "nan.tif": (encoded(NAN, "TIFF"), "4 pixels are NaN or infinite"),
    "inf.npy": (encoded(np.full((4, 4), np.inf, np.float32), "npy"), "16 pixels are NaN or infinite"),
    "nan-slc.npy": (encoded(NAN * 1j, "npy"), "4 pixels are NaN or infinite"),
    "vast-slc.npy": (encoded(np.full((4, 4), 3e38 + 3e38j, np.complex64), "npy"), "16 pixels are NaN or infinite"),
    "db.npy": (encoded(np.full((4, 4), -20, np.float32), "npy"), "negative pixels are not amplitudes"),
    "zero.png": (encoded(np.zeros((8, 8), np.uint8), "PNG"), "every pixel is zero"),
    "zero.npy": (encoded(np.zeros((8, 8, 2), np.int16), "npy"), "every pixel is zero"),
    "signed.tif": (encoded(ramp("int32") - 99, "TIFF"), "do not fit 16 bits without sign"),
    "large.tif": (encoded(ramp("int32") * 9999, "TIFF"), "do not fit 16 bits without sign"),
    "signed.npy": (encoded(ramp("int16"), "npy"), r"shape \(16, 20\) are not pairs of I and Q"),
    "triples.npy": (encoded(np.ones((8, 8, 3), np.int16), "npy"), r"shape \(8, 8, 3\) are not pairs of I and Q"),
    "bool.npy": (encoded(ramp("uint8") > 9, "npy"), "pixels are bool"),
    "line.npy": (encoded(np.ones(9, np.uint8), "npy"), r"shape \(9,\) is not one image"),
    "last.npy": (encoded(np.ones((8, 9, 3), np.uint8), "npy"), r"shape \(8, 9, 3\) is not one image"),
    "stack.npy": (encoded(np.ones((MAX_BANDS + 1, 8, 8), np.uint8), "npy"), "65 bands: 1 to 64 are read"),
    "text.npy": (b"not an array", "not a readable .npy array"),
    "huge.npy": (npy("(1000000, 1000000)"), "announces 4,000,000,000,000 bytes of values, 64 follow"),
    "negative.npy": (npy("(-4, -4)"), r"its shape is \(-4, -4\)"),
    "truth.npy": (npy("(True, 16)"), r"its shape is \(True, 16\)"),
    "longer.npy": (NPY + b"\0", "announces 2,560 bytes of values, 2,561 follow"),
    "object.npy": (npy("(4, 4)", "|O"), "its values are object, no numbers"),
    "record.npy": (npy("(4, 4)", "<f4,<f4"), "no numbers"),
    "header.npy": (npy("(4, 4)", pad=60_000), "not a readable .npy array"),
    "nested.npy": (npy("(" * 3000), "not a readable .npy array"),
    "minus.npy": (npy("(4, " + "-" * 9000 + "4)"), "not a readable .npy array"),
    "huge.png": (png(100_000, 100_000), "100000x100000 pixels in a file of .* are not read whole"),
    "blank.png": (png(20_000, 20_000), "20000x20000 pixels in a file of .* are not read whole"),
    "huge.jpg": (resized(JPEG, JPEG.index(b"\xff\xc0") + 5, (65500, 65500), ">HH"), "65500x65500 pixels in a file"),
    "huge.tif": (HUGE_TIFF, "60000x60000 pixels in a file"),
    "text-bomb.png": (png(64, 64, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(9 << 20)))), "damaged image"),
    "colour-bomb.png": (png(64, 64, chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(9 << 20)))), "damaged image"),
    "text.mat": (b"x" * 200, "not a MATLAB file of level 5 to 7"),
    "new.mat": (b"MATLAB 7.3 MAT-file" + b" " * 600, r"a MATLAB 7.3 \(HDF5\) file is not read here"),
    "cut.mat": (MAT[:-9], "damaged .mat file: it is cut off"),
    "cut-zip.mat": (ZIPPED[:132] + struct.pack("<I", len(ZIPPED) - 136 - 50) + ZIPPED[136:-50], "is cut off"),
    "bomb.mat": (b"", "bytes expand beyond all measure"),
    "code.mat": (MAT.replace(struct.pack("<II", 7, 1280), struct.pack("<II", 8, 1280)), "holds data of type 8"),
    "nothing.mat": (mat(text="abc"), r"0 variables could be the image \(numeric are: none\)"),
    "bare.015": (b"[PhoenixHeaderVer01.04]\n", "damaged MSTAR chip: no complete Phoenix header"),
    "rows.015": (CHIP.replace(b"NumberOfRows= 16", b"NumberOfRows= 99"), "99x20 float32 magnitudes .* 2,560 bytes"),
    "minus.015": (CHIP.replace(b"OfRows= 16", b"OfRows= -6"), "NumberOfRows is '-6', a number was expected"),
    "vast.015": (phoenix(ramp("float32"), NumberOfRows=999_999_999), "999999999x20 float32 magnitudes"),
    "word.015": (phoenix(ramp("float32"), NumberOfColumns="many" * 99), "NumberOfColumns is 'many"),
    "none.015": (CHIP.replace(b"NumberOfRows", b"NumberOfRoes"), "no NumberOfRows in the header"),
    "far.015": (phoenix(ramp("float32"), length=99_999), "0 bytes follow"),
    "near.015": (phoenix(ramp("float32"), length=9), "PhoenixHeaderLength 9 ends inside the header"),
    "cut.015": (CHIP[:-4], "16x20 float32 magnitudes .* 2,556 bytes follow"),
    "scene.015": (phoenix(ramp("float32"), native=512), "a full scene of 16-bit magnitudes"),
    "nan.015": (phoenix(NAN, NAN), "4 pixels are NaN or infinite"),
    "inf.015": (phoenix(np.abs(SLC), np.full_like(np.abs(SLC), np.inf)), "320 pixels are NaN or infinite"),
    "negative.015": (phoenix(-ramp("float32"), ramp("float32")), "negative magnitudes"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_unusable_file_is_refused_with_its_name_and_its_reason(name):
    data, message = BAD[name]
    with pytest.raises(DataError, match=message) as caught:
        decode(bomb(256) if name == "bomb.mat" else data, f"some/{name}")
    assert f"where: some/{name}" in str(caught.value)
    assert "do:" in str(caught.value)


MEASURE = """
import resource, sys
from pathlib import Path
from shards.errors import DataError
from shards.formats import decode
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
for path in sys.argv[1:]:
    before = peak()
    try:
        decode(Path(path).read_bytes(), path)
    except DataError:
        print(peak() - before)
"""


def test_a_file_that_lies_about_its_size_costs_no_memory(tmp_path):
    names = ("blank.png", "huge.jpg", "huge.tif", "huge.npy", "vast.015", "bomb.mat")
    for name in names:
        (tmp_path / name).write_bytes(bomb(512) if name == "bomb.mat" else BAD[name][0])
    command = [sys.executable, "-c", MEASURE, *(str(tmp_path / name) for name in names)]
    megabytes = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert len(megabytes) == len(names)
    assert max(map(int, megabytes)) < 64


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_damaged_bytes_of_any_format_give_a_valid_array_or_an_explained_error(data):
    valid = {"a.png": PNG, "a.jpg": JPEG, "a.tif": TIFF, "a.npy": NPY, "a.mat": MAT, "z.mat": ZIPPED, "a.015": CHIP}
    name = data.draw(st.sampled_from(sorted(valid)))
    damaged = bytearray(valid[name])
    headers = st.integers(0, min(len(damaged) - 1, 400))  # where damage does most
    for _ in range(data.draw(st.integers(1, 5))):
        at = min(data.draw(headers | st.integers(0, len(damaged) - 1)), len(damaged) - 1)
        damaged[at] = data.draw(st.sampled_from([0, 1, 8, 127, 128, 255]) | st.integers(0, 255))
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(damaged))) :]
    try:
        pixels = decode(bytes(damaged), name)
    except DataError as caught:
        text = str(caught)
    else:
        check(pixels, name)
        text = f"where: {name} do:" if pixels.dtype.name in DTYPES else ""
    assert f"where: {name}" in text
    assert "do:" in text


def test_an_array_that_needs_pickle_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"not a readable \.npy array"):
        decode((tmp_path / "a.npy").read_bytes(), "a.npy")
