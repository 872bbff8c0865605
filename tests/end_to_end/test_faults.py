"""The fault campaign, small: each fault once, but for kills; the whole one is a command (docs/results/faults.md)."""

from __future__ import annotations

import importlib
from contextlib import suppress
from pathlib import Path

import pytest
from processes import ROOT, finish, start, wait

CAMPAIGN = (str(ROOT / "tests" / "faults" / "campaign.py"),)
KILLS = 5
ONCE = ("SIGTERM storm", "clock jump", "disk full", "disk read-only", "corrupt shard", "cache deleted")
ONCE += ("MLflow absent", "MLflow killed", "slow rank", "NaN on one rank")


@pytest.mark.slow
def test_runs_that_are_disturbed_in_any_way_end_as_if_they_were_not(tmp_path: Path) -> None:
    code, output = finish(start("--kills", KILLS, "--once", "--out", tmp_path / "table.md", program=CAMPAIGN), 600)
    assert code == 0, output
    assert "BAD" not in output
    rows = [line.split(" | ") for line in (tmp_path / "table.md").read_text().splitlines()[2:]]
    seen = {row[0].removeprefix("| "): tuple(map(int, row[1:5])) for row in rows}
    missing = {"disk full"} if "NOT RUN  disk full" in output else set()  # without root
    expected = {"SIGKILL": (KILLS, KILLS, 0, 0), **dict.fromkeys({*ONCE} - missing, (1, 1, 0, 0))}
    assert seen == expected


@pytest.mark.slow
def test_a_fault_that_meets_a_finished_run_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests" / "faults")
    faults, runs = importlib.import_module("campaign"), importlib.import_module("runs")
    monkeypatch.setattr(faults.training, "publish", lambda *_: None)
    fault = runs.Fault("SIGKILL", lambda child, _: child.end() or child.send(9), -9, lambda *_: "killed")
    trial = faults.Campaign(tmp_path, 0).trial(fault)
    assert (trial.code, trial.struck, trial.survived, trial.good) == (0, False, True, False)
    assert trial.late == faults.TRIES - 1
    assert faults.table([trial]).splitlines()[-1].startswith("| SIGKILL | 0 | 0 | 0 | 0 |")


def mentioning(text: str) -> list[str]:
    """Command lines of processes that name this."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            found.append(file.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in found if text in line]


@pytest.mark.slow
def test_a_campaign_that_is_told_to_stop_leaves_no_server_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    process = start("--only", "tracking", program=CAMPAIGN)
    wait(process, lambda: bool(mentioning(f"{tmp_path}/")), 300)
    process.terminate()
    code, output = finish(process)
    assert code == 143, output
    assert mentioning(f"{tmp_path}/") == []
    assert list(tmp_path.iterdir()) == []
