"""A cell goes on where it was stopped, is done once, by one process at a time, and is the same on another machine."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from compared_cells import scored
from filelock import FileLock

from foundation import signals
from foundation.comparing.cells import BUSY, LOG, MARK, Outcome, command_line, finished, run_all, run_cell
from foundation.comparing.plan import load
from foundation.comparing.results import collect
from foundation.comparing.table import to_markdown
from foundation.config import Config, config_hash
from foundation.errors import CheckpointError, ConfigError
from foundation.training.run import train


def test_a_cell_is_trained_judged_and_not_done_twice(compared: Callable[..., Path]) -> None:
    found = load(compared())
    assert not finished(found, found.cells[2])
    run = run_cell(found, 2)
    assert finished(found, found.cells[2])
    scores = {(s["encoder"], s["protocol"]) for s in json.loads((run / "scores.json").read_text())}
    assert {("pretrained", "knn"), ("random-init", "3-shot linear")} <= scores
    assert not {encoder for encoder, _ in scores} - {"pretrained", "random-init"}  # other controls: in the first cell
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    assert run_cell(found, 2) == run
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before
    results = collect(found)
    assert list(results.rows) == ["Pixels (raw)"]
    assert results.missing == ("sar-jepa-seed0", "sar-jepa-seed3", "pixels-raw-seed3")
    assert "Not finished, so not in the table: sar-jepa-seed0, " in to_markdown(found, results)
    other = load(compared(), ["optim.lr=5e-4"])
    assert not finished(other, other.cells[2])
    with pytest.raises(CheckpointError, match=r"holds a run with other values of: optim\.lr"):
        run_cell(other, 2)


def test_a_cell_that_is_not_there_is_an_error(compared: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="there is no cell 4: this comparison has 4, counted from 0"):
        run_cell(load(compared()), 4)


STAND_IN = """
import json, os, pathlib, sys
root, cell = pathlib.Path(sys.argv[1]), int(sys.argv[-1])
(root / f"seen-{cell}").write_text(os.environ["OMP_NUM_THREADS"])
print("line of the log")
if cell == 1:
    sys.exit("this cell breaks")
if cell == 2:
    sys.exit(75)
"""


def test_a_cell_that_fails_does_not_stop_the_others_and_shows_its_last_lines(
    compared: Callable[..., Path], tmp_path: Path
) -> None:
    found = load(compared())
    scored(found, {"SAR-JEPA": [0.5, 0.5], "Pixels (raw)": [0.5, 0.5]})
    (found.cells[1].config.run_folder / MARK).unlink()
    (found.cells[1].config.run_folder / LOG).write_text("an earlier attempt\n")
    (found.cells[2].config.run_folder / MARK).unlink()
    (found.cells[3].config.run_folder / MARK).write_text("{}")  # of other settings
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    told: list[Outcome] = []
    run_all(found, [sys.executable, str(script), str(tmp_path)], 2, told.append)
    broken, busy, _ = sorted(told)
    assert [o.number for o in sorted(told)] == [1, 2, 3]
    assert {p.name: p.read_text() for p in tmp_path.glob("seen-*")} == dict.fromkeys(
        ("seen-1", "seen-2", "seen-3"), str(max(1, len(os.sched_getaffinity(0)) // 2))
    )
    assert (broken.finished, broken.busy) == (False, False)
    assert (busy.finished, busy.busy) == (False, True)
    assert broken.lines == "line of the log\nthis cell breaks"
    assert (found.cells[1].config.run_folder / LOG).read_text().startswith("an earlier attempt\n")
    assert "line of the log" in (found.cells[3].config.run_folder / LOG).read_text()


SLEEPS = """
import os, pathlib, signal, sys, time
root, cell = pathlib.Path(sys.argv[1]), int(sys.argv[-1])
def stopped(*_):
    (root / f"stopped-{cell}").touch()
    sys.exit(85)
signal.signal(signal.SIGTERM, stopped)
(root / f"began-{cell}").touch()
while cell != 0 or not (root / "began-1").exists():
    time.sleep(0.02)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_an_interruption_asks_running_cells_to_save_and_begins_no_other(
    compared: Callable[..., Path], tmp_path: Path, number: signal.Signals
) -> None:
    script = tmp_path / "sleeps.py"
    script.write_text(SLEEPS)

    def interrupted(outcome: Outcome) -> None:
        assert outcome.number == 0
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        run_all(load(compared()), [sys.executable, str(script), str(tmp_path)], 2, interrupted)
    began, stopped = ({int(p.name[-1]) for p in tmp_path.glob(f"{word}-?")} for word in ("began", "stopped"))
    assert {0, 1} <= began
    assert stopped <= began - {0}  # one that is asked before it listens ends as well
    assert 1 in stopped
    assert 3 not in began
    assert signal.getsignal(number) is before


