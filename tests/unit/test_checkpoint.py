"""A checkpoint is whole or it is none: no failure of disk, process or file leaves a run with less than it had."""

from __future__ import annotations

import json
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation.errors import CheckpointError
from foundation.training import checkpoint
from foundation.training.checkpoint import check_model, latest, load, save


def state(width: int = 4) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(width)
    weights = {"w": torch.randn(width, width, generator=generator), "b": torch.zeros(width, dtype=torch.bfloat16)}
    return {"model": weights, "position": 7, "config": {"lr": 1e-3, "radii": [5, 9]}, "run_id": None}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that another user could reach, unlike pytest's own."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path / "checkpoints"
    shutil.rmtree(path)


def test_what_was_saved_is_loaded_bit_for_bit(folder: Path) -> None:
    path = save(folder, state(), 12_800)
    assert path == folder / "samples-000000012800"
    assert names(path) == ["COMMIT", "manifest.json", "state.pt"]
    for where in (folder.parent, folder, path):
        found = load(where)
        assert found["config"] == state()["config"]
        assert all(torch.equal(found["model"][name], tensor) for name, tensor in state()["model"].items())
    assert (folder / "latest").read_text() == "samples-000000012800\n"
    assert not list(folder.glob(".tmp*"))


def test_a_real_optimizer_state_can_be_read_back(folder: Path) -> None:
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save(folder, {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, 1)
    optimizer.load_state_dict(load(folder)["optimizer"])


def test_the_newest_and_the_pinned_remain(folder: Path) -> None:
    for position in range(1, 8):
        save(folder, state(), position, keep=2, pinned=(3,))
    assert [path.name[-1] for path in sorted(folder.glob("samples-*"))] == ["3", "6", "7"]


def test_going_back_keeps_the_checkpoint_just_saved(folder: Path) -> None:
    for position in (10, 20, 5):
        save(folder, state(), position, keep=1)
    assert names(folder) == ["latest", "samples-000000000005", "samples-000000000020"]


def test_saving_a_position_again_replaces_it(folder: Path) -> None:
    save(folder, state(4), 10)
    save(folder, state(5), 10)
    assert load(folder)["model"]["w"].shape == (5, 5)
    assert names(folder) == ["latest", "samples-000000000010"]


@given(st.lists(st.integers(0, 10**11), min_size=1, max_size=4), st.integers(1, 3))
@settings(max_examples=10, deadline=None)
def test_the_newest_position_is_found_whatever_the_order_of_saves(positions: list[int], keep: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        for position in positions:
            save(Path(place), state(1), position, keep=keep)
        found, skipped = latest(Path(place))
        assert found == Path(place) / f"samples-{max(positions):012d}"
        assert not skipped


def test_a_full_disk_midway_costs_only_the_new_checkpoint(folder: Path) -> None:
    save(folder, state(), 10)
    before = names(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # a real failing write: EFBIG after 100 kB
    try:
        with pytest.raises(CheckpointError, match="at 20 samples could not be written: File too large") as caught:
            save(folder, state(400), 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "earlier checkpoints are untouched" in str(caught.value)
    assert names(folder) == before
    assert load(folder)["position"] == 7


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_without_permission_is_named_as_root() -> None:
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    save(place / "checkpoints", state(), 10)
    os.seteuid(65534)
    try:
        with pytest.raises(CheckpointError, match="could not be written: Permission denied"):
            save(place / "checkpoints", state(), 20)
        assert load(place)["position"] == 7
    finally:
        os.seteuid(0)
        shutil.rmtree(place)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(folder: Path) -> None:
    save(folder, state(), 10)
    folder.chmod(0o555)
    try:
        with pytest.raises(CheckpointError, match="could not be written: Permission denied"):
            save(folder, state(), 20)
        assert load(folder)["position"] == 7
    finally:
        folder.chmod(0o755)


def test_an_interruption_during_the_write_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(folder, state(), 10)
    before = names(folder)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_sha256", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(folder, state(), 20)
    assert names(folder) == before


def _flip(path: Path) -> None:
    content = bytearray((path / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "state.pt").write_bytes(content)


def _cut(path: Path) -> None:
    with (path / "state.pt").open("r+b") as file:
        file.truncate(100)


def _version(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text()) | {"format": 99}
    (path / "manifest.json").write_text(json.dumps(manifest))


UNFIT: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: (path / "COMMIT").unlink(), "has no COMMIT marker: the save was interrupted"),
    (lambda path: (path / "manifest.json").unlink(), "has no manifest.json"),
    (lambda path: (path / "manifest.json").write_text("{"), "has an unreadable manifest.json"),
    (lambda path: (path / "manifest.json").write_text("[]"), "has an unreadable manifest.json"),
    (_version, "has the unknown format version 99; this program reads 1"),
    (lambda path: (path / "state.pt").unlink(), "is damaged: state.pt is missing"),
    (_cut, "is damaged: state.pt has 100 bytes, not"),
]


@pytest.mark.parametrize(("spoil", "reason"), UNFIT)
def test_discovery_skips_an_unfit_checkpoint_and_says_why(
    spoil: Callable[[Path], object], reason: str, folder: Path
) -> None:
    old, new = save(folder, state(), 10), save(folder, state(), 20)
    spoil(new)
    found, skipped = latest(folder)
    assert found == old
    assert len(skipped) == 1
    assert skipped[0].startswith(f"samples-000000000020: {reason}")
    with pytest.raises(CheckpointError, match=f"the checkpoint {reason}"):
        load(new)


def test_one_flipped_bit_is_noticed(folder: Path) -> None:
    _flip(save(folder, state(), 10))
    with pytest.raises(CheckpointError, match=r"is damaged: the sha256 of state\.pt differs from the manifest"):
        load(folder)


def test_an_unfit_checkpoint_does_not_count_among_those_kept(folder: Path) -> None:
    save(folder, state(), 10)
    (save(folder, state(), 20) / "COMMIT").unlink()
    save(folder, state(), 30, keep=2)
    assert (folder / "samples-000000000010").exists()


def test_leftovers_of_a_killed_save_are_named_and_then_removed(folder: Path) -> None:
    (folder / ".tmp-samples-000000000020-1").mkdir(parents=True)
    assert latest(folder) == (None, [".tmp-samples-000000000020-1: the save was interrupted"])
    with pytest.raises(CheckpointError, match=r"there is no checkpoint \(skipped \.tmp-samples-000000000020-1"):
        load(folder)
    save(folder, state(), 30)
    assert names(folder) == ["latest", "samples-000000000030"]


def test_a_place_without_checkpoints_is_named(folder: Path) -> None:
    assert latest(folder) == (None, [])
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load(folder)
    with pytest.raises(CheckpointError, match="the checkpoint does not exist"):
        load(folder / "samples-000000000010")


def test_a_value_that_could_not_be_read_back_is_refused_before_anything_is_written(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"state\.a\.b\.0 is a numpy\.float64, which could not be read back"):
        save(folder, {"a": {"b": [np.float64(1)]}}, 10)
    assert not folder.exists()


def test_a_file_with_code_in_it_is_not_executed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_refuse_objects", lambda *_: None)
    save(folder, {"path": Path("x")}, 10)
    with pytest.raises(CheckpointError, match="does not hold a state of tensors and plain values"):
        load(folder)


def test_another_model_is_described_by_the_names_that_differ() -> None:
    small, large = torch.nn.Linear(2, 2).state_dict(), torch.nn.Linear(2, 3).state_dict()
    check_model(small, small)
    extra = {f"extra{i}": torch.zeros(1) for i in range(5)}
    with pytest.raises(CheckpointError) as caught:
        check_model({"weight": small["weight"], **extra}, large, where="here")
    message = str(caught.value)
    assert "the checkpoint is of another model; 1 missing: bias; 5 unexpected: extra0, extra1, extra2, ...;" in message
    assert "1 of another shape: weight [2, 2], not [3, 2]" in message
    assert "where: here" in message
