"""A comparison shares one budget or is refused, goes on where it was stopped, and says what its numbers are."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from foundation import signals
from foundation.comparing.cells import BUSY, LOG, MARK, Outcome, command_line, finished, judged, run_all, run_cell
from foundation.comparing.figure import comparison_figure
from foundation.comparing.plan import Comparison, load
from foundation.comparing.results import Results, Value, collect, rank_correlation
from foundation.comparing.table import caption, cell, to_markdown
from foundation.config import Config, config_hash
from foundation.errors import CheckpointError, ConfigError
from foundation.evaluation.scores import score
from foundation.training.run import train
from shards.errors import DataError

ROWS = "[{name: SAR-JEPA, published: 70.3}, {name: Pixels (raw), overrides: [objective.name=lomar-sar]}]"


@pytest.fixture
def compared(tmp_path: Path, tiny_yaml: Path) -> Callable[..., Path]:
    """`compared(rows="...", more="...")` → the file of a comparison of two tiny rows and two seeds."""

    def write(rows: str = ROWS, more: str = "") -> Path:
        path = tmp_path / "compared.yaml"
        path.write_text(
            f"name: pair\nconfig: {tiny_yaml.name}\nseeds: [0, 3]\nrows: {rows}\n"
            f"evaluate: {{protocols: [knn, fewshot], shots: [2, 3], draws: 2}}\n{more}"
        )
        return path

    return write


def scored(comparison: Comparison, values: dict[str, list[float]], **settings: Any) -> None:
    """Write the marks and scores of cells as if they had been run: one value per seed, of 100 test images."""
    import torch

    y = torch.zeros(100, dtype=torch.int64)
    for c in comparison.cells:
        value = values[c.row][comparison.spec.seeds.index(c.seed)]
        wrong = torch.arange(100) >= round(100 * value)
        controls = {"random-init": 0.10 + c.seed / 100, "background only": 0.2}
        scores = [score("pretrained", "knn", "accuracy", y, [wrong.long()], (0,), settings)]
        scores += [
            score(n, "knn", "accuracy", y, [(torch.arange(100) >= round(100 * v)).long()], (0,), settings)
            for n, v in controls.items()
        ]
        c.config.run_folder.mkdir(parents=True, exist_ok=True)
        mark = judged(comparison, c) | {"scores": [asdict(s) for s in scores]}
        (c.config.run_folder / MARK).write_text(json.dumps(mark))


def test_cells_are_rows_times_seeds_in_folders_of_their_own(compared: Callable[..., Path], tmp_path: Path) -> None:
    found = load(compared(), ["optim.lr=1e-3"])
    assert [(c.row, c.seed, c.config.name) for c in found.cells] == [
        ("SAR-JEPA", 0, "sar-jepa-seed0"),
        ("SAR-JEPA", 3, "sar-jepa-seed3"),
        ("Pixels (raw)", 0, "pixels-raw-seed0"),
        ("Pixels (raw)", 3, "pixels-raw-seed3"),
    ]
    assert {c.config.optim.lr for c in found.cells} == {1e-3}
    assert [c.config.seed for c in found.cells] == [0, 3, 0, 3]
    assert found.folder == tmp_path / "runs" / "pair"
    assert found.differing == ("objective.name",)


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        (
            "[{name: A}, {name: B, overrides: [train.samples=64]}]",
            "",
            r"the rows do not share one budget: train\.samples: \d+ \(A\), 64 \(B\)",
        ),
        ("[{name: A}, {name: B, overrides: [model.size=tiny]}]", "", r"model\.size: nano \(A\), tiny \(B\)"),
        ("[{name: A}, {name: B, overrides: [objective.name=nothing]}]", "", "row B: Found 1 error"),
        ("[{name: A}]", "", r"rows = \[.*\]: list of at least 2 times a section of keys"),
        ("[{name: A b}, {name: a-B}]", "", "twice: a-b"),
        (ROWS, "seed: 3", "seed = 3: no such key; did you mean seeds"),
        (ROWS, "differs: 3", "differs"),
        (ROWS, "differs: [mod, optim.learning_rate]", "`differs` names no key: mod, optim.learning_rate"),
    ],
)
def test_what_is_not_a_fair_comparison_is_refused(
    compared: Callable[..., Path], rows: str, more: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(compared(rows, more))


def test_a_difference_that_is_named_is_allowed_and_told(compared: Callable[..., Path]) -> None:
    rows = "[{name: A}, {name: B, overrides: [optim.lr=3e-3, objective.mask_ratio=0.5]}]"
    found = load(compared(rows, "differs: [optim.lr]"))
    assert found.differing == ("objective.mask_ratio", "optim.lr")
    scored(found, {"A": [0.5, 0.6], "B": [0.7, 0.7]})
    told = to_markdown(found, collect(found))
    assert (
        "Rows differ in objective.mask_ratio, optim.lr, and in nothing else; so not in task alone, but in optim.lr"
        in told
    )


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


def test_values_are_means_over_seeds_and_differences_are_paired(compared: Callable[..., Path], tmp_path: Path) -> None:
    found = load(compared())
    scored(found, {"SAR-JEPA": [0.50, 0.60], "Pixels (raw)": [0.42, 0.51]})
    results = collect(found)
    first, second = results.rows["SAR-JEPA"][0], results.rows["Pixels (raw)"][0]
    assert first.mean == pytest.approx(0.55)
    assert first.difference is None
    assert second.values == (0.42, 0.51)
    assert second.difference is not None
    mean, low, high = second.difference
    assert mean == pytest.approx(-0.085)
    half = 12.706 * math.sqrt(2 * 0.005**2) / math.sqrt(2)  # t of one degree of freedom, deviation of (-0.08, -0.09)
    assert (low, high) == (pytest.approx(-0.085 - half, abs=1e-4), pytest.approx(-0.085 + half, abs=1e-4))
    assert results.controls["random-init"][0].values == (0.10, 0.13)
    assert results.controls["background only"][0].values == (0.2,)
    text = to_markdown(found, results)
    assert "| SAR-JEPA | 55.0 ± " in text
    assert "| *background only* | 20.0 |" in text
    assert comparison_figure(results, tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(json.dumps(results.facts))["seeds"] == [0, 3]


def test_a_row_with_another_network_has_an_untrained_encoder_of_its_own(compared: Callable[..., Path]) -> None:
    found = load(compared())
    scored(found, {"SAR-JEPA": [0.50, 0.60], "Pixels (raw)": [0.42, 0.51]})
    for c in found.of("Pixels (raw)"):
        mark = json.loads((c.config.run_folder / MARK).read_text())
        for row in mark["scores"]:
            row["mean"] = 0.3 if row["encoder"] == "random-init" else row["mean"]
        (c.config.run_folder / MARK).write_text(json.dumps(mark))
    results = collect(found)
    assert [v.values for v in results.controls["random-init"]] == [(0.10, 0.13)]
    assert [v.values for v in results.controls["random-init of Pixels (raw)"]] == [(0.3, 0.3)]
    assert results.rows["Pixels (raw)"][0].untrained == pytest.approx(0.3)


def test_scores_of_other_evaluations_do_not_enter(compared: Callable[..., Path]) -> None:
    found = load(compared())
    scored(found, {"SAR-JEPA": [0.50, 0.60], "Pixels (raw)": [0.42, 0.51]})
    for c in found.cells:  # a later evaluation by hand
        (c.config.run_folder / "scores.json").write_text("[]")
    assert collect(found).rows["SAR-JEPA"][0].values == (0.50, 0.60)


def test_cells_judged_on_different_images_are_not_put_into_one_table(compared: Callable[..., Path]) -> None:
    found = load(compared())
    scored(found, {"SAR-JEPA": [0.50, 0.60], "Pixels (raw)": [0.42, 0.51]}, data="corpora aaaa", train_data="b" * 64)
    mark = found.cells[0].config.run_folder / MARK
    mark.write_text(mark.read_text().replace("aaaa", "cccc"))
    with pytest.raises(DataError, match=r"judged on different images: corpora aaaa, train bbbbbbbb; corpora cccc"):
        collect(found)


def test_a_leak_stands_above_the_numbers(compared: Callable[..., Path], tmp_path: Path) -> None:
    found = load(compared())
    leak = {"verdict": "leaked", "sentence": "3 of the test images were learnt"}
    scored(found, {"SAR-JEPA": [0.50, 0.60], "Pixels (raw)": [0.42, 0.51]}, leakage=leak, shared_groups=2)
    results = collect(found)
    assert caption(found, results)[:2] == [
        "WARNING: 3 of the test images were learnt.",
        "WARNING: train and test share 2 groups.",
    ]
    comparison_figure(results, tmp_path / "figure.png")


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        ((0.02, 0.01, 0.03), "(+2.0, better)"),
        ((-0.02, -0.03, -0.01), "(-2.0, worse)"),
        ((0.02, -0.01, 0.05), "(+2.0)"),
    ],
)
def test_a_verdict_needs_an_interval_without_zero(difference: tuple[float, float, float], words: str) -> None:
    assert cell(Value("B", "knn", 0.5, 0.4, 0.6, (0.5, 0.5, 0.5), difference)) == f"50.0 ± 10.0 {words}"
    two = cell(Value("B", "knn", 0.5, 0.4, 0.6, (0.5, 0.5), difference))
    assert two == f"50.0 ± 10.0 ({100 * difference[0]:+.1f})"  # two seeds are too few for a verdict
    assert cell(Value("B", "knn", math.nan, math.nan, math.nan, ())) == "-"


def test_ranks_are_put_beside_published_ones_where_there_are_four(compared: Callable[..., Path]) -> None:
    rows = "[" + ", ".join(f"{{name: R{i}, published: {70 - i}}}" for i in range(4)) + ", {name: other}]"
    found = load(compared(rows))

    def results(means: list[float]) -> Results:
        values = {f"R{i}": [Value(f"R{i}", "knn", m, m, m, (m,))] for i, m in enumerate(means)}
        return Results(("knn",), values, {}, {}, (), (), (), collect(found).facts)

    assert rank_correlation(found, results([0.4, 0.3, 0.2, 0.1]), "knn") == (1.0, 4)
    assert rank_correlation(found, results([0.4, 0.3, 0.2]), "knn") is None
    lines = caption(found, results([0.1, 0.2, 0.3, 0.4]))
    assert any(
        re.search(r"Spearman's correlation of knn with the published column: -1\.00 over 4 rows", x) for x in lines
    )


def test_the_command_lists_runs_one_cell_and_collects(
    compared: Callable[..., Path], command: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = compared()
    listed = command("compare", path, "--list")
    assert "sbatch --array=0-3 --requeue --signal=USR2@300 --open-mode=append --wrap" in " ".join(listed.out.split())
    assert "no run is finished" in command("compare", path, "--collect").out
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    assert "there is no cell 7" in command("compare", path).err
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    found = load(path)
    scored(found, {"SAR-JEPA": [0.50, 0.60], "Pixels (raw)": [0.42, 0.51]})
    done = command("compare", path)
    assert done.code in (0, None)
    assert "4 of 4 runs are finished" in done.out
    assert (found.folder / "comparison.md").exists()
    assert (found.folder / "comparison.png").exists()