def test_a_terminal_that_is_closed_ends_nothing_that_was_told_to_stay(
    compared: Callable[..., Path], tmp_path: Path
) -> None:
    found, script = load(compared()), tmp_path / "stand_in.py"
    scored(found, {"SAR-JEPA": [0.5, 0.5], "Pixels (raw)": [0.5, 0.5]})
    (found.cells[0].config.run_folder / MARK).unlink()
    script.write_text(STAND_IN)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        command = [sys.executable, str(script), str(tmp_path)]
        run_all(found, command, 1, lambda _: os.kill(os.getpid(), signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_cell_is_left_to_the_process_that_works_on_it(
    compared: Callable[..., Path], command: Callable[..., Any]
) -> None:
    found, path = load(compared()), compared()
    scored(found, {"SAR-JEPA": [0.5, 0.5], "Pixels (raw)": [0.5, 0.5]})
    folder = found.cells[1].config.run_folder
    (folder / MARK).unlink()
    with FileLock(folder / ".cell.lock"):
        one = command("compare", path, "--cell", "1")
        assert one.code == BUSY
        assert f"another process works on this cell\n  where: {folder}\n" in one.out
        whole = command("compare", path)
    assert whole.code == 0
    assert "1/1  sar-jepa-seed3  left to another process in" in whole.out
    assert "Not finished, so not in the table: sar-jepa-seed3" in whole.out


def test_a_cell_stays_what_it_is_on_another_machine(compared: Callable[..., Path], tmp_path: Path) -> None:
    found = load(compared())
    scored(found, {"SAR-JEPA": [0.5, 0.5], "Pixels (raw)": [0.5, 0.5]})
    there = (
        "tracking.uri=http://new:5000",
        "data.workers=3",
        "train.threads=2",
        f"run_root={os.path.relpath(tmp_path / 'runs')}",
    )
    other = load(compared(), there)
    assert all(finished(other, c) for c in other.cells)
    old = found.cells[0].config.run_folder / MARK
    mark = json.loads(old.read_text())
    old.write_text(json.dumps(mark | {"config": config_hash(found.cells[0].config)}))
    assert finished(found, found.cells[0]), "older marks name the whole configuration"
    old.write_text(json.dumps(mark | {"config": config_hash(load(compared(), ["optim.lr=1"]).cells[0].config)}))
    assert not finished(found, found.cells[0])


def test_a_run_that_began_on_another_machine_goes_on(compared: Callable[..., Path]) -> None:
    run_cell(load(compared()), 2)
    other = load(compared(), ["train.threads=2", "tracking.experiment=other"])
    (other.cells[2].config.run_folder / MARK).unlink()
    run_cell(other, 2)
    assert finished(other, other.cells[2])


@pytest.fixture
def listened() -> Iterator[None]:
    """Signals that ask to stop are what they were after the test, and forgotten."""
    before = [(number, signal.getsignal(number)) for number in signals.SIGNALS]
    yield
    for number, handler in before:
        signal.signal(number, handler)
    signals.forget()


@pytest.mark.parametrize("when", ["before the evaluation", "within it"])
def test_a_cell_that_is_asked_to_stop_does_not_evaluate_on_and_goes_on_later(
    compared: Callable[..., Path],
    command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    listened: None,
    when: str,
) -> None:
    path = compared()
    waited: list[float] = []

    def asked(*_: object, **__: object) -> Any:
        try:
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(60)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # launchers ask twice, and cleaning up goes on
            waited.append(0)

    def trained(config: Config) -> Path:
        run = train(config)
        if when == "before the evaluation":
            os.kill(os.getpid(), signal.SIGTERM)
        return run

    with monkeypatch.context() as patched:
        patched.setattr("foundation.training.run.train", trained)
        patched.setattr("foundation.evaluation.runs.measure", asked)
        assert command("compare", path, "--cell", "0").code == signals.STOPPED
    assert waited == ([] if when == "before the evaluation" else [0])
    assert not finished(load(path), load(path).cells[0])
    signals.forget()
    with monkeypatch.context() as patched:
        patched.setattr("foundation.evaluation.runs.measure", asked)
        again = command("compare", path, "--cell", "0")
    assert again.code == 2, "not for ever: 85 would bring a task of an array back"
    assert "was asked to stop a second time" in again.err
    assert "give it more time" in again.err
    signals.forget()
    assert command("compare", path, "--cell", "0").code == 0
    assert finished(load(path), load(path).cells[0])


def test_the_command_of_a_cell_carries_file_overrides_and_device() -> None:
    line = command_line(Path("a b.yaml"), ["train.samples=8"], "cpu")
    assert line == [sys.executable, "-m", "foundation", "compare", "a b.yaml", "train.samples=8", "--device", "cpu"]
