"""A checkpoint that is unfinished, damaged or of another program is named and passed over; the one before is taken."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_checkpoint
from test_checkpoint import PIECE, STATE, names, tensors

from foundation.errors import CheckpointError
from foundation.training.checkpoint import latest, load, restore, save
from foundation.training.places import Folder

folder = test_checkpoint.folder


def _flip(path: Path, name: str = PIECE) -> None:
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)


def _cut(path: Path) -> None:
    os.truncate(path / PIECE, 100)


def _change(**values: Any) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text()) | values
        (path / "manifest.json").write_text(json.dumps(manifest))

    return change


def _list(name: str) -> Callable[[Path], object]:
    """Name a file in the manifest that really is there."""

    def change(path: Path) -> None:
        (path.parent / "secret").write_text("x")
        files = json.loads((path / "manifest.json").read_text())["files"]
        _change(files={**files, name.format(path.parent): {"bytes": 1, "sha256": "0" * 64}})(path)

    return change


UNREADABLE = "has an unreadable manifest.json"
UNFIT: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: (path / "COMMIT").unlink(), "has no COMMIT marker: the save was interrupted"),
    (lambda path: (path / "manifest.json").unlink(), "has no manifest.json"),
    (lambda path: (path / "manifest.json").write_text("{"), UNREADABLE),
    (lambda path: (path / "manifest.json").write_text("[]"), UNREADABLE),
    (lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe"), UNREADABLE),
    (_change(files=[]), UNREADABLE),
    (_change(files={}), UNREADABLE),
    (_change(files={"state.json": {"bytes": "many"}}), UNREADABLE),
    (_change(files={"state.json": {"bytes": 3}}), UNREADABLE),
    (_list("../secret"), UNREADABLE),
    (_list("{}/secret"), UNREADABLE),
    (_list("tensors/../../secret"), UNREADABLE),
    (_change(format=99), "has format version 99, of a newer program; this one reads 2"),
    (_change(format=1), "has format version 1, of an older program; this one reads 2"),
    (_change(format="x"), "has format version x, of an older program; this one reads 2"),
    (lambda path: (path / PIECE).unlink(), f"is damaged: {PIECE} is missing"),
    (lambda path: (path / "state.json").unlink(), "is damaged: state.json is missing"),
    (lambda path: (path / "tensors/index.json").unlink(), "is damaged: tensors/index.json is missing"),
    (_cut, f"is damaged: {PIECE} has 100 bytes, not"),
]


@pytest.mark.parametrize(("spoil", "reason"), UNFIT)
def test_discovery_skips_an_unfit_checkpoint_and_says_why(
    spoil: Callable[[Path], object], reason: str, folder: Path
) -> None:
    old, new = save(folder, tensors(), STATE, 10), save(folder, tensors(), STATE, 20)
    spoil(Path(str(new)))
    found, skipped = latest(folder)
    assert found == old
    assert len(skipped) == 1
    assert skipped[0].startswith(f"samples-000000000020: {reason}")
    with pytest.raises(CheckpointError, match=f"the checkpoint {reason}"):
        load(new)
    path, _, passed_over = restore(folder)
    assert path == old
    assert len(passed_over) == 1
    assert reason in passed_over[0]


@pytest.mark.parametrize("name", [PIECE, "tensors/index.json", "state.json"])
def test_one_flipped_bit_is_noticed_and_the_one_before_is_taken(folder: Path, name: str) -> None:
    old, new = save(folder, tensors(), STATE, 10), save(folder, tensors(), STATE, 20)
    _flip(Path(str(new)), name)
    reason = f"the checkpoint is damaged: the sha256 of {name} differs from the manifest"
    with pytest.raises(CheckpointError, match=reason):
        load(folder)
    assert restore(folder) == (old, STATE, [f"samples-000000000020: {reason}"])


def test_when_none_is_usable_nothing_is_started_anew_by_itself(folder: Path) -> None:
    for position in (10, 20):
        _flip(Path(str(save(folder, tensors(), STATE, position))))
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints can be used: samples-0{10}20: ") as caught:
        restore(folder)
    assert "repair or remove them; without them the run starts anew" in str(caught.value)
    for position in (10, 20):
        (folder / f"samples-{position:012d}" / "COMMIT").unlink()
    path, state, skipped = restore(folder)
    assert (path, state) == (None, {})
    assert [line.partition(":")[0] for line in skipped] == ["samples-000000000020", "samples-000000000010"]


def test_a_file_that_cannot_be_read_is_a_reason_and_no_crash(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(folder, tensors(), STATE, 10)

    def broken(self: Folder) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Folder, "digest", broken)
    with pytest.raises(CheckpointError, match="the checkpoint cannot be read: Input/output error"):
        restore(folder)
    with pytest.raises(CheckpointError, match="the checkpoint cannot be read: Input/output error"):
        load(folder)


def test_an_unfit_checkpoint_does_not_count_among_those_kept(folder: Path) -> None:
    save(folder, tensors(), STATE, 10)
    (Path(str(save(folder, tensors(), STATE, 20))) / "COMMIT").unlink()
    save(folder, tensors(), STATE, 30, keep=2)
    assert (folder / "samples-000000000010").exists()


def test_leftovers_of_a_killed_save_are_named_and_then_removed(folder: Path) -> None:
    (folder / ".tmp-samples-000000000020" / "tensors").mkdir(parents=True)
    (folder / ".tmp-removed-samples-000000000010" / "tensors").mkdir(parents=True)
    (folder / ".tmp-latest").touch()
    line = ".tmp-samples-000000000020: the save was interrupted"
    assert latest(folder) == (None, [line])
    assert restore(folder) == (None, {}, [line])
    with pytest.raises(CheckpointError, match=rf"there is no checkpoint \(skipped {line}"):
        load(folder)
    save(folder, tensors(), STATE, 30)
    assert names(folder) == ["latest", "samples-000000000030"]


def test_a_place_without_checkpoints_is_named(folder: Path) -> None:
    assert latest(folder) == (None, [])
    assert restore(folder) == (None, {}, [])
    with pytest.raises(CheckpointError, match=f"there is no checkpoint\n  where: {folder}"):
        load(folder)
    with pytest.raises(CheckpointError, match="the checkpoint does not exist"):
        load(folder / "samples-000000000010")
    (folder / "samples-000000000010").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="the checkpoint has no COMMIT marker"):
        load(folder / "samples-000000000010")
