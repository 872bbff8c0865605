"""Whoever asked a run to stop is named, also between two looks for the file."""

from __future__ import annotations

from pathlib import Path

from foundation.training.stopping import STOP_FILE, Watch


def test_the_file_that_stopped_a_run_is_named_after_the_agreement(tmp_path: Path) -> None:
    watch = Watch(tmp_path, lambda flag: lambda: flag)
    (tmp_path / STOP_FILE).touch()
    assert not watch.stop(), "what is asked after one update is answered after the next"
    assert watch.stop()
    reason = watch.reason()
    assert reason is not None
    assert reason.startswith("the file ")
    assert reason.endswith(f"/{STOP_FILE}")


def test_a_run_that_nobody_asks_goes_on(tmp_path: Path) -> None:
    watch = Watch(tmp_path, lambda flag: lambda: flag)
    assert not watch.stop()
    assert not watch.stop()
    assert watch.reason() is None
