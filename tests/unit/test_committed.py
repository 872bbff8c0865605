"""What is committed, what is valid, what may go: the same rules for a folder and for an object store."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation.config import from_dict
from foundation.errors import CheckpointError, ConfigError
from foundation.training.checkpoint import load, save
from foundation.training.committed import candidates, committed, damage, flaw, latest, place_of, recover, strays, tidy
from foundation.training.places import Bucket, Folder, Place, Url, batches, home, place
from shards.store import filesystem


@pytest.fixture(params=["folder", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A folder of checkpoints, and the same in an object store."""
    url = f"memory://{secrets.token_hex(4)}/checkpoints"
    yield place(tmp_path / "checkpoints") if request.param == "folder" else place(url)
    if request.param == "memory":
        place(url).remove()


def put(root: Place, position: int, value: float = 0, keep: int = 100, keep_every: int | None = None) -> str:
    """Save, and the name of the checkpoint."""
    return save(root.location, {"x": torch.full((2,), value)}, {"position": position}, position, keep, keep_every).name


def value(root: Place, name: str) -> float:
    return float(load((root / name).location)["tensors"]["x"][0])


def test_the_newest_is_found_by_its_position_whatever_else_lies_there(root: Place) -> None:
    for position in (9, 1000, 20):
        put(root, position)
    for name in ("samples-", "samples-abc", "samples-000000000100.old", "other"):
        (root / name / "COMMIT").write([b"x"]) if isinstance(root, Bucket) else _fill(root / name)
    assert candidates(root) == committed(root) == [f"samples-{n:012d}" for n in (1000, 20, 9)]
    assert latest(_text(root)) == ((root / "samples-000000001000").location, [])


def _fill(folder: Place) -> None:
    assert isinstance(folder, Folder)
    folder.path.mkdir()
    (folder / "COMMIT").write([b"x"])


def _text(root: Place) -> Path | str:
    return root.location


def _remove(root: Place, name: str, file: str) -> None:
    """One file of a checkpoint."""
    if isinstance(root, Folder):
        (root.path / name / file).unlink()
    else:
        fs, path = filesystem(f"{root.location}/{name}/{file}")
        fs.rm_file(path)


def test_without_its_marker_it_is_no_checkpoint_and_does_not_count_among_those_kept(root: Place) -> None:
    put(root, 10)
    put(root, 20)
    _remove(root, "samples-000000000020", "COMMIT")
    assert flaw(root / "samples-000000000020") == "has no COMMIT marker: the save was interrupted"
    assert latest(_text(root))[1] == ["samples-000000000020: has no COMMIT marker: the save was interrupted"]
    put(root, 30, keep=2)
    assert committed(root) == ["samples-000000000030", "samples-000000000010"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda facts: facts | {"format": 3}, "has format version 3, of a newer program; this one reads 2"),
        (lambda facts: facts | {"format": 1}, "has format version 1, of an older program; this one reads 2"),
        (lambda facts: {"format": 2}, "has an unreadable manifest.json"),
        (lambda facts: [], "has an unreadable manifest.json"),
        (
            lambda facts: facts | {"files": facts["files"] | {"a/../../../x": {"bytes": 0, "sha256": ""}}},
            "has an unreadable manifest.json",
        ),
        (
            lambda facts: facts | {"files": facts["files"] | {"/etc/passwd": {"bytes": 0, "sha256": ""}}},
            "has an unreadable manifest.json",
        ),
        (
            lambda facts: facts | {"files": facts["files"] | {"tensors/more": {"bytes": 1, "sha256": ""}}},
            "is damaged: tensors/more is missing",
        ),
    ],
)
def test_a_manifest_that_says_something_else_is_a_flaw(root: Place, change: Callable[[Any], Any], reason: str) -> None:
    path = root / put(root, 10)
    facts = json.loads((path / "manifest.json").read())
    (path / "manifest.json").write([json.dumps(change(facts)).encode()])
    assert flaw(path) == reason
    with pytest.raises(CheckpointError, match=f"the checkpoint {reason}"):
        load(path.location)


def test_every_file_is_in_exactly_one_share_of_the_checking(root: Place) -> None:
    path = root / put(root, 10)
    facts = json.loads((path / "manifest.json").read())
    for name in facts["files"]:
        changed = {**facts["files"], name: {**facts["files"][name], "sha256": "0" * 64}}
        (path / "manifest.json").write([json.dumps({**facts, "files": changed}).encode()])
        found = [damage(path, share, 2) for share in range(2)]  # three files
        assert sum(reason is not None for reason in found) == 1
        assert f"is damaged: the sha256 of {name} differs from the manifest" in found


