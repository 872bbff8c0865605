"""Folders and tars of images: what is read, in which order, what is cut into tiles and what is rejected."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_shards_formats import MAT, NPY, PNG, encoded, ramp

from shards.errors import DataError
from shards.schema import Record
from shards.sources.base import Options
from shards.sources.files import Files
from shards.sources.folder import Folder


def write(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data if isinstance(data, bytes) else encoded(data, "PNG"))


def read(path, **options):
    source = Folder(Files(path), Options(**options))
    for item in source.items():
        yield from source.load(item) if not hasattr(item, "reason") else [item]


def test_folders_name_classes_in_sorted_order_and_side_files_are_passed_over(tmp_path):
    write(tmp_path, {"b/2.png": ramp("uint8"), "a/1.png": ramp("uint8"), "top.png": ramp("uint8")})
    write(tmp_path, {"index.csv": b"x", "a/notes.md": b"x", "a/.hidden.png": b"x"})
    found = [(r.key, r.label) for r in read(tmp_path)]
    assert found == [("a/1.png", "a"), ("b/2.png", "b"), ("top.png", None)]
    assert {r.label for r in read(tmp_path, labels=False)} == {None}


def test_globs_choose_files_and_an_unknown_kind_of_file_is_never_passed_over_silently(tmp_path):
    write(tmp_path, {"p/images/1.png": ramp("uint8"), "p/masks/1.png": ramp("uint8"), "p/images/chip.015": b"raw"})
    assert [r.key for r in read(tmp_path, include=("*/images/*.png",))] == ["p/images/1.png"]
    (rejected,) = read(tmp_path, exclude=("*.png",))
    assert (rejected.key, rejected.kind) == ("p/images/chip.015", "bad")
    assert rejected.reason == "not an image format that is read here (exclude it, or convert it)"


def test_a_damaged_file_is_rejected_and_the_others_are_read(tmp_path):
    write(tmp_path, {"a/1.png": PNG[:99], "a/2.png": ramp("uint8"), "a/3.mat": MAT, "a/4.npy": NPY})
    damaged, *good = read(tmp_path)
    assert (damaged.key, damaged.kind) == ("a/1.png", "bad")
    assert "damaged image" in damaged.reason
    assert [r.pixels.dtype.name for r in good] == ["uint8", "complex64", "complex64"]


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
    from_tar = [r for r in read(tmp_path / "f.tar") if isinstance(r, Record)]
    from_folder = list(read(tmp_path / "f"))
    assert [r.label for r in from_tar if ".." not in r.key] == [r.label for r in from_folder] == ["a", "b"]
    assert {r.key for r in Files(tmp_path / "f.tar").refused} == {"../../c/3.png", "a/link.png"}
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_path_and_a_damaged_or_compressed_tar_are_errors(tmp_path):
    with pytest.raises(DataError, match="no such folder or file"):
        list(read(tmp_path / "nowhere"))
    (tmp_path / "bad.tar").write_bytes(b"\x1f\x8b" + b"z" * 5000)
    with pytest.raises(DataError, match="not a readable plain tar"):
        list(read(tmp_path / "bad.tar"))


@settings(max_examples=30, deadline=None)
@given(height=st.integers(2, 40), width=st.integers(2, 40), tile=st.integers(4, 16), pairs=st.booleans())
def test_tiles_cover_every_pixel_and_overlap_only_at_the_border(tmp_path_factory, height, width, tile, pairs):
    root = tmp_path_factory.mktemp("scene")
    scene = np.arange(1, height * width + 1, dtype=np.int16 if pairs else np.uint16).reshape(height, width)
    write(root, {"s.npy": encoded(np.stack([scene, -scene], -1), "npy")} if pairs else {"s.png": scene})
    records = [r for r in read(root, tile=tile) if isinstance(r, Record)]
    planes = [r.pixels[..., 0] if pairs else r.pixels for r in records]
    assert np.unique(np.concatenate([plane.ravel() for plane in planes])).size == scene.size
    assert len(records) == -(-height // tile) * -(-width // tile)
    assert {plane.shape for plane in planes} == {(min(tile, height), min(tile, width))}


def test_flat_tiles_and_small_chips_are_rejected_with_a_reason_and_never_silently(tmp_path):
    scene = np.full((32, 64), 20, np.uint8)
    scene[:, :32] += np.random.default_rng(0).integers(0, 200, (32, 32), dtype=np.uint8)
    write(tmp_path, {"sea.png": scene, "tiny.png": ramp("uint8", 6, 6)})
    kept, flat, small = read(tmp_path, tile=32, min_std=0.3, min_side=8)
    assert (kept.key, kept.meta) == ("sea.png@0,0", {"file": "sea.png", "top": 0, "left": 0})
    assert (flat.key, flat.kind, flat.reason) == ("sea.png@0,32", "flat", "std 0, mean 20, min_std 0.3")
    assert (small.kind, small.reason) == ("small", "6x6 is below min_side 8")
