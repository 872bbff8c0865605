"""What a catalog repeats or shares with a test set is found from its metadata, and learning from it is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foundation.config import from_dict
from foundation.training.data import open_data
from shards import audit
from shards import catalog as catalogs
from shards import index as indexes
from shards.audit_page import write_page
from shards.catalog import Catalog
from shards.errors import DataError
from shards.inspect import readable
from shards.pack import SourceSpec, pack
from shards.reader import Reader
from shards.schema import Record, Rejected


def chips(seed: int, label: str | None = None, side: int = 32, **meta: Any) -> list[Record]:
    rng = np.random.default_rng(seed)
    looks = rng.rayleigh(0.8, (6, side, side)) * np.exp(rng.normal(3, 0.5, (6, side, 1)))
    return [Record(np.minimum(a, 255).astype(np.uint8), f"{seed}-{i}", label, meta) for i, a in enumerate(looks)]


def copy(record: Record, name: str) -> Record:
    """Mirrored, and brighter by a curve: other pixels, the same picture."""
    return Record(np.rint(255 * (record.pixels[:, ::-1] / 255) ** 0.7).astype(np.uint8), name)


def as_kind(catalog: Catalog, kind: str) -> Catalog:
    return replace(catalog, sources=tuple(replace(s, origin={"kind": kind}) for s in catalog.sources))


def test_identical_pixels_are_found_whatever_their_names(tmp_path: Path) -> None:
    copied = Record(chips(1)[2].pixels, "another name")
    learnt = pack(tmp_path / "a", [SourceSpec("learnt", records=[*chips(0), copied])])
    tested = pack(tmp_path / "b", [SourceSpec("tested", split="test", records=chips(1))])
    assert audit.overlap(learnt, tested) == ["learnt: another name = tested: 1-2"]
    with pytest.raises(DataError, match="1 images to learn from are also test images") as caught:
        audit.refuse_overlap(learnt, tested)
    assert "learnt: another name = tested: 1-2" in str(caught.value)


def test_a_run_refuses_a_catalog_whose_test_images_it_would_learn_from(tmp_path: Path) -> None:
    sources = [SourceSpec("learnt", records=chips(0)), SourceSpec("tested", split="test", records=chips(0))]
    pack(tmp_path, sources)
    with pytest.raises(DataError, match="6 images to learn from are also test images"):
        open_data(from_dict({"data": {"catalog": str(tmp_path)}}))


def test_learning_from_the_scene_of_a_test_image_is_refused(tmp_path: Path) -> None:
    learnt = [*chips(0, scene="P7"), *chips(1, scene="P8"), *chips(2)]
    catalog = pack(
        tmp_path,
        [SourceSpec("learnt", records=learnt), SourceSpec("tested", split="test", records=chips(3, scene="P8"))],
    )
    (shared,) = audit.shared_scenes(catalog.select("pretrain"), catalog.select("test"))
    assert (shared.learnt, shared.tested) == ({"learnt": 6}, {"tested": 6})
    with pytest.raises(DataError, match="1 scenes to learn from are also test scenes") as caught:
        open_data(from_dict({"data": {"catalog": str(tmp_path)}}))
    assert "scene P8 (learnt = tested)" in caught.value.where


def test_a_scene_id_means_one_scene_only_inside_a_kind_of_source(tmp_path: Path) -> None:
    product = "S1A_IW_SLC__1SDV_20150823T221233_20150823T221300_007396_00A2D0_9FF1"
    learnt, tested = (
        pack(tmp_path / split, [SourceSpec(split, split=split, records=[*chips(seed, scene="P8"), *more])])
        for seed, split, more in ((0, "train", chips(2, scene=product)), (1, "test", chips(3, scene=product)))
    )
    assert len(audit.shared_scenes(as_kind(learnt, "voc"), as_kind(tested, "voc"))) == 2
    (shared,) = audit.shared_scenes(as_kind(learnt, "voc"), as_kind(tested, "coco"))
    assert shared.scene == product


def test_samples_that_a_filter_left_out_are_not_learnt(tmp_path: Path) -> None:
    copied = [Record(r.pixels, r.key, None, {"band": "C", "scene": "S"}) for r in chips(1)]
    learnt = pack(tmp_path / "a", [SourceSpec("learnt", records=[*chips(0, band="X"), *copied])])
    tested = pack(tmp_path / "b", [SourceSpec("tested", split="test", records=chips(1, scene="S"))])
    assert len(audit.overlap(learnt, tested)) == 6
    clean = learnt.filter('band == "X"')
    audit.refuse_overlap(clean, tested)
    assert audit.audit(clean, [tested]).clean
    leaky = learnt.filter('band == "C"')
    findings = audit.audit(leaky, [tested])
    assert findings.counts["samples"] == findings.counts["test images that are learnt"] == 6
    reader = Reader(leaky)
    assert all(reader[pair.first.number].key == pair.first.key for pair in findings.leaked)


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """12 chips to learn from, of which one is repeated twice, one is a mirrored copy of another, and two leak."""
    first, second, test = chips(0), chips(1), chips(2, "ship")
    more = [Record(first[0].pixels, "again"), Record(first[0].pixels, "and again"), copy(first[1], "mirrored")]
    leaks = [Record(test[3].pixels, "test image"), copy(test[4], "test image, mirrored")]
    flat = [Rejected(f"f{i}", "flat", f"std {i}.25, mean 0.0{i}, min_std 0.6") for i in range(3)]
    return pack(
        tmp_path / "catalog",
        [
            SourceSpec("one", records=[*first, *more, *flat, Rejected("x <y>", "small", "9x8 is below min_side 16")]),
            SourceSpec("two", split="train", records=[*second, *leaks]),
            SourceSpec("test", split="test", records=test),
        ],
    )


def test_an_audit_finds_repeats_copies_and_leaks(catalog: Catalog) -> None:
    findings = audit.audit(catalog)
    assert findings.counts == {
        "samples": 23,
        "compared with": 0,
        "groups of identical images": 2,
        "repeated images": 3,
        "near duplicates": 2,
        "test images that are learnt": 1,
        "test images with a near duplicate that is learnt": 1,
        "test scenes that are learnt": 0,
    }
    names = sorted(sorted(place.file for place in group) for group in findings.exact)
    assert names == [["0-0", "again", "and again"], ["2-3", "test image"]]
    near = {frozenset((pair.first.file, pair.second.file)) for pair in findings.near}
    assert near == {frozenset(("0-1", "mirrored")), frozenset(("2-4", "test image, mirrored"))}
    assert [(str(p.first), str(p.second)) for p in findings.leaked] == [("two: test image", "test: 2-3")]
    assert [(str(p.first), str(p.second)) for p in findings.leaked_near] == [("two: test image, mirrored", "test: 2-4")]
    assert not findings.clean
    reader = Reader(catalog)
    places = [place for group in findings.exact for place in group]
    assert [reader[place.number].key for place in places] == [place.key for place in places]
    assert json.loads(json.dumps(findings.as_json()))["counts"] == findings.counts
    assert audit.audit(catalog, near=False).counts["near duplicates"] == 0


def test_the_test_split_of_another_catalog_is_tested_and_all_of_one_without(tmp_path: Path) -> None:
    learnt = pack(tmp_path / "a", [SourceSpec("learnt", records=[*chips(0), *chips(1), *chips(2)])])
    train, test = SourceSpec("train", split="train", records=chips(1)), SourceSpec("test", "", "test", records=chips(2))
    benchmark = pack(tmp_path / "b", [train, test])
    assert audit.audit(learnt, [benchmark]).counts["test images that are learnt"] == 6
    only_train = benchmark.only(["train"])
    assert audit.audit(learnt, [only_train]).counts["test images that are learnt"] == 6
    assert audit.audit(learnt, [benchmark, only_train]).counts["compared with"] == 12


def test_a_catalog_against_itself_repeats_nothing(catalog: Catalog) -> None:
    assert audit.audit(catalog, [catalog]).counts == audit.audit(catalog).counts


def test_an_audit_says_what_the_columns_hold_and_what_was_left_out(tmp_path: Path, catalog: Catalog) -> None:
    one = next(facts for facts in audit.audit(catalog).sources if facts.name == "one")
    assert one.rejected == {"flat: std #, mean #, min_std #": 3, "small: #x# is below min_side #": 1}
    (Path(catalog.root) / "rejected.jsonl").unlink()
    assert next(facts for facts in audit.audit(catalog).sources if facts.name == "one").rejected == {
        "flat": 3,
        "small": 1,
    }
    records = [*chips(0, "tank", band="X", spacing=0.3), *chips(1, "ship", band="C", spacing=10.0), *chips(2, band="X")]
    (facts,) = audit.audit(pack(tmp_path / "b", [SourceSpec("s", records=records)])).sources
    assert facts.classes == {"ship": 6, "tank": 6}
    assert facts.columns["band"] == audit.Column(18, 2, {"X": 12, "C": 6}, None)
    assert facts.columns["spacing"] == audit.Column(12, 2, {}, (0.3, 10.0))
    assert facts.columns["scene"].filled == 0


def test_the_page_shows_leaks_first_and_needs_no_other_file(tmp_path: Path, catalog: Catalog) -> None:
    page = write_page(audit.audit(catalog), catalog, tmp_path / "new" / "audit.html").read_text()
    leaks = ["1 test images are among those to learn from", "1 test images look like copies of images to learn from"]
    places = [page.index(text) for text in (*leaks, "<h2>Sources", "<h2>Identical images", "<h2>Near duplicates")]
    assert places == sorted(places)
    assert set(re.findall(r'(?:src|href)="(.{10})', page)) == {"data:image"}
    assert page.count('src="data:image/png') == 4 + 4 + 4 + 2 * 3  # two leaks, two groups, two pairs, three sources
    assert "3 in all" in page
    assert "std #, mean #" in page


def test_the_page_of_a_clean_catalog_says_so_and_no_name_becomes_markup(tmp_path: Path) -> None:
    records = [Record(r.pixels, f"<script>{r.key}", "<b>", {"sensor": "<i>"}) for r in chips(0)]
    records.append(Record(records[0].pixels, "<script>again"))
    catalog = pack(tmp_path, [SourceSpec("s", records=records)])
    page = write_page(audit.audit(catalog), catalog, tmp_path / "audit.html").read_text()
    assert "Nothing that is learnt is tested" in page
    assert "&lt;script&gt;again" in page
    assert "&lt;i&gt;" in page
    assert not re.search("<script|<i>|<b>&", page)


def test_a_copy_of_the_data_that_is_held_out_as_a_whole_is_a_leak(tmp_path: Path) -> None:
    import shutil

    learnt = pack(tmp_path / "a", [SourceSpec("learnt", split="train", records=chips(0))])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    findings = audit.audit(learnt, [catalogs.load(tmp_path / "b")])
    assert not findings.clean
    assert findings.counts["test images that are learnt"] == 6


def test_the_page_has_a_card_for_every_source_of_every_catalog_and_survives_damaged_samples(tmp_path: Path) -> None:
    learnt = pack(tmp_path / "a", [SourceSpec("learnt", records=chips(0))])
    tested = pack(tmp_path / "b", [SourceSpec("benchmark", split="test", records=chips(0))])
    (shard,) = learnt.sources[0].shards
    path = tmp_path / "a" / shard.name
    for row in indexes.read(indexes.path_of(path))[:2]:
        with open(path, "r+b") as file:
            file.seek(int(row["offset"] + row["stored"]) - 4)
            file.write(b"\x00\xff\x00\xff")
    assert [readable(Reader(learnt), i) for i in range(2)] == [None, None]
    page = write_page(audit.audit(learnt, [tested]), learnt, tmp_path / "audit.html", [tested]).read_text()
    assert f"; in {tested.root}</span>" in page
    assert all(f"chips of {name}" in page for name in ("learnt", "benchmark"))


def test_the_refusal_of_an_overlap_names_the_filter_and_the_key_that_end_it(tmp_path: Path) -> None:
    learnt = pack(tmp_path / "a", [SourceSpec("learnt", records=chips(0))])
    tested = pack(tmp_path / "b", [SourceSpec("benchmark", split="test", records=chips(0))])
    with pytest.raises(DataError, match=r"data\.filter=\"source != 'learnt'\"[\s\S]*data\.overlap=allow"):
        audit.refuse_overlap(learnt, tested)