def test_a_pin_keeps_a_checkpoint_until_it_is_taken_away(root: Place) -> None:
    name = put(root, 10)
    (root / name / "PIN").write([b""])
    put(root, 20, keep=1)
    put(root, 30, keep=1)
    assert committed(root) == ["samples-000000000030", name]
    _remove(root, name, "PIN")
    put(root, 40, keep=1)
    assert committed(root) == ["samples-000000000040"]


@given(st.lists(st.integers(0, 10**11), min_size=1, max_size=5), st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_the_newest_is_never_removed_in_an_object_store_either(positions: list[int], keep: int) -> None:
    store = place(f"memory://{secrets.token_hex(4)}")
    for position in positions:
        put(store, position, keep=keep)
        assert f"samples-{position:012d}" in committed(store)
    assert candidates(store)[0] == f"samples-{max(positions):012d}"
    assert len(candidates(store)) <= keep + 1
    store.remove()


def test_saving_a_position_again_replaces_it_and_leaves_nothing_of_the_old(root: Place) -> None:
    put(root, 10, value=1)
    before = len((root / "samples-000000000010").sizes())
    put(root, 10, value=2)
    assert value(root, "samples-000000000010") == 2
    assert len((root / "samples-000000000010").sizes()) == before
    assert strays(root / "samples-000000000010") == []


def test_notes_that_somebody_put_into_a_checkpoint_stay(root: Place) -> None:
    name = put(root, 10)
    (root / name / "notes.txt").write([b"best so far"])
    tidy(root, name, 3, None)
    assert (root / name / "notes.txt").read() == b"best so far"
    assert flaw(root / name) is None


def test_a_draft_is_published_only_when_it_is_whole(tmp_path: Path) -> None:
    root = Folder(tmp_path)
    for position in (10, 20, 30):
        put(root, position)
    for name in ("samples-000000000020", "samples-000000000030"):
        (tmp_path / name).rename(tmp_path / f".tmp-{name}")
    (tmp_path / ".tmp-samples-000000000030" / "tensors" / "index.json").write_text("")
    recover(root)
    assert committed(root) == ["samples-000000000020", "samples-000000000010"]
    assert root.interrupted() == [".tmp-samples-000000000030"]


def test_the_checkpoints_of_a_run_are_where_its_configuration_says(tmp_path: Path) -> None:
    def where(**train: Any) -> Path | Url:
        return home(from_dict({"name": "a", "run_root": str(tmp_path), "train": train}))

    assert where() == tmp_path / "a" / "checkpoints"
    assert where(checkpoints="some/folder") == Path("some/folder")
    assert where(checkpoints="file:///some/folder") == Path("/some/folder")
    found = where(checkpoints="s3://bucket/runs/a/")
    assert (found, found.name, found / "b") == ("s3://bucket/runs/a", "a", "s3://bucket/runs/a/b")
    with pytest.raises(ConfigError, match="a folder or a URL of s3, gs, gcs, file, memory"):
        where(checkpoints="https://host/x")
    with pytest.raises(ConfigError, match="a URL without user name or query; credentials come from the environment"):
        where(checkpoints="s3://key:secret@bucket/x")


def test_a_run_folder_leads_to_its_checkpoints_wherever_they_are(tmp_path: Path) -> None:
    assert str(place_of(tmp_path)) == str(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert str(place_of(tmp_path)) == str(tmp_path / "checkpoints")
    for text in ("train: {checkpoints: null}", "train:", "[]", "{", ""):
        (tmp_path / "config.yaml").write_text(text)
        assert str(place_of(tmp_path)) == str(tmp_path / "checkpoints")
    (tmp_path / "config.yaml").write_text("train: {checkpoints: 'memory://elsewhere/x'}")
    assert str(place_of(tmp_path)) == "memory://elsewhere/x"


def test_a_part_of_a_file_that_is_not_there_is_an_error_and_not_less(root: Place) -> None:
    file = root / "file"
    if isinstance(root, Folder):
        root.path.mkdir()
    file.write([b"0123", memoryview(b"456789")])
    assert list(file.spans([(0, 4), (8, 10), (2, 3), (5, 5)])) == [b"0123", b"89", b"2", b""]
    assert file.size() == 10
    with pytest.raises(OSError, match="file ends after 10 bytes"):
        list(file.spans([(8, 11)]))
    with pytest.raises(FileNotFoundError):
        (root / "other").read()


@given(st.lists(st.integers(0, 90), max_size=30), st.integers(1, 200))
def test_requests_are_grouped_in_their_order_and_none_is_lost(lengths: list[int], limit: int) -> None:
    spans = [(at, at + length) for at, length in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("foundation.training.places.BATCH", limit)
        groups = list(batches(spans))
    assert [span for group in groups for span in group] == spans
    assert all(sum(stop - start for start, stop in group[:-1]) < limit for group in groups)


def test_a_url_that_is_shown_holds_no_secret() -> None:
    assert str(place("s3://key:secret@bucket/run/x?token=y")) == "s3://***@bucket/run/x?***"
