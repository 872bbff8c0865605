"""A score names its images: splits and draws are files, and what they say is checked before anything is learnt."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foundation.config import DataConfig
from foundation.errors import DataError
from foundation.evaluation import fewshot, splits
from foundation.evaluation.draws import Draws
from foundation.evaluation.sides import choose
from shards.pack import SourceSpec, pack
from shards.schema import Record

CLASSES = ("T62", "T72")


def chips(split: str, count: int = 6, scenes: bool = True, offset: int = 0, classes: tuple[str, ...] = CLASSES):
    rng = np.random.default_rng(offset + (split == "test"))
    for i in range(count):
        meta = {"scene": f"{split}-{i % 3}"} if scenes else {}
        yield Record(rng.integers(0, 255, (16, 16), dtype=np.uint8), f"{split}{i}", classes[i % len(classes)], meta)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("catalog")
    pack(out, [SourceSpec(name, split=name, records=chips(name, 12)) for name in ("train", "test")])
    return out


def own(packed: Path) -> splits.Split:
    return choose(str(packed), None, DataConfig()).split


def changed(split: splits.Split, change: Callable[[splits.Row], splits.Row]) -> splits.Split:
    return replace(split, rows=tuple(change(row) for row in split.rows))


def chosen(packed: Path, split: splits.Split, tmp_path: Path, **options: bool):
    return choose(str(packed), None, DataConfig(), splits.write(split, tmp_path / "split.json"), **options)


def test_the_file_of_a_catalogs_own_splits_gives_the_same_images_in_the_same_order(
    packed: Path, tmp_path: Path
) -> None:
    found = chosen(packed, own(packed), tmp_path)
    direct = choose(str(packed), None, DataConfig())
    for a, b in ((found.train, direct.train), (found.test, direct.test)):
        assert (a.hashes, a.keys, a.classes) == (b.hashes, b.keys, b.classes)
        assert torch.equal(a.y, b.y)
    assert found.split.sha256 == direct.split.sha256
    assert found.train_data == found.split.sha256 != direct.train_data
    assert found.split.counts() == {"train": {"T62": 6, "T72": 6}, "test": {"T62": 6, "T72": 6}}
    assert {row.group for row in found.split.side("test")} == {"test-0", "test-1", "test-2"}


def test_groups_and_images_are_those_of_their_own_source_where_keys_are_the_same(tmp_path: Path) -> None:
    """Keys are counters, so two catalogs, and two sources of one, have the same."""
    data, test = tmp_path / "data", tmp_path / "test"
    renamed = [replace(r, key=r.key.replace("test", "train")) for r in chips("test", 12)]
    more = [replace(r, meta={"scene": "more"}) for r in chips("train", 4, offset=9)]
    pack(data, [SourceSpec("a", split="train", records=chips("train", 12))])
    pack(data, [SourceSpec("b", split="train", records=more)])
    pack(test, [SourceSpec("test", split="test", records=renamed)])
    found = choose(str(data), str(test), DataConfig())
    groups = [Counter(row.group for row in found.split.side(side)) for side in ("train", "test")]
    assert groups == [{"more": 4} | dict.fromkeys(("train-0", "train-1", "train-2"), 4),
                      dict.fromkeys(("test-0", "test-1", "test-2"), 4)]  # fmt: skip
    assert found.split.shared_groups() == []
    again = choose(str(data), str(test), DataConfig(), splits.write(found.split, tmp_path / "split.json"))
    assert (again.tested.samples, again.test.hashes) == (12, found.test.hashes)


def test_an_image_that_was_packed_without_its_class_too_is_found_with_it(tmp_path: Path) -> None:
    records = [*chips("train", 12)]
    pack(tmp_path, [SourceSpec("a", split="train", records=[replace(record, label=None) for record in records])])
    pack(tmp_path, [SourceSpec("b", split="train", records=records)])
    pack(tmp_path, [SourceSpec("test", split="test", records=chips("test", 12))])
    direct = choose(str(tmp_path), None, DataConfig())
    for rename in (lambda r: r, lambda r: r._replace(key="of another packing")):
        found = chosen(tmp_path, changed(direct.split, rename), tmp_path)
        assert (found.train.hashes, found.train.y.tolist()) == (direct.train.hashes, direct.train.y.tolist())


def test_a_file_can_be_read_by_people_and_knows_when_it_was_changed(packed: Path, tmp_path: Path) -> None:
    path = splits.write(own(packed), tmp_path / "split.json")
    lines = path.read_text().splitlines()
    assert sum('"test-1"' in line for line in lines) == 4
    value = json.loads(path.read_text())
    assert value["columns"] == ["hash", "key", "label", "group", "split"]
    assert value["counts"]["train"] == {"T62": 6, "T72": 6}
    assert splits.read(path) == own(packed)
    path.write_text(path.read_text().replace('"T62", "test-1"', '"T72", "test-1"', 1))
    with pytest.raises(DataError, match="the split file was changed: its content has sha256"):
        splits.read(path)
    del (value := json.loads(path.read_text()))["sha256"]
    path.write_text(json.dumps(value))
    assert splits.read(path).sha256 != own(packed).sha256


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "this is no split file"),
        ("{", "this is no split file"),
        ('{"format": 2, "images": []}', "format 2"),
        ('{"format": 1, "images": [["a", "k", "T62", "", "val"]]}', "split 'val' is neither train nor test"),
        ('{"format": 1, "images": [["a", "k", "T62"]]}', "this is no split file"),
        ('{"format": 1, "images": [["a", "k", 3, "", "test"]]}', "not five texts"),
        (None, "the split file cannot be read"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "split.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=message):
        splits.read(path)


def test_a_label_file_that_does_not_match_names_the_first_images(packed: Path, tmp_path: Path) -> None:
    split = own(packed)
    wrong = changed(split, lambda r: r._replace(label="T72") if (r.split, r.label) == ("test", "T62") else r)
    with pytest.raises(DataError, match="does not match the catalog: the classes of 6 images differ") as caught:
        chosen(packed, wrong, tmp_path)
    assert "is T72 in the file and T62 in the catalog, " in str(caught.value)
    assert str(caught.value).count("in the file and") == splits.SHOWN
    lost = changed(split, lambda r: r._replace(hash="f" * 64) if r == split.rows[0] else r)
    with pytest.raises(DataError, match=rf"1 images are not in it: ffffffffffff \({split.rows[0].key}\)"):
        chosen(packed, lost, tmp_path)
    twice = replace(split, rows=(*split.rows, split.rows[0]))
    with pytest.raises(DataError, match="1 images are not in it"):  # the catalog has that image once
        chosen(packed, twice, tmp_path)


def test_an_image_on_both_sides_is_refused(packed: Path, tmp_path: Path) -> None:
    split = own(packed)
    both = replace(split, rows=(*split.rows, split.rows[0]._replace(split="test")))
    with pytest.raises(DataError, match="1 images lie in train and in test"):
        chosen(packed, both, tmp_path)


def test_a_group_on_both_sides_is_refused_unless_the_scores_may_say_so(packed: Path, tmp_path: Path) -> None:
    shared = changed(own(packed), lambda r: r._replace(group=r.group.replace("test-1", "train-1")))
    with pytest.raises(DataError, match=r"1 groups \(scene\) lie in train and in test: train-1") as caught:
        chosen(packed, shared, tmp_path)
    assert "--allow-shared-groups" in str(caught.value)
    found = chosen(packed, shared, tmp_path, allow_shared_groups=True)
    assert found.split.shared_groups() == ["train-1"]
    unknown = changed(own(packed), lambda r: r._replace(group=""))
    assert chosen(packed, unknown, tmp_path).split.shared_groups() == []


@pytest.mark.parametrize("known", [True, False])
def test_own_splits_that_share_a_known_group_are_refused_unless_allowed(
    command: Callable[..., Any], tmp_path: Path, known: bool
) -> None:
    scene = {"scene": "train-0"} if known else {}
    tested = [replace(record, meta=scene) for record in chips("test")]
    pack(tmp_path, [SourceSpec("train", split="train", records=chips("train", scenes=known))])
    pack(tmp_path, [SourceSpec("test", split="test", records=tested)])
    if known:
        with pytest.raises(DataError, match=r"1 groups \(scene\) lie in train and in test: train-0") as caught:
            choose(str(tmp_path), None, DataConfig())
        assert caught.value.where == str(tmp_path)
        assert "--allow-shared-groups" in caught.value.do
    else:  # nothing is known of their groups
        choose(str(tmp_path), None, DataConfig())
    found = choose(str(tmp_path), None, DataConfig(), allow_shared_groups=True)
    assert found.split.shared_groups() == ["train-0"] * known
    code, out, err = command("splits", tmp_path, "--out", tmp_path / "split.json")
    assert code == 0, err
    assert ("lie on both sides: evaluate will refuse this file" in out) == known


@pytest.mark.parametrize("side", ["train", "test"])
def test_an_empty_side_is_named(packed: Path, tmp_path: Path, side: str) -> None:
    split = own(packed)
    empty = replace(split, rows=tuple(row for row in split.rows if row.split != side))
    with pytest.raises(DataError, match=f"the {side} side of the split is empty"):
        chosen(packed, empty, tmp_path)
    out = tmp_path / "one"
    other = "test" if side == "train" else "train"
    pack(out, [SourceSpec(other, split=other, records=chips(other))])
    with pytest.raises(DataError, match=f"the catalog has no {side} split") as caught:
        choose(str(out), None, DataConfig())
    assert str(out) in str(caught.value)
    assert "--split" in str(caught.value)


def test_a_split_without_labels_says_where(tmp_path: Path) -> None:
    plain = [replace(record, label=None) for record in chips("test")]
    pack(tmp_path, [SourceSpec("train", split="train", records=chips("train"))])
    pack(tmp_path, [SourceSpec("test", split="test", records=plain)])
    with pytest.raises(DataError, match="none of the 6 samples has a class") as caught:
        choose(str(tmp_path), None, DataConfig())
    assert f"test split of {tmp_path}" in str(caught.value)


def test_a_class_that_only_the_test_side_has_is_refused(packed: Path, tmp_path: Path) -> None:
    split = own(packed)
    fewer = replace(split, rows=tuple(row for row in split.rows if (row.split, row.label) != ("train", "T72")))
    with pytest.raises(DataError, match="classes that the train side does not have: T72"):
        chosen(packed, fewer, tmp_path)


def test_a_column_that_does_not_exist_is_refused(packed: Path) -> None:
    with pytest.raises(DataError, match="the metadata have no column 'town'"):
        choose(str(packed), None, DataConfig(), column="town")
    assert choose(str(packed), None, DataConfig(), column="sensor").split.column == "sensor"


# --- draws ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sampled(packed: Path, tmp_path: Path):
    direct = choose(str(packed), None, DataConfig())
    _, draws = direct.keep(tmp_path)
    index = draws.draw(direct.train, direct.test, 2, 7)
    assert draws.folder is not None
    (path,) = draws.folder.iterdir()
    return direct, draws, index, path


def test_equal_images_count_and_are_drawn_once() -> None:
    y, hashes = torch.tensor([0, 0, 0, 0, 1, 1, 1]), ("a", "b", "a", "c", "d", "a", "e")
    assert fewshot.different(y, hashes, ("x", "y")) == [[0, 1, 3], [5, 4, 6]]
    for seed in range(10):
        assert sorted(fewshot.draw(y, hashes, ("x", "y"), 3, seed).tolist()) == [0, 1, 3, 4, 5, 6]
    with pytest.raises(DataError, match="fewer different training images: x 3, y 3"):
        fewshot.draw(y, hashes, ("x", "y"), 4, 0)


def test_a_draw_among_equal_images_is_read_again_as_it_was_drawn(sampled, tmp_path: Path) -> None:
    direct, draws, *_ = sampled
    train, test = direct.train, direct.test
    doubled = train.take(torch.tensor([*range(len(train)), *range(len(train))]))  # every image twice
    other = int((train.y != train.y[0]).nonzero()[0])
    doubled.y[len(train)] = train.y[other]  # and one of them with another label
    for seed in range(5):
        for shots in (1, 2):
            kept = replace(draws, folder=tmp_path / "kept")
            drawn = kept.draw(doubled, test, shots, seed)
            assert torch.equal(kept.draw(doubled, test, shots, seed), drawn)


def test_a_draw_is_kept_as_a_file_and_read_again(sampled) -> None:
    direct, draws, index, path = sampled
    train, test = direct.train, direct.test
    assert torch.equal(index, fewshot.draw(train.y, train.hashes, train.classes, 2, 7))
    value = json.loads(path.read_text())
    assert (path.name, value["shots"], value["seed"]) == ("2-shot-seed-7.json", 2, 7)
    assert value["split"] == direct.split.sha256
    assert {name: len(part) for name, part in value["hashes"].items()} == {"T62": 2, "T72": 2}
    mine = [i for i in range(len(train)) if i not in index.tolist()]
    for name, part in value["hashes"].items():  # a file decides, not the seed
        part[0] = next(train.hashes[i] for i in mine if train.classes[train.y[i]] == name)
    path.write_text(json.dumps(value))
    again = draws.draw(train, test, 2, 7)
    assert not torch.equal(again, index)
    assert {train.hashes[i] for i in again.tolist()} == {h for part in value["hashes"].values() for h in part}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda v, d: v["hashes"]["T62"].__setitem__(0, d.test.hashes[0]), "1 of the drawn images are test images"),
        (lambda v, d: v["hashes"]["T62"].__setitem__(0, "f" * 64), "1 of the drawn images are not in train: ffffff"),
        (lambda v, d: v["hashes"].update(T62=v["hashes"]["T72"]), "2 images of class T62 have another class in train"),
        (lambda v, d: v["hashes"]["T72"].pop(), "class T72 has 1 different images, not 2"),
        (lambda v, d: v["hashes"].update(T72=v["hashes"]["T72"][:1] * 2), "class T72 has 1 different images, not 2"),
        (lambda v, d: v["hashes"].update(D7=v["hashes"]["T72"]), "train has no class D7"),
        (lambda v, d: v.update(split="0" * 64), "the draw is of split 000000000000, 2 shots, seed 7, not of split"),
        (lambda v, d: v.update(seed=8), "the draw is of split .* seed 8, not of"),
        (lambda v, d: v.pop("hashes"), "this is no file of a draw"),
    ],
)
def test_a_draw_that_is_not_of_this_split_is_refused(sampled, spoil, message: str) -> None:
    direct, draws, _, path = sampled
    value = json.loads(path.read_text())
    spoil(value, direct)
    path.write_text(json.dumps(value))
    with pytest.raises(DataError, match=message) as caught:
        draws.draw(direct.train, direct.test, 2, 7)
    assert path.name in str(caught.value)


def test_draws_that_come_with_a_split_file_are_used(packed: Path, tmp_path: Path, sampled) -> None:
    _, _, index, path = sampled
    given = tmp_path / "given"
    (given / "mine.draws").mkdir(parents=True)
    (given / "mine.draws" / path.name).write_bytes(path.read_bytes())
    found = choose(str(packed), None, DataConfig(), splits.write(own(packed), given / "mine.json"))
    mine = tmp_path / "run" / "splits" / f"{found.split.sha256[:12]}.draws" / path.name
    mine.parent.mkdir(parents=True)
    mine.write_text("drawn here before")
    file, draws = found.keep(tmp_path / "run")
    assert splits.read(file) == found.split
    assert (draws.folder / path.name).read_bytes() == path.read_bytes()  # type: ignore[operator]
    assert torch.equal(draws.draw(found.train, found.test, 2, 7), index)
    assert Draws().folder is None
    (given / "mine.draws" / path.name).write_text("{}")
    _, draws = found.keep(tmp_path / "run")
    with pytest.raises(DataError, match="this is no file of a draw") as caught:
        draws.draw(found.train, found.test, 2, 7)
    assert f"where: {given / 'mine.draws' / path.name}" in str(caught.value)
    assert f"delete it and its copy {mine}" in str(caught.value)


def test_a_split_file_may_turn_the_splits_of_a_catalog_around(packed: Path, tmp_path: Path) -> None:
    swap = {"train": "test", "test": "train"}
    turned = changed(own(packed), lambda r: r._replace(split=swap[r.split]))
    found = chosen(packed, turned, tmp_path)
    assert found.train.hashes == choose(str(packed), None, DataConfig()).test.hashes
