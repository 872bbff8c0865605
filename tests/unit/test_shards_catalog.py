"""A catalog names its data exactly, and a damaged or foreign one is refused with what to do about it."""

from __future__ import annotations

import json
import shutil

import pytest
from shards_samples import records, small

from shards import catalog as catalogs
from shards import index as indexes
from shards.errors import DataError
from shards.pack import SourceSpec, pack
from shards.stream import Reader


def test_the_fingerprint_names_the_data_not_the_place_nor_the_way_it_was_packed(tmp_path):
    together = small(tmp_path / "a")
    pack(tmp_path / "b", [SourceSpec("two", records=records(9, "uint16", 1))], shard_bytes=2000)
    apart = pack(tmp_path / "b", [SourceSpec("one", split="train", records=records(24))], shard_bytes=2000)
    assert together.fingerprint == apart.fingerprint == catalogs.load(tmp_path / "a" / "catalog.json").fingerprint
    assert together.select("train").fingerprint != together.fingerprint
    moved = pack(tmp_path / "c", [SourceSpec("one", split="test", records=records(24))], shard_bytes=2000)
    assert moved.fingerprint != together.select("train").fingerprint


def test_splits_share_one_class_list_and_sources_can_be_picked_by_name(tmp_path):
    catalog = pack(
        tmp_path,
        [
            SourceSpec("tr", split="train", records=records(6, classes="abc")),
            SourceSpec("te", split="test", records=records(4, classes="bc")),
            SourceSpec("pre", records=records(4, classes="z")),
        ],
    )
    assert catalog.select(["test"]).classes == ("a", "b", "c", "z")
    evaluation = catalog.only(["tr", "te"])
    assert evaluation.select("test").classes == ("a", "b", "c")
    assert set(Reader(evaluation.select("test")).labels().tolist()) == {1, 2}
    with pytest.raises(DataError, match=r"no source in split \['train'\][\s\S]*the catalog holds pre \(pretrain\)"):
        catalog.only(["pre"]).select("train")
    with pytest.raises(DataError, match=r"unknown split \['val'\][\s\S]*pretrain, train, test"):
        catalog.select(["val"])
    with pytest.raises(DataError, match=r"no source named \['x'\]"):
        catalog.only(["x"])


@pytest.fixture
def damaged(tmp_path):
    """A small catalog, its first shard and the index of that."""
    catalog = small(tmp_path)
    tar = tmp_path / catalog.sources[0].shards[0].name
    return catalog, tar, indexes.path_of(tar)


def test_a_missing_shard_is_refused_before_anything_is_read(damaged):
    catalog, tar, _ = damaged
    tar.unlink()
    with pytest.raises(DataError, match=rf"missing shard {tar.name}[\s\S]*restore the files or pack"):
        Reader(catalog)
    with pytest.raises(DataError, match=r"missing shard[\s\S]*restore"):
        indexes.open_index(catalog.root, catalog.sources[0].shards[0])


def test_a_shard_cut_in_the_middle_is_refused_before_anything_is_read(damaged):
    catalog, tar, _ = damaged
    size = tar.stat().st_size
    with open(tar, "r+b") as file:
        file.truncate(size // 2)
    with pytest.raises(DataError, match=rf"is cut off: {size // 2} of {size} bytes[\s\S]*restore"):
        Reader(catalog)
    with pytest.raises(DataError, match="the shard is cut off"):
        indexes.open_index(catalog.root, catalog.sources[0].shards[0])
    with pytest.raises(DataError, match=r"the shard cannot be read.*its end is missing"):
        indexes.build(tar, "ab")


def test_a_shard_that_grew_or_changed_is_found(damaged):
    catalog, tar, _ = damaged
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    catalog.check()
    with pytest.raises(DataError, match=rf"shard {tar.name} has changed: its sha256"):
        catalog.verify()
    tar.write_bytes(data + b"\0")
    with pytest.raises(DataError, match="is not the packed one"):
        catalog.check()


def test_a_missing_or_unreadable_index_asks_to_be_rebuilt_and_rebuilding_heals_it(damaged):
    catalog, _, path = damaged
    good = path.read_bytes()
    path.unlink()
    with pytest.raises(DataError, match=r"missing index[\s\S]*rebuild it"):
        _ = Reader(catalog)[0]
    path.write_bytes(good[:100])
    with pytest.raises(DataError, match=r"the index cannot be read[\s\S]*rebuild it"):
        _ = Reader(catalog)[0]
    indexes.rebuild(catalog)
    assert path.read_bytes() == good


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tar_bytes", lambda a: a - 1, "made for"),
        ("offset", lambda a: a + 10**6, "a sample lies beyond the end"),
        ("offset", lambda a: a + 512, "no array at the place of one-"),
        ("offset", lambda a: -a, "an offset or a shape is out of range"),
        ("label", lambda a: a[1:], "the catalog says"),
    ],
)
def test_an_index_that_disagrees_with_its_shard_asks_to_be_rebuilt(damaged, name, change, message):
    catalog, tar, _ = damaged
    index = indexes.build(tar, "ab")
    indexes.write(indexes.Index(**{**vars(index), name: change(getattr(index, name))}), tar)
    with pytest.raises(DataError, match=rf"the index disagrees with its shard: .*{message}[\s\S]*rebuild it"):
        _ = Reader(catalog)[0]


def test_a_subtly_wrong_index_is_found_by_verify(damaged):
    catalog, tar, _ = damaged
    index = indexes.build(tar, "ab")
    indexes.write(indexes.Index(**{**vars(index), "label": 1 - index.label}), tar)
    with pytest.raises(DataError, match=f"index of {tar.name} disagrees with its shard"):
        catalog.verify()


def test_a_catalog_that_is_missing_foreign_or_broken_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no catalog here[\s\S]*foundation shards pack"):
        catalogs.load(tmp_path)
    file = catalogs.save(small(tmp_path))
    value = json.loads(file.read_text())
    file.write_text(json.dumps(value | {"version": 99}))
    with pytest.raises(DataError, match=r"version 99; this program reads version 1[\s\S]*pack again"):
        catalogs.load(tmp_path)
    value["sources"][0]["shards"][0]["name"] = "../other.tar"
    file.write_text(json.dumps(value))
    with pytest.raises(DataError, match=r"the catalog cannot be read.*other\.tar"):
        catalogs.load(tmp_path)
    file.write_text("{")
    with pytest.raises(DataError, match="the catalog cannot be read"):
        catalogs.load(tmp_path)


def test_a_catalog_folder_can_be_moved(tmp_path):
    before = small(tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    after = catalogs.load(tmp_path / "b")
    after.verify()
    assert after.fingerprint == before.fingerprint
