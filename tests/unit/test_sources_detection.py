"""Chips out of detection sets: boxes, classes and parts come from where they should."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from source_samples import HIGH, WIDE, image, listed, take, to_tar

from shards.errors import DataError
from shards.sources import corpus
from shards.sources.coco import part_of

# COCO


def coco(path: Path, boxes: dict[str, Sequence[tuple[str, list[float]]]]) -> None:
    """A COCO file: image → (class, [x, y, w, h]) of its objects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = sorted({label for objects in boxes.values() for label, _ in objects})
    content: dict[str, Any] = {"categories": [{"id": i, "name": name} for i, name in enumerate(names)]}
    content["images"] = [{"id": 10 + i, "file_name": name} for i, name in enumerate(boxes)]
    content["annotations"] = [
        {"id": 0, "image_id": 10 + i, "category_id": names.index(label), "bbox": box}
        for i, objects in enumerate(boxes.values())
        for label, box in objects
    ]
    path.write_text(json.dumps(content))


@pytest.fixture
def hrsid(tmp_path: Path) -> Path:
    """HRSID's layout: two parts and their union in three files, images in one folder."""
    root = tmp_path / "hrsid"
    for seed, name in enumerate(("a.jpg", "b.png", "c.png")):
        image(root / "JPEGImages" / name, seed, colour=name == "b.png")
    train: dict[str, Any] = {"b.png": [("ship", [10, 10, 8, 4]), ("boat", [50, 30, 10, 10])]}
    test: dict[str, Any] = {"c.png": [("ship", [0, 0, 2, 2])]}
    coco(root / "annotations/train2017.json", train)
    coco(root / "annotations/test2017.json", test)
    coco(root / "annotations/train_test2017.json", {**train, **test, "a.jpg": []})
    return root


def test_coco_files_give_the_parts_and_their_union_adds_no_image_twice(hrsid: Path) -> None:
    items, rejected = listed("coco", hrsid)
    assert not rejected
    assert [(item.name, item.part) for item in items] == [
        ("JPEGImages/c.png", "test"),
        ("JPEGImages/b.png", "train"),
        ("JPEGImages/a.jpg", "all"),
    ]
    parts = corpus("coco").parts
    assert {name: part.split for name, part in parts.items()} == {
        "train": "train",
        "val": "train",
        "test": "test",
        "all": "pretrain",
    }


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("a/instances_val2017.json", "val"),
        ("train.json", "train"),
        ("TEST.json", "test"),
        ("trainval.json", ""),
        ("train_test2017.json", ""),
        ("training/all.json", ""),
    ],
)
def test_the_name_of_an_annotation_file_tells_its_part(name: str, part: str) -> None:
    assert part_of(name) == part


def test_images_are_taken_whole_or_in_tiles_without_class(hrsid: Path) -> None:
    records, rejected = take("coco", hrsid, include=("*.png",))
    assert not rejected
    assert [(r.pixels.shape, r.label) for r in records] == [((HIGH, WIDE), None)] * 2
    assert all("boxes" not in r.meta for r in records)
    tiles, _ = take("coco", hrsid, include=("*b.png",), tile=20)
    scene = np.asarray(Image.open(hrsid / "JPEGImages/b.png"))[..., 0]
    assert len(tiles) == 6
    for tile in tiles:
        top, left = tile.meta["top"], tile.meta["left"]
        assert (tile.pixels == scene[top : top + 20, left : left + 20]).all()


def test_each_box_becomes_a_chip_with_its_class(hrsid: Path) -> None:
    records, rejected = take("coco", hrsid, include=("*.png",), extra={"chips": "objects", "side": "16"})
    scene = np.asarray(Image.open(hrsid / "JPEGImages/b.png"))[..., 0]
    assert not rejected
    assert [(r.key, r.label) for r in records] == [
        ("JPEGImages/c.png#0", "ship"),
        ("JPEGImages/b.png#0", "ship"),
        ("JPEGImages/b.png#1", "boat"),
    ]
    assert (records[1].pixels == scene[4:20, 6:22]).all()  # centred on (14, 12)
    assert records[1].meta["box"] == [4, 6, 8, 4]
    assert (records[2].pixels == scene[24:40, 44:60]).all()  # moved inside
    unlabelled, _ = take("coco", hrsid, labels=False, include=("*.png",), extra={"chips": "objects"})
    assert [r.label for r in unlabelled] == [None] * 3
    again, _ = take("coco", to_tar(hrsid), include=("*.png",), extra={"chips": "objects", "side": "16"})
    assert [(r.key, r.pixels.tobytes()) for r in again] == [(r.key, r.pixels.tobytes()) for r in records]
    _, empty = take("coco", hrsid, include=("*.jpg",), extra={"chips": "objects"})
    assert [(r.key, r.kind) for r in empty] == [("JPEGImages/a.jpg", "flat")]


