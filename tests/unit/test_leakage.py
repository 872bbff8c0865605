"""What of a test set was learnt is found, refused, and said beside every score that it makes worthless."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from foundation.evaluation import leakage
from foundation.evaluation.leakage import find, record, verdicts
from foundation.evaluation.scores import score
from foundation.files import read_json
from shards import audit, metadata, synthetic
from shards.catalog import Catalog
from shards.errors import DataError
from shards.likeness import BYTES, Index, descriptor, pairs
from shards.pack import SourceSpec, pack
from shards.reader import Reader
from shards.schema import Record

Pack = Callable[..., Catalog]


def chips(seed: int, count: int = 6, side: int = 32, **meta: Any) -> list[Record]:
    rng = np.random.default_rng(seed)
    looks = rng.rayleigh(0.8, (count, side, side)) * np.exp(rng.normal(3, 0.5, (count, side, 1)))
    return [Record(np.minimum(a, 255).astype(np.uint8), f"{seed}-{i}", None, meta) for i, a in enumerate(looks)]


COPIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gain": lambda a: np.rint(np.minimum(1.4 * a, 255)),
    "darker": lambda a: np.rint(0.6 * a),
    "flip": lambda a: a[:, ::-1],
    "turn": np.rot90,
}


def copy(chip: Record, kind: str) -> Record:
    return Record(np.ascontiguousarray(COPIES[kind](chip.pixels.astype(np.float64))).astype(np.uint8), f"{kind} copy")


@pytest.fixture
def packed(tmp_path: Path) -> Pack:
    """`packed(learnt=[...], tested=[...])` → a catalog of a pretraining and a test source."""

    def make(learnt: list[Record], tested: list[Record], name: str = "catalog") -> Catalog:
        specs = [SourceSpec("learnt", records=learnt), SourceSpec("tested", split="test", records=tested)]
        return pack(tmp_path / name, specs)

    return make


def sides(catalog: Catalog) -> tuple[Catalog, Catalog]:
    return catalog.select("pretrain"), catalog.select("test")


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_with_another_gain_or_orientation_is_refused_by_name(packed: Pack, kind: str) -> None:
    tested = chips(1)
    learnt, test = sides(packed([*chips(0), copy(tested[2], kind)], tested))
    with pytest.raises(DataError, match="1 test images look like copies of images to learn from") as caught:
        audit.refuse_overlap(learnt, test)
    assert caught.value.where == f"learnt: {kind} copy ~ tested: 1-2"
    assert "data.overlap=identical" in caught.value.do
    audit.refuse_overlap(learnt, test, near=False)


def test_each_test_image_has_its_closest_copy_and_identical_images_are_no_copies(packed: Pack) -> None:
    tested = chips(1)
    noisy = np.clip(tested[0].pixels + np.random.default_rng(0).normal(0, 2, (32, 32)), 0, 255).astype(np.uint8)
    copies = [Record(noisy, "noisy"), copy(tested[0], "flip"), copy(tested[1], "flip")]
    learnt, test = sides(packed([*chips(0), Record(tested[1].pixels, "same"), *copies], tested))
    found = audit.near_overlap(learnt, test)
    assert found.names == ("learnt: flip copy ~ tested: 1-0",)
    assert (found.learnt_without, found.tested_without) == (0, 0)
    assert audit.overlap(learnt, test) == ["learnt: same = tested: 1-1"]


def test_an_index_finds_what_the_comparison_of_all_pairs_finds() -> None:
    rng = np.random.default_rng(0)
    images = [(20 * rng.rayleigh(1, (24, 24))).astype(np.uint8) for _ in range(60)]
    tested = images[:20]
    learnt = [*images[20:], *(np.ascontiguousarray(a[::-1]) for a in images[:5]), np.zeros((24, 24), np.uint8)]
    left, right = (
        np.frombuffer(b"".join(map(descriptor, part)), np.uint8).reshape(-1, BYTES) for part in (learnt, tested)
    )
    every = pairs(np.concatenate([left, right]), 0.3)
    expected = {(i, j - len(left)): d for i, j, d in every if i < len(left) <= j}
    found = {(i, j): d for i, j, d in Index(right, 0.3).near(left)}
    assert found == expected
    assert {(40 + n, n) for n in range(5)} <= found.keys()
    assert Index(right[:0]).near(left) == Index(right).near(left[:0]) == []
    assert Index(left[-1:]).near(left[-1:]) == []  # constant images look like nothing


def test_more_than_a_part_of_images_is_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    tested = rng.integers(0, 256, (9, BYTES), dtype=np.uint8)
    learnt = np.concatenate([rng.integers(0, 256, (50, BYTES), dtype=np.uint8), tested[::-1]])
    monkeypatch.setattr("shards.likeness._PART", 16)
    assert [(i, j) for i, j, _ in Index(tested).near(learnt)] == [(50 + n, 8 - n) for n in range(9)]


def test_a_clean_test_set_is_called_clean_and_missing_scene_ids_are_said(packed: Pack) -> None:
    learnt, test = sides(packed(chips(0), chips(1)))
    found = find(learnt, test)
    assert (found.verdict, found.identical, found.near, found.scenes, found.examples) == ("clean", 0, 0, 0, ())
    assert found.sentence == (
        "None of the 6 test images, nor a copy of one, was learnt in pretraining; "
        "shared scenes not checked: the test images have no scene ids."
    )
    assert found.to_rows()[2] == ("shared scenes", "not checked: the test images have no scene ids")
    assert found.images == 0


def test_images_copies_and_scenes_are_counted_and_named(packed: Pack) -> None:
    tested = [*chips(1), *chips(2, scene="P8")]
    leaks = [Record(tested[0].pixels, "same"), copy(tested[3], "flip"), copy(tested[4], "gain")]
    learnt, test = sides(packed([*chips(0), *leaks, *chips(3, scene="P8")], tested))
    found = find(learnt, test)
    assert (found.verdict, found.identical, found.near, found.scenes, found.images) == ("leaked", 1, 2, 1, 3)
    assert found.sentence == (
        "The encoder was PRETRAINED ON 1 of 12 test images themselves, near copies of 2 of 12 test images, "
        "1 scenes of the test images."
    )
    assert found.examples[0] == "learnt: same = tested: 1-0"
    assert found.examples[1:3] == ("learnt: flip copy ~ tested: 1-3", "learnt: gain copy ~ tested: 1-4")
    assert [value for _, value in found.to_rows()] == ["1", "2", "1"]


def test_without_the_pretraining_catalog_or_after_a_change_nothing_is_known(packed: Pack) -> None:
    learnt, test = sides(packed(chips(0), chips(1)))
    for known, reason in ((None, "is not at hand"), (learnt, "has changed since")):
        found = find(known, test, "another fingerprint")
        assert found.verdict == "unknown"
        assert found.images == f"not checked: the pretraining catalog {reason}"
        assert found.sentence == (
            "Whether the encoder was pretrained on test images is unknown; identical images and near duplicates and "
            f"shared scenes not checked: the pretraining catalog {reason}."
        )
        assert all(value.startswith("not checked: ") for _, value in found.to_rows())
    assert find(learnt, test, learnt.fingerprint).verdict == "clean"


def test_images_without_descriptors_make_a_verdict_unknown_but_not_a_leak(
    packed: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested = chips(1)
    clean, leaky = (sides(packed([*chips(0), *more], tested, name)) for name, more in (("a", []), ("b", tested[:1])))
    whole = metadata.groups

    def stripped(path: Path, source: Any, columns: Any) -> Any:
        for table in whole(path, source, columns):
            at = table.schema.get_field_index("likeness")
            empty = pa.array([None] * len(table), pa.binary())
            yield table if at < 0 or source.split == "test" else table.set_column(at, "likeness", empty)

    monkeypatch.setattr(metadata, "groups", stripped)
    found = find(*clean)
    assert found.verdict == "unknown"
    assert dict(found.not_checked)["near duplicates"] == "6 of 6 learnt images have no descriptor"
    assert find(*leaky).verdict == "leaked"


def test_a_catalog_without_the_column_is_not_checked_for_copies(packed: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise DataError("the metadata have no column likeness", do="pack again")

    monkeypatch.setattr(leakage, "near_overlap", missing)
    found = find(*sides(packed(chips(0), chips(1))))
    assert found.verdict == "unknown"
    assert found.not_checked["near duplicates"] == "the metadata have no column likeness"


def test_the_worst_verdict_of_a_run_is_not_hidden_by_a_later_one(packed: Pack, tmp_path: Path) -> None:
    tested = chips(1)
    learnt, test = sides(packed([*chips(0), tested[0]], tested))
    other = packed(chips(5), chips(6), "other").select("test")
    facts = record(tmp_path, find(learnt, test), test)
    assert facts["pretrained_on_test_images"] == 1
    assert record(tmp_path, find(learnt, other), other)["leakage"]["verdict"] == "clean"
    kept = read_json(tmp_path / "leakage.json")
    assert {key: kept[key] for key in ("verdict", "identical", "near", "scenes")} == {
        "verdict": "leaked", "identical": 1, "near": 0, "scenes": 0,
    }  # fmt: skip
    assert isinstance(kept["sentence"], str)
    assert kept["examples"] == ["learnt: 1-0 = tested: 1-0"]
    assert {one["verdict"] for one in kept["tests"].values()} == {"leaked", "clean"}
    y = torch.tensor([0, 1])
    clean = record(tmp_path, find(learnt, other), other)
    rows = [score("pretrained", "knn", "accuracy", y, [y], (0,), given) for given in ({}, facts, facts, clean)]
    assert verdicts(rows) == {facts["leakage"]["sentence"]: "leaked", clean["leakage"]["sentence"]: "clean"}
    assert rows[3].origin == "no test image learnt", "a clean score says so too"


def test_synthetic_chips_of_train_and_test_are_not_taken_for_copies(catalog: Path) -> None:
    from shards.catalog import load

    whole = load(catalog)
    assert audit.near_overlap(whole.select(("pretrain", "train")), whole.select("test")).names == ()
    assert set(synthetic.CLASSES) == set(whole.classes)


def test_test_chips_in_pretraining_are_refused_and_with_the_override_every_score_says_so(
    command: Callable[..., Any], tiny_yaml: Path, catalog: Path, tmp_path: Path
) -> None:
    from shards.catalog import load

    reader = Reader(load(catalog).select("test"))
    stolen = [Record(reader.native(i)[0], f"stolen-{i}") for i in range(3)]
    mirrored = Record(np.ascontiguousarray(reader.native(4)[0][:, ::-1]), "mirrored")
    pack(tmp_path / "extra", [SourceSpec("extra", records=[*stolen, mirrored])])
    run = ("train", tiny_yaml, f"data.catalog=[{catalog}, {tmp_path / 'extra'}]", "train.samples=16")
    code, _, err = command(*run)
    assert code == 2
    assert "3 images to learn from are also test images" in err
    assert "1 test images look like copies of images to learn from" in err
    assert "extra: stolen-0 = unseen: " in err
    assert "extra: mirrored ~ unseen: " in err

    code, text, err = command(*run, "data.overlap=allow")
    assert code == 0, err
    assert "were not looked for (data.overlap=allow)" in text + err
    folder = tmp_path / "runs" / "tiny"
    assert "overlap: allow" in (folder / "config.yaml").read_text()

    code, text, err = command("evaluate", folder, "--data", catalog, "--protocol", "knn", "--crop", "0")
    assert code == 0, err
    sentence = "The encoder was PRETRAINED ON 3 of 32 test images themselves, near copies of 1 of 32 test images"
    assert sentence in text
    assert "PRETRAINED ON 4 OF THE TEST IMAGES" in text
    assert "PRETRAINED ON 4 OF THE TEST IMAGES" in (folder / "scores.md").read_text()
    kept = json.loads((folder / "leakage.json").read_text())
    assert (kept["verdict"], kept["identical"], kept["near"]) == ("leaked", 3, 1)
    settings = json.loads((folder / "scores.json").read_text())[0]["settings"]
    assert settings["pretrained_on_test_images"] == 4
    assert settings["leakage"]["verdict"] == "leaked"

    code, text, err = command("robustness", folder, "--data", catalog, "--corruptions", "gain", "--crop", "0")
    assert code == 0, err
    assert sentence in text
    rows = json.loads((folder / "robustness.json").read_text())
    assert rows["settings"]["leakage"]["verdict"] == "leaked"
    assert {row["encoder"] for row in rows["rows"]} == {"pretrained", "random-init", "pixels (PCA)"}
    assert (folder / "figures" / "robustness.png").is_file()
