"""The fault campaign, small: each fault once or a few times; the whole one is a command (docs/results/faults.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import ROOT, finish, start

FAULTS = {
    "SIGKILL", "SIGTERM storm", "clock jump", "disk read-only", "corrupt shard", "cache deleted", "MLflow absent",
    "MLflow killed", "slow rank", "NaN on one rank",
}  # fmt: skip


@pytest.mark.slow
def test_runs_that_are_disturbed_in_any_way_end_as_if_they_were_not(tmp_path: Path) -> None:
    campaign = (str(ROOT / "tests" / "faults" / "campaign.py"),)
    code, output = finish(start("--kills", 5, "--out", tmp_path / "table.md", program=campaign), seconds=600)
    assert code == 0, output
    assert "BAD" not in output
    rows = [line.split(" | ") for line in (tmp_path / "table.md").read_text().splitlines()[2:]]
    seen = {row[0].removeprefix("| "): row[1:5] for row in rows}
    missing = {"disk full"} if "NOT RUN  disk full" in output else set()  # without root
    assert set(seen) == (FAULTS | {"disk full"}) - missing
    assert seen["SIGKILL"] == ["5", "5", "0", "0"]
    assert all(
        injected == survived and (samples, saved) == ("0", "0") for injected, survived, samples, saved in seen.values()
    )
