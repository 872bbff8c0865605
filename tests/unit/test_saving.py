"""Saving beside the training: it goes on at once, and what goes wrong comes out at the next save or wait, once."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foundation.errors import CheckpointError
from foundation.training import checkpoint, saving
from foundation.training.checkpoint import latest, load
from foundation.training.places import Folder
from foundation.training.ranks import ALONE
from foundation.training.saving import Saver


def tensors(value: float) -> dict[str, Tensor]:
    return {"model.w": torch.full((3,), value)}


class Gate:
    """Holds writes until it is opened; then they go on, or fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.open, self.error = threading.Event(), threading.Event(), False
        write = Folder.write

        def held(place: Folder, parts: Any) -> None:
            self.reached.set()
            assert self.open.wait(20)
            if self.error:
                raise OSError(28, "No space left on device")
            write(place, parts)

        monkeypatch.setattr(Folder, "write", held)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def test_the_training_goes_on_while_a_save_is_written(tmp_path: Path, gate: Gate) -> None:
    saver = Saver(tmp_path, ALONE, 3, None, background=True)
    saver.save(tensors(1), {"position": 10}, 10)
    assert gate.reached.wait(20)  # here the save stands in its first write, and this thread is free
    assert latest(tmp_path)[0] is None
    gate.open.set()
    saver.wait()
    assert torch.equal(load(tmp_path)["tensors"]["model.w"], tensors(1)["model.w"])


def test_only_one_save_is_under_way_at_a_time(tmp_path: Path, gate: Gate) -> None:
    saver = Saver(tmp_path, ALONE, 3, None, background=True)
    saver.save(tensors(1), {}, 10)
    threading.Timer(0.1, gate.open.set).start()
    saver.save(tensors(2), {}, 20)  # waits for the first
    assert latest(tmp_path)[0] is not None
    saver.wait()
    assert latest(tmp_path)[0] == tmp_path / "samples-000000000020"


@pytest.mark.parametrize("act", ["save", "wait"])
def test_a_failure_in_the_background_comes_out_at_the_next_call_and_only_once(
    tmp_path: Path, gate: Gate, act: str
) -> None:
    gate.open.set()
    saver = Saver(tmp_path, ALONE, 3, None, background=True)
    saver.save(tensors(1), {}, 10)
    saver.wait()
    gate.error = True
    saver.save(tensors(2), {}, 20)
    calls: dict[str, Callable[[], None]] = {"save": lambda: saver.save(tensors(3), {}, 30), "wait": saver.wait}
    with pytest.raises(CheckpointError, match="the checkpoint at 20 samples could not be written: No space left on"):
        calls[act]()
    gate.error = False
    saver.wait()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["latest", "samples-000000000010"]
    saver.save(tensors(4), {}, 40)
    saver.wait()
    assert latest(tmp_path)[0] == tmp_path / "samples-000000000040"


def test_in_the_foreground_a_failure_comes_out_of_the_save_itself(tmp_path: Path, gate: Gate) -> None:
    gate.open.set()
    gate.error = True
    saver = Saver(tmp_path, ALONE, 3, None, background=False)
    with pytest.raises(CheckpointError, match="the checkpoint at 10 samples could not be written: No space left on"):
        saver.save(tensors(1), {}, 10)
    gate.error = False
    saver.save(tensors(1), {}, 20)
    assert latest(tmp_path)[0] == tmp_path / "samples-000000000020"


def test_an_error_of_the_training_does_not_cost_the_save_that_is_under_way(tmp_path: Path, gate: Gate) -> None:
    def train() -> None:
        with Saver(tmp_path, ALONE, 3, None, background=True) as saver:
            saver.save(tensors(1), {}, 10)
            threading.Timer(0.1, gate.open.set).start()
            raise ValueError("the loss is nan")

    with pytest.raises(ValueError, match="the loss is nan"):
        train()
    assert latest(tmp_path)[0] == tmp_path / "samples-000000000010"


def test_after_an_error_of_the_training_its_message_counts_and_the_wait_has_an_end(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "PATIENCE", 0.01)

    def train() -> None:
        with Saver(tmp_path, ALONE, 3, None, background=True) as saver:
            saver.save(tensors(1), {}, 10)
            raise ValueError("the loss is nan")

    with pytest.raises(ValueError, match="the loss is nan"):
        train()
    assert latest(tmp_path)[0] is None
    gate.open.set()
    monkeypatch.setattr(saving, "PATIENCE", 20)
    gate.error = True
    with pytest.raises(ValueError, match="the loss is nan"):
        train()


def test_the_end_of_a_run_waits_for_its_last_save_and_reports_it(tmp_path: Path, gate: Gate) -> None:
    gate.open.set()
    gate.error = True
    saver = Saver(tmp_path, ALONE, 3, None, background=True)
    with pytest.raises(CheckpointError, match="could not be written"), saver:
        saver.save(tensors(1), {}, 10)


def test_retention_is_that_of_the_saver(tmp_path: Path) -> None:
    with Saver(tmp_path, ALONE, 1, 20, background=True) as saver:
        for position in (10, 20, 30, 40, 50):
            saver.save(tensors(position), {"position": position}, position)
    kept = [path.name for path in sorted(tmp_path.glob("samples-*"))]
    assert kept == ["samples-000000000020", "samples-000000000040", "samples-000000000050"]
    assert json.loads((tmp_path / kept[0] / "state.json").read_text()) == {"position": 20}
    assert checkpoint.restore(tmp_path)[1] == {"position": 50}


def test_the_note_says_where_the_run_is_and_without_it_the_checkpoint_counts_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for note in (tmp_path / "committed", tmp_path / "committed" / "below-a-file"):
        saver = Saver(tmp_path / "checkpoints", ALONE, 3, None, False, note)
        saver.save(tensors(1), {"position": 8}, 8)
        saver.wait()
        assert latest(tmp_path)[0] == tmp_path / "checkpoints" / "samples-000000000008"
    assert (tmp_path / "committed").read_text() == "8\n"
    assert "below-a-file" in caplog.text
