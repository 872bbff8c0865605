"""What packing leaves out is counted and explained, and never left out silently."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shards_samples import records

from shards.errors import DataError
from shards.inspect import summary
from shards.pack import REJECTED, Options, Record, Rejected, SourceSpec, pack


def bad_folder(root: Path, bad: int) -> Path:
    root.mkdir()
    for i in range(3):
        Image.fromarray(np.full((8, 8), i + 1, np.uint8)).save(root / f"good{i}.png")
    for i in range(bad):
        (root / f"bad{i:02}.png").write_bytes(b"")
    return root


def test_bad_files_stop_the_packing_with_all_of_them_counted_and_nothing_written(tmp_path):
    with pytest.raises(DataError, match="12 of 15 files cannot be used") as caught:
        pack(tmp_path / "out", [SourceSpec("s", bad_folder(tmp_path / "in", 12))])
    assert "bad09.png: empty file (0 bytes)" in str(caught.value)
    assert "bad10" not in str(caught.value)
    assert "and 2 more" in str(caught.value)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".pack-s"]  # so that what was read is not read again
    pack(tmp_path / "out", [SourceSpec("s", tmp_path / "in", options=Options(exclude=("bad*",)))])
    assert not (tmp_path / "out" / ".pack-s").exists()


def test_skipped_files_are_listed_with_their_reason_and_counted(tmp_path):
    source = bad_folder(tmp_path / "in", 2)
    Image.fromarray(np.full((8, 8), 300, np.uint16)).save(source / "wide.png")
    catalog = pack(tmp_path / "out", [SourceSpec("s", source)], on_error="skip")
    assert catalog.samples == 3
    assert catalog.sources[0].statistics["rejected"] == {"bad": 3, "small": 0, "flat": 0, "other": 0}
    lines = [json.loads(line) for line in (tmp_path / "out" / REJECTED).read_text().splitlines()]
    assert lines[0] == {"file": "bad00.png", "kind": "bad", "reason": "empty file (0 bytes)", "source": "s"}
    assert lines[2]["reason"] == "uint16 in a source of uint8: split the source"
    pack(tmp_path / "out", [SourceSpec("s", source, options=Options(exclude=("bad*", "wide*")))])
    assert not (tmp_path / "out" / REJECTED).exists()
    (tmp_path / "out" / REJECTED).write_text('{"a line cut')
    pack(tmp_path / "out", [SourceSpec("s", source)], on_error="skip")
    assert len((tmp_path / "out" / REJECTED).read_text().splitlines()) == 4


def test_a_source_whose_images_were_all_left_out_names_the_commonest_reasons_and_cures(tmp_path):
    left = [Rejected(f"{i}", "flat", f"std {i}, mean 7, min_std 0.6") for i in range(1200)]
    left += [Rejected(f"s{i}", "small", f"{i}x9 is below min_side 20") for i in range(3)]
    with pytest.raises(DataError) as caught:
        pack(tmp_path, [SourceSpec("s", records=left)])
    assert "source 's' has no usable image: all 1,203 were left out" in str(caught.value)
    assert "1,200 x flat: std #, mean #, min_std #" in str(caught.value)
    assert "3 x small: #x# is below min_side #" in str(caught.value)
    assert "lower --min-std or raise --max-nodata; lower --min-side" in str(caught.value)


def test_samples_with_other_channels_than_the_first_are_rejected(tmp_path):
    chips = [Record(np.full(shape, i + 1, np.uint8), str(i)) for i, shape in enumerate([(2, 8, 9)] * 3 + [(8, 9)])]
    with pytest.raises(DataError, match=r"3: channels: 1 in a source of 2: [\s\S]*--option bands=1"):
        pack(tmp_path, [SourceSpec("s", records=chips)])
    (source,) = (catalog := pack(tmp_path, [SourceSpec("s", records=chips)], on_error="skip")).sources
    assert (source.samples, source.statistics["channels"]) == (3, 2)
    assert summary(catalog)[0]["channels"] == 2
    pairs = [Record(np.full((3, 8, 9, 2), 5, np.int16), "a")]
    packed = pack(tmp_path, [SourceSpec("pairs", records=pairs), SourceSpec("s", records=records(3))])
    assert {s.name: s.statistics["channels"] for s in packed.sources} == {"pairs": 3, "s": 1}


def test_a_pattern_that_matches_no_file_is_noted(tmp_path):
    source = bad_folder(tmp_path / "in", 0)
    (packed,) = pack(tmp_path / "out", [SourceSpec("s", source, options=Options(exclude=("god*", "good0*")))]).sources
    assert packed.statistics["notes"] == ["no file matches --exclude 'god*'"]
    with pytest.raises(DataError, match=r"none found; looked for folder \(any[\s\S]*no file matches --include 'x'"):
        pack(tmp_path / "out", [SourceSpec("t", source, options=Options(include=("x",)))])


def test_a_tiff_that_is_no_plain_image_gets_the_hint_to_read_it_as_a_scene(tmp_path):
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "scene.tif")
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    with pytest.raises(DataError) as caught:
        pack(tmp_path / "out", [SourceSpec("s", tmp_path)])
    lines = str(caught.value).splitlines()
    assert "scene.tif: 64 pixels are NaN or infinite (if it is a GeoTIFF: --kind geotiff)" in lines[2]
    assert "damaged.png" in lines[1]
    assert "geotiff" not in lines[1]


def test_a_coco_source_without_annotations_says_so_once(tmp_path):
    Image.fromarray(np.full((8, 8), 9, np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"1 of 1 files[\s\S]*no annotation file \(\*\.json\) found"):
        pack(tmp_path / "out", [SourceSpec("s", tmp_path, kind="coco")])
