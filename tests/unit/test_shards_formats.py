"""Every readable image keeps its pixels and dtype; every unusable one is refused with its name and its reason."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from shards.errors import DataError
from shards.formats import decode
from shards.schema import Record
from shards.sources import folder, rows


def encoded(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    if kind == "npy":
        np.save(file, pixels)
    else:
        Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def ramp(dtype: str, height: int = 16, width: int = 20) -> np.ndarray:
    return (np.arange(1, height * width + 1).reshape(height, width) % 251).astype(dtype)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("PNG", "uint8"), ("PNG", "uint16"), ("TIFF", "uint8"), ("TIFF", "uint16"), ("TIFF", "float32")]
    + [("npy", dtype) for dtype in ("uint8", "uint16", "float32")],
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
    read = decode(encoded(pixels, "TIFF"), "a.tif")
    assert read.dtype == np.uint16
    assert (read == pixels).all()


def test_big_endian_and_single_channel_arrays_become_native_planes():
    read = decode(encoded(ramp("uint16").astype(">u2")[None], "npy"), "a.npy")
    assert read.dtype.isnative
    assert (read == ramp("uint16")).all()


PNG = encoded(np.random.default_rng(0).integers(1, 255, (64, 64), dtype=np.uint8), "PNG")
JPEG = encoded(np.random.default_rng(0).integers(1, 255, (64, 64), dtype=np.uint8), "JPEG")
TIFF = encoded(np.random.default_rng(0).integers(1, 255, (64, 64), dtype=np.uint8), "TIFF")
NAN = np.where(np.eye(4) > 0, np.nan, 1).astype("float32")
BAD = {
    "empty.png": (b"", r"empty file \(0 bytes\)"),
    "text.png": (b"this is no picture", "not an image"),
    "gif.png": (encoded(ramp("uint8"), "GIF"), "not an image"),
    "cut.png": (PNG[: len(PNG) // 2], "truncated or damaged image"),
    "cut.jpg": (JPEG[: len(JPEG) // 2], "truncated or damaged image"),
    "cut.tif": (TIFF[:-900], "damaged image"),
    "head.png": (PNG[:20], "not an image|damaged image"),
    "colour.png": (
        encoded(np.stack([ramp("uint8"), ramp("uint8"), ramp("uint8") + 1], 2), "PNG"),
        "its three channels differ",
    ),
    "alpha.png": (encoded(np.full((8, 8, 4), 9, np.uint8), "PNG"), "unsupported pixel mode 'RGBA'"),
    "bits.png": (encoded(ramp("uint8") > 9, "PNG"), "unsupported pixel mode '1'"),
    "dot.png": (encoded(np.ones((1, 1), np.uint8), "PNG"), "one pixel wide has no structure: 1x1"),
    "line.png": (encoded(np.ones((1, 9), np.uint8), "PNG"), "one pixel wide has no structure: 1x9"),
    "none.npy": (encoded(np.zeros((0, 5), np.uint8), "npy"), "an image without pixels: 0x5"),
    "nan.tif": (encoded(NAN, "TIFF"), "4 pixels are NaN or infinite"),
    "inf.npy": (encoded(np.full((4, 4), np.inf, np.float32), "npy"), "16 pixels are NaN or infinite"),
    "db.npy": (encoded(np.full((4, 4), -20, np.float32), "npy"), "negative pixels are not amplitudes"),
    "zero.png": (encoded(np.zeros((8, 8), np.uint8), "PNG"), "every pixel is zero"),
    "signed.tif": (encoded(ramp("int32") - 99, "TIFF"), "do not fit 16 bits without sign"),
    "large.tif": (encoded(ramp("int32") * 9999, "TIFF"), "do not fit 16 bits without sign"),
    "signed.npy": (encoded(ramp("int16"), "npy"), "pixels are int16"),
    "complex.npy": (encoded(ramp("complex64"), "npy"), "pixels are complex64"),
    "cube.npy": (encoded(np.ones((3, 8, 8), np.uint8), "npy"), r"shape \(3, 8, 8\) is not one image"),
    "text.npy": (b"not an array", "not a readable .npy array"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_unusable_file_is_refused_with_its_name_and_its_reason(name):
    data, message = BAD[name]
    with pytest.raises(DataError, match=message) as caught:
        decode(data, f"some/{name}")
    assert f"where: some/{name}" in str(caught.value)
    assert "do:" in str(caught.value)


def test_an_array_that_needs_pickle_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"not a readable \.npy array"):
        decode((tmp_path / "a.npy").read_bytes(), "a.npy")


def write(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data if isinstance(data, bytes) else encoded(data, "PNG"))


def test_folders_name_classes_in_sorted_order_and_side_files_are_passed_over(tmp_path):
    write(tmp_path, {"b/2.png": ramp("uint8"), "a/1.png": ramp("uint8"), "top.png": ramp("uint8")})
    write(tmp_path, {"index.csv": b"x", "a/notes.md": b"x", "a/.hidden.png": b"x"})
    found = [(r.key, r.label) for r in folder.read(tmp_path)]
    assert found == [("a/1.png", "a"), ("b/2.png", "b"), ("top.png", None)]
    assert {r.label for r in folder.read(tmp_path, labels=False)} == {None}


def test_globs_choose_files_and_an_unknown_kind_of_file_is_never_passed_over_silently(tmp_path):
    write(tmp_path, {"p/images/1.png": ramp("uint8"), "p/masks/1.png": ramp("uint8"), "p/images/chip.015": b"raw"})
    assert [r.key for r in folder.read(tmp_path, include=("*/images/*.png",))] == ["p/images/1.png"]
    (rejected,) = folder.read(tmp_path, exclude=("*.png",))
    assert (rejected.key, rejected.kind) == ("p/images/chip.015", "bad")
    assert rejected.reason == "not an image format that is read here (exclude it, or convert it)"


def test_a_tar_gives_what_the_folder_gives_and_its_member_names_never_become_paths(tmp_path):
    write(tmp_path / "f", {"a/1.png": ramp("uint8"), "b/2.png": ramp("uint16")})
    with tarfile.open(tmp_path / "f.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        archive.add(tmp_path / "f", ".")
        evil = tarfile.TarInfo("../../c/3.png")
        evil.size = len(PNG)
        archive.addfile(evil, io.BytesIO(PNG))
        link = tarfile.TarInfo("a/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    from_tar = [r for r in folder.read(tmp_path / "f.tar") if isinstance(r, Record)]
    from_folder = list(folder.read(tmp_path / "f"))
    assert [r.label for r in from_tar if ".." not in r.key] == [r.label for r in from_folder] == ["a", "b"]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_path_and_a_damaged_or_compressed_tar_are_errors(tmp_path):
    with pytest.raises(DataError, match="no such folder or tar"):
        list(folder.read(tmp_path / "nowhere"))
    (tmp_path / "bad.tar").write_bytes(b"\x1f\x8b" + b"z" * 5000)
    with pytest.raises(DataError, match="not a readable plain tar"):
        list(folder.read(tmp_path / "bad.tar"))


@settings(max_examples=30, deadline=None)
@given(height=st.integers(2, 40), width=st.integers(2, 40), tile=st.integers(4, 16))
def test_tiles_cover_every_pixel_and_overlap_only_at_the_border(tmp_path_factory, height, width, tile):
    root = tmp_path_factory.mktemp("scene")
    scene = np.arange(1, height * width + 1, dtype=np.uint16).reshape(height, width)
    write(root, {"s.png": scene})
    records = [r for r in folder.read(root, tile=tile) if isinstance(r, Record)]
    assert np.unique(np.concatenate([r.pixels.ravel() for r in records])).size == scene.size
    assert len(records) == -(-height // tile) * -(-width // tile)
    assert {r.pixels.shape for r in records} == {(min(tile, height), min(tile, width))}


def test_flat_tiles_and_small_chips_are_rejected_with_a_reason_and_never_silently(tmp_path):
    scene = np.full((32, 64), 20, np.uint8)
    scene[:, :32] += np.random.default_rng(0).integers(0, 200, (32, 32), dtype=np.uint8)
    write(tmp_path, {"sea.png": scene, "tiny.png": ramp("uint8", 6, 6)})
    kept, flat, small = folder.read(tmp_path, tile=32, min_std=0.3, min_side=8)
    assert (kept.key, kept.meta) == ("sea.png@0,0", {"file": "sea.png", "top": 0, "left": 0})
    assert (flat.key, flat.kind, flat.reason) == ("sea.png@0,32", "flat", "std 0, mean 20, min_std 0.3")
    assert (small.kind, small.reason) == ("small", "6x6 is below min_side 8")


def test_the_registry_lists_every_kind_of_source_and_why_it_cannot_run():
    assert [name for name, _, _ in rows()] == ["folder", "synthetic"]
    assert rows()[0][2] == ""
