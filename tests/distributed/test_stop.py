"""One process learns of a request to stop; all save the same update."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import signalled_runs
from groups import group
from processes import TINY, hashes

from foundation.training import checkpoint

RUNS = 20


@pytest.mark.slow
def test_a_signal_to_one_process_at_any_moment_stops_all_at_the_same_update(tmp_path: Path, catalog: Path) -> None:
    yaml = tmp_path / "tiny.yaml"
    yaml.write_text(TINY.format(root=tmp_path, catalog=catalog))
    code, output = group(2, signalled_runs.main, yaml, RUNS, seconds=300)
    assert code == 0, output[-4000:]
    positions = []
    for number in range(RUNS):
        run = tmp_path / "runs" / f"run-{number}"
        notes = [(run / f"stopped-{rank}").read_text().partition(" ") for rank in (0, 1)]
        (position, _, one), (other_position, _, other) = notes
        assert position == other_position
        assert "asked on another process" in (one, other)
        assert {one, other} & {"SIGTERM", "SIGUSR2"}
        newest, skipped = checkpoint.latest(run)
        assert newest is not None
        assert (newest.name, skipped) == (f"samples-{int(position):012d}", [])
        assert json.loads((newest / "state.json").read_text())["position"] == int(position)
        assert hashes(run)[-1][0] == int(position)
        positions.append(int(position))
    assert len(set(positions)) > 5  # the moments differed
