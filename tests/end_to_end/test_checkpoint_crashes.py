"""A run that dies at any point of a save, or at any moment, goes on from the newest checkpoint and leaves no trace."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from processes import finish, start

SCRIPT = str(Path(__file__).with_name("crashing.py"))
KILLS = 50
POINTS = [  # before each of these, in this order; more lie between them
    "os.mkdir .tmp-samples-000000000080",
    "open .tmp-samples-000000000080/tensors/00000-of-00001.safetensors",
    "fsync .tmp-samples-000000000080/tensors/00000-of-00001.safetensors",
    "open .tmp-samples-000000000080/tensors/index.json",
    "open .tmp-samples-000000000080/state.json",
    "open .tmp-samples-000000000080/manifest.json",
    "fsync .tmp-samples-000000000080/manifest.json",
    "open .tmp-samples-000000000080/COMMIT",
    "fsync .tmp-samples-000000000080/COMMIT",
    "os.rename .tmp-samples-000000000080",
    "open .tmp-latest",
    "os.rename .tmp-latest",
    "os.rename samples-000000000048",
    "os.remove COMMIT",
    "os.rename samples-000000000032",
    "os.rename samples-000000000016",
]


def crashing(tmp_path: Path, mode: str, config: Path, what: object) -> Any:
    """What the process that forks the runs has seen."""
    out = tmp_path / "seen.json"
    code, output = finish(start(mode, config, what, out, program=(SCRIPT,)), seconds=500)
    assert code == 0, output
    return json.loads(out.read_text())


@pytest.mark.slow
def test_a_death_at_any_point_of_a_save_costs_at_most_the_checkpoint_that_was_being_saved(
    tmp_path: Path, tiny_yaml: Path, finished: Path
) -> None:
    rows = crashing(tmp_path, "points", tiny_yaml, finished)
    seen = iter(row["point"].removeprefix("before ") for row in rows)
    assert [point for point in POINTS if point not in seen] == []
    new, old = "samples-000000000080", "samples-000000000064"
    for row in rows:
        point = row["point"]
        assert row["killed"] == -signal.SIGKILL, point
        assert old in row["committed"], point  # what was committed is there, whatever happened
        expected = new if new in row["committed"] + row["whole"] else old
        assert row["code"] == 0, row["text"]
        assert f"resumed from {expected} of single on 1 process(es)" in row["text"], point
        skipped = re.findall(r"skipped checkpoint (\S+): the save was interrupted", row["text"])
        assert skipped == [name for name in row["hidden"] if name[5:] not in row["whole"]], point
        assert row["record"], point
        assert row["state"], point
        assert row["left"] == ["latest", "samples-000000000080", "samples-000000000096"], point
    taken = {row["point"]: new in row["committed"] + row["whole"] for row in rows}
    assert not taken["before open .tmp-samples-000000000080/COMMIT"]
    assert taken["before fsync .tmp-samples-000000000080/COMMIT"]
    assert taken["before os.rename .tmp-latest"]


@pytest.mark.slow
def test_kills_at_random_moments_leave_no_trace(tmp_path: Path, tiny_yaml: Path) -> None:
    seen = crashing(tmp_path, "kills", tiny_yaml, KILLS)
    *killed, last = seen["lives"]
    assert [life["code"] for life in killed] == [-signal.SIGKILL] * KILLS
    assert last["code"] == 0, last["text"]
    assert seen["same"]
    assert seen["lines"] == 5 * (KILLS + 4)
    resumed = 0
    for life in seen["lives"]:
        found = re.search(r"resumed from (samples-\d+)", life["text"])
        if found and life["before"]:
            resumed += 1
            assert found[1] >= life["before"][0]  # nothing committed is passed over
    assert resumed > KILLS // 2
