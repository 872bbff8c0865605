"""A catalog names its data exactly, and a damaged or foreign one is refused with what to do about it."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from shards_samples import records, small

from shards import catalog as catalogs
from shards import index as indexes
from shards.cache import Cache
from shards.errors import DataError
from shards.pack import Record, SourceSpec, pack
from shards.remote import Retry
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
    test = Reader(evaluation.select("test"))
    assert {test[i].label for i in range(len(test))} == {1, 2}
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


def test_a_shard_cut_in_the_middle_is_refused_before_anything_is_read(damaged):
    catalog, tar, _ = damaged
    size = tar.stat().st_size
    with open(tar, "r+b") as file:
        file.truncate(size // 2)
    with pytest.raises(DataError, match=rf"is cut off: {size // 2} of {size} bytes[\s\S]*restore"):
        Reader(catalog)


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


def test_a_catalog_that_is_missing_foreign_or_broken_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no catalog here[\s\S]*foundation shards pack"):
        catalogs.load(tmp_path)
    file = catalogs.save(small(tmp_path))
    value = json.loads(file.read_text())
    file.write_text(json.dumps(value | {"version": 99}))
    with pytest.raises(DataError, match=r"version 99; this program reads version 2[\s\S]*pack again"):
        catalogs.load(tmp_path)
    value["sources"][0]["shards"][0]["name"] = "../other.tar"
    file.write_text(json.dumps(value))
    with pytest.raises(DataError, match=r"the catalog cannot be read.*other\.tar"):
        catalogs.load(tmp_path)
    file.write_text("{")
    with pytest.raises(DataError, match="the catalog cannot be read"):
        catalogs.load(tmp_path)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("shards", 0, "sha256"), "../../../../etc", "sha256 '../../../../etc'"),
        (("shards", 0, "index_sha256"), "x" * 64, "sha256 'xxx"),
        (("metadata", "name"), "/etc/passwd", "file name '/etc/passwd'"),
        (("shards", 0, "samples"), -1, "no positive whole number"),
        (("shards", 0, "bytes"), True, "no positive whole number"),
        (("split",), "dev", "split 'dev'"),
        (("dtype",), "object", "dtype 'object'"),
        (("amplitude", "scale"), 0, "amplitude"),
        (("root",), "/elsewhere", "does not say where it lies"),
        (("name",), "../x", "cannot name a source"),
    ],
)
def test_a_catalog_from_elsewhere_can_name_no_path_outside_and_no_impossible_number(tmp_path, keys, value, message):
    file = catalogs.save(small(tmp_path))
    tree = json.loads(file.read_text())
    branch = tree["sources"][0]
    for key in keys[:-1]:
        branch = branch[key]
    branch[keys[-1]] = value
    file.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=re.escape(message)):
        catalogs.load(tmp_path)


def test_secrets_of_a_url_do_not_appear_when_its_catalog_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogs, "OPENING", Retry(patience=0.2, first=0.1))
    with pytest.raises(DataError) as caught:
        catalogs.load("https://user:secret@localhost:1/corpus?token=secret", cache=Cache(tmp_path, 10**6))
    assert "localhost" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_filtered_catalog_is_not_written_over_a_whole_one(mixed):
    with pytest.raises(DataError, match=r"fine is filtered[\s\S]*filter where it is read"):
        catalogs.save(mixed.filter("spacing < 1"))


def test_a_catalog_folder_can_be_moved(tmp_path):
    before = small(tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    after = catalogs.load(tmp_path / "b")
    after.verify()
    assert after.fingerprint == before.fingerprint


def described(count: int, **columns) -> list[Record]:
    def meta(i: int) -> dict[str, object]:
        return {name: values[i % len(values)] for name, values in columns.items()}

    return [Record(r.pixels, r.key, r.label, meta(i)) for i, r in enumerate(records(count))]


@pytest.fixture
def mixed(tmp_path):
    """Sources that know their band and spacing, in several shards, and one that knows nothing."""
    sources = [
        SourceSpec("fine", records=described(30, band=["X"], spacing=[0.3, 1.0, 2.0], scene=["a", "b"])),
        SourceSpec("coarse", records=described(20, band=["C", None], spacing=[10.0])),
        SourceSpec("unknown", records=records(10)),
    ]
    return pack(tmp_path, sources, shard_bytes=2000)


def test_a_filter_keeps_what_passes_and_reads_no_pixels(mixed):
    kept = mixed.filter('band == "X" and spacing <= 1')
    assert [(s.name, s.samples) for s in kept.sources] == [("fine", 20)]
    assert len(Reader(kept)) == kept.samples == 20
    whole = Reader(mixed)
    expected = {
        whole[i].key
        for i in range(len(whole))
        if json.loads(whole.meta(i)).get("band") == "X" and json.loads(whole.meta(i))["spacing"] <= 1
    }
    assert {Reader(kept)[i].key for i in range(20)} == expected
    assert kept.table(["scene"]).num_rows == 20
    assert kept.fingerprint not in (mixed.fingerprint, mixed.only(["fine"]).fingerprint)


def test_filters_add_up_and_a_sample_that_does_not_know_a_column_does_not_pass(mixed):
    assert mixed.filter('not band == "X"').samples == 10
    assert mixed.filter("spacing > 0").filter('scene == "a"').samples == mixed.filter('scene == "a"').samples == 15
    assert mixed.filter('source == "unknown" and height >= 8').samples == 10
    known = r"'spacing > 99': spacing is known for 50 of 60 samples[\s\S]*foundation shards audit"
    with pytest.raises(DataError, match=r"no sample passes the filter " + known):
        mixed.filter("spacing > 99")


def test_an_amplitude_rule_can_be_replaced_and_is_part_of_the_fingerprint(mixed):
    rule = catalogs.Amplitude("run", 100.0, 40.0)
    other = mixed.with_amplitudes({"fine": rule})
    assert Reader(other.only(["fine"]))[0].decibels == 40.0
    assert other.fingerprint != mixed.fingerprint
    with pytest.raises(DataError, match=r"no source named \['fien'\]"):
        mixed.with_amplitudes({"fien": rule})


def test_several_catalogs_are_read_as_one_and_names_must_differ(tmp_path):
    pack(tmp_path / "a", [SourceSpec("one", records=records(5))])
    pack(tmp_path / "b", [SourceSpec("two", records=records(7, "uint16"))])
    both = catalogs.load(tmp_path / "a", tmp_path / "b")
    assert [Reader(both)[i].source for i in (0, 4, 5, 11)] == ["one", "one", "two", "two"]
    both.verify()
    with pytest.raises(DataError, match=r"two catalogs hold a source named 'one'[\s\S]*another name"):
        catalogs.load(tmp_path / "a", tmp_path / "a")