@settings(max_examples=30, deadline=None)
@given(
    x=st.floats(0, WIDE - 1),
    y=st.floats(0, HIGH - 1),
    w=st.floats(0.5, 90),
    h=st.floats(0.5, 90),
    side=st.integers(2, 80),
)
def test_a_chip_lies_inside_its_image_and_holds_the_centre_of_its_box(
    tmp_path_factory: pytest.TempPathFactory, x: float, y: float, w: float, h: float, side: int
) -> None:
    root = tmp_path_factory.mktemp("set")
    w, h = min(w, WIDE - x), min(h, HIGH - y)
    scene = image(root / "a.png")
    coco(root / "train.json", {"a.png": [("ship", [x, y, w, h])]})
    records, rejected = take("coco", root, extra={"chips": "objects", "side": str(side)})
    assert not rejected
    chip, (top, left) = records[0].pixels, (records[0].meta["top"], records[0].meta["left"])
    assert chip.shape == (min(side, HIGH), min(side, WIDE))
    assert (chip == scene[top : top + side, left : left + side]).all()
    assert left - 0.5 <= x + w / 2 <= left + chip.shape[1] + 0.5
    assert top - 0.5 <= y + h / 2 <= top + chip.shape[0] + 0.5


def test_what_does_not_fit_together_is_rejected_by_name(hrsid: Path) -> None:
    (hrsid / "JPEGImages/c.png").unlink()
    image(hrsid / "JPEGImages/extra.png")
    coco(hrsid / "annotations/val.json", {"b.png": []})
    (hrsid / "annotations/broken.json").write_text("{")
    (hrsid / "annotations/notes.json").write_text('{"images": [], "annotations": [{"bbox": [1, 2]}], "categories": []}')
    _, rejected = listed("coco", hrsid)
    assert {r.kind for r in rejected} == {"bad"}
    reasons = {r.key: r.reason for r in rejected}
    union, test = "annotations/train_test2017.json", "annotations/test2017.json"
    assert reasons[f"{test}: c.png"] == f"{test} names c.png: there is not one such image"
    assert reasons[f"{union}: c.png"] == f"{union} names c.png: there is not one such image"
    both = "annotations/train2017.json and annotations/val.json both list it"
    assert reasons["JPEGImages/b.png"] == both
    assert reasons["JPEGImages/extra.png"] == "no annotation file lists it"
    assert reasons["annotations/broken.json"].startswith("annotations/broken.json is not readable JSON")
    assert reasons["annotations/notes.json"].startswith("annotations/notes.json is not a COCO file: ValueError")
    assert len(reasons) == 6


def test_a_name_that_several_folders_have_is_that_of_the_part(tmp_path: Path) -> None:
    for part in ("train", "test"):
        image(tmp_path / f"JPEGImages/{part}/0001.png")
        coco(tmp_path / f"Annotations/{part}.json", {"0001.png": []})
    items, rejected = listed("coco", tmp_path)
    assert not rejected
    assert {(i.name, i.part) for i in items} == {(f"JPEGImages/{p}/0001.png", p) for p in ("train", "test")}


