"""Hostile input through the whole data path: no crash, no hang, nothing written elsewhere, nothing lost in silence.

A share of the campaign in tests/hostile.py; all of it: `python tests/hostile.py --cases 10000 --seed 0`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from hostile import supervise
from hostile_files import head

from shards import catalog as catalogs
from shards import index as indexes
from shards.errors import DataError
from shards.reader import Reader
from shards.sources.files import Files


def test_hostile_files_and_shards_are_refused_with_a_reason_and_nothing_valid_is_lost() -> None:
    pytest.importorskip("rasterio")
    pytest.importorskip("h5py")
    pytest.importorskip("sarkit")
    report = supervise(cases=2600, seed=0)
    assert not report.findings, "\n".join(report.findings[:5])
    assert report.cases >= 2600
    assert report.grown_megabytes < 1024
    assert not [name for name in report.outcomes if "without a word" in name]
    for kind in ("decode", "mstar", "tar", "geotiff", "iceye", "sicd"):
        assert report.outcomes[f"header: {kind} taken"]
        assert report.outcomes[f"header: {kind} refused"]


def edited(catalog: Path, copy: Path, name: str, *path: object, value: object) -> Path:
    """A copy of a catalog whose JSON says something else of its first source."""
    shutil.copytree(catalog, copy)
    whole = json.loads((copy / "catalog.json").read_text())
    place = whole["sources"][0]
    for step in path:
        place = place[step]  # type: ignore[index]
    place[name] = value
    (copy / "catalog.json").write_text(json.dumps(whole))
    return copy


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        (("shards", 0), "samples", "x"),
        (("shards", 0), "samples", 0.5),
        (("shards", 0), "samples", 10**30),
        (("shards", 0), "bytes", [1]),
        (("shards", 0), "name", "9" * 5000),
        (("shards", 0), "name", "\ud800"),
        (("amplitude",), "scale", "/etc/passwd"),
        (("amplitude",), "scale", float("nan")),
        ((), "split", "x"),
        ((), "classes", [[1]]),
        ((), "name", "../x"),
    ],
)
def test_a_catalog_whose_values_have_other_types_or_ranges_is_refused(
    catalog: Path, tmp_path: Path, path: tuple[object, ...], name: str, value: object
) -> None:
    with pytest.raises(DataError):
        catalogs.load(edited(catalog, tmp_path / "copy", name, *path, value=value))


@pytest.mark.parametrize("field", ["label", "key", "offset"])
def test_an_index_with_two_rows_exchanged_is_no_index_of_the_shard(catalog: Path, tmp_path: Path, field: str) -> None:
    shutil.copytree(catalog, tmp_path / "copy")
    source = next(s for s in catalogs.load(tmp_path / "copy").sources if s.classes)
    path = indexes.path_of(tmp_path / "copy" / source.shards[0].name)
    rows = indexes.read(path).copy()
    rows[field] = rows[field][::-1].copy()
    indexes.write(rows, path.with_suffix(".tar"))
    with pytest.raises(DataError, match=r"the index disagrees with its shard: [\s\S]*foundation shards verify"):
        _ = Reader(catalogs.load(tmp_path / "copy").only([source.name]))[0]


def test_metadata_that_were_replaced_by_sound_ones_are_refused(catalog: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    shutil.copytree(catalog, tmp_path / "copy")
    loaded = catalogs.load(tmp_path / "copy")
    path = tmp_path / "copy" / loaded.sources[0].metadata.name
    with pq.ParquetFile(path) as file:
        groups = [file.read_row_group(i) for i in range(file.num_row_groups)]
    with pq.ParquetWriter(path, groups[0].schema) as writer:
        for group in groups:
            writer.write_table(group.take(list(range(len(group)))[::-1]))
    assert hashlib.sha256(path.read_bytes()).hexdigest() != loaded.sources[0].metadata.sha256
    with pytest.raises(DataError, match="the metadata have changed"):
        loaded.table(["key"], loaded.sources[0])


ARCHIVES = {
    "many pax headers": head(b"x", 13, b"13 comment=1\n") * 3000,
    "a pax header of 100 GB": head(b"x", 100 << 30),
    "a size that leads back": head(b"0", 3, b"abc") + head(b"0", -512),
    "a pax size that leads back": head(b"0", 3, b"abc") + head(b"x", 13, b"13 size=-512\n") + head(b"0", 0),
    "a size beyond every file": head(b"0", 2**62),
}


@pytest.mark.parametrize("what", ARCHIVES)
def test_an_archive_whose_headers_lead_in_circles_or_into_memory_is_refused(tmp_path: Path, what: str) -> None:
    (tmp_path / "a.tar").write_bytes(ARCHIVES[what] + head(b"0", 1, b"x", "last.png") + bytes(1024))
    found = Files(tmp_path / "a.tar")
    try:
        assert found.refused  # what follows is lost, and said to be
    except DataError as error:
        caught = error.what
    else:
        caught = " ".join(one.reason for one in found.refused)
    assert "not a readable plain tar" in caught or "the archive is damaged" in caught


def test_what_is_no_file_in_a_folder_is_listed_and_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "image.png").write_bytes(b"x")
    found = Files(tmp_path)
    assert found.names == ["image.png"]
    assert {one.key: one.reason for one in found.refused} == dict.fromkeys(
        ("pipe.png", "broken.png"), "a broken link, device or pipe"
    )