def test_a_box_outside_its_image_and_a_damaged_image_are_rejected(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    objects = [("ship", [100.0, 10, 4, 4]), ("ship", [10, 10, 0, 4]), ("ship", [10, 10, 4, 4])]
    coco(tmp_path / "train.json", {"a.png": objects, "b.png": objects[:1]})
    records, rejected = take("coco", tmp_path, extra={"chips": "objects"})
    assert [r.key for r in records] == ["a.png#2"]
    assert [r.key for r in rejected] == ["a.png#0", "a.png#1", "b.png"]
    assert rejected[0].reason == "the box (100.0, 10.0, 4.0, 4.0) is empty or outside its image of 40x60"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"chips": "boxes"}, "chips=boxes is unknown"),
        ({"side": "big"}, "side=big is no side of a chip"),
        ({"sides": "3"}, "has no option 'sides'\n.*did you mean side"),
    ],
)
def test_wrong_options_are_refused(hrsid: Path, extra: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        listed("coco", hrsid, extra=extra)


# VOC


def voc(path: Path, *boxes: tuple[str, int, int, int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    objects = "".join(
        f"<object><name>{n}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
        for n, a, b, c, d in boxes
    )
    path.write_text(f"<annotation><filename>{path.stem}.jpg</filename>{objects}</annotation>")


@pytest.fixture
def ssdd(tmp_path: Path) -> Path:
    root = tmp_path / "ssdd"
    for name in ("000001", "000002", "000003"):
        image(root / f"JPEGImages/{name}.png")
        voc(root / f"Annotations/{name}.xml", ("ship", 10, 12, 20, 16))
    lists = root / "ImageSets/Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("000001\n000002\n")
    (lists / "test.txt").write_text("000003\n")
    (lists / "trainval.txt").write_text("000001\n000002\n000003\n")
    return root


def test_voc_lists_give_the_parts_and_annotations_the_boxes(ssdd: Path) -> None:
    items, rejected = listed("voc", ssdd)
    assert not rejected
    assert [(i.name[-10:], i.part) for i in items] == [
        ("000001.png", "train"),
        ("000002.png", "train"),
        ("000003.png", "test"),
    ]
    records, _ = take("voc", ssdd, extra={"chips": "objects", "side": "8"})
    scene = np.asarray(Image.open(ssdd / "JPEGImages/000001.png"))
    assert [r.label for r in records] == ["ship"] * 3
    assert (records[0].pixels == scene[10:18, 11:19]).all()
    assert len(take("voc", to_tar(ssdd))[0]) == 3


def test_folders_give_the_parts_of_a_voc_set_without_lists(tmp_path: Path) -> None:
    for part in ("train", "test"):
        image(tmp_path / f"JPEGImages_{part}/1.png")
        voc(tmp_path / f"Annotations_{part}/1.xml")
    image(tmp_path / "loose/2.png")
    voc(tmp_path / "loose/2.xml")
    items, rejected = listed("voc", tmp_path)
    assert not rejected
    assert {(i.name, i.part) for i in items} == {
        ("JPEGImages_train/1.png", "train"),
        ("JPEGImages_test/1.png", "test"),
        ("loose/2.png", "all"),
    }


def test_what_does_not_fit_together_in_a_voc_set_is_rejected_by_name(ssdd: Path) -> None:
    image(ssdd / "JPEGImages/unlisted.png")
    voc(ssdd / "Annotations/unlisted.xml")
    image(ssdd / "JPEGImages/bare.png")
    voc(ssdd / "Annotations/alone.xml")
    (ssdd / "Annotations/000001.xml").write_text("<annotation><object><name>ship</name></object></annotation>")
    (ssdd / "Annotations/000002.xml").write_text('<!DOCTYPE a [<!ENTITY b "c">]><annotation/>')
    (ssdd / "ImageSets/Main/val.txt").write_text("000003 gone")
    items, rejected = listed("voc", ssdd)
    assert not items
    assert {r.key: r.reason for r in rejected} == {
        "ImageSets/Main/val.txt: gone": "ImageSets/Main/val.txt names gone: no such image",
        "JPEGImages/000003.png": "several lists of ImageSets/Main name it",
        "JPEGImages/unlisted.png": "no list of ImageSets/Main name it",
        "JPEGImages/bare.png": "JPEGImages/bare.png has no annotation Annotations/bare.xml",
        "Annotations/alone.xml": "Annotations/alone.xml belongs to no image alone",
        "Annotations/000001.xml": "Annotations/000001.xml: object 0 has no name or no box",
        "Annotations/000002.xml": "an XML file with a document type is not read",
    }
    assert {r.kind for r in rejected} == {"bad"}
