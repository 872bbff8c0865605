"""A chain of attempts ends, whatever happens to them; a node says how its processes ended."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import ROOT

from foundation import signals
from foundation.errors import LaunchError
from foundation.training.run import COMMITTED
from launch import chain, node


def test_the_chain_needs_no_package_nor_a_new_python_and_knows_the_code_of_a_stop() -> None:
    # What an old Python makes of it: test_submit.py, where there is one.
    tree = ast.parse(Path(chain.__file__).read_text(encoding="utf-8"), feature_version=(3, 6))
    found = {alias.name for each in ast.walk(tree) if isinstance(each, ast.Import) for alias in each.names}
    found |= {each.module or "" for each in ast.walk(tree) if isinstance(each, ast.ImportFrom)}
    assert {name.split(".")[0] for name in found} <= set(sys.stdlib_module_names) - {"__future__", "dataclasses"}
    assert chain.STOPPED == signals.STOPPED
    assert chain.COMMITTED == COMMITTED


def test_progress_is_the_newest_checkpoint_in_the_folder_or_as_the_run_noted_it(tmp_path: Path) -> None:
    assert chain.newest(tmp_path) == 0
    (tmp_path / COMMITTED).write_text("48\n")  # in a bucket
    assert chain.newest(tmp_path) == 48
    (tmp_path / "checkpoints" / "samples-000000000064").mkdir(parents=True)
    assert chain.newest(tmp_path) == 48
    (tmp_path / "checkpoints" / "samples-000000000064" / "COMMIT").touch()
    assert chain.newest(tmp_path) == 64


@pytest.mark.parametrize(
    ("idle", "gain", "status", "lost", "action"),
    [
        (0, 0, 0, False, "done"),
        (1, 0, 0, False, "done"),
        (0, 8, 85, False, "requeue"),
        (1, 8, 85, False, "requeue"),
        (0, 0, 85, False, "requeue"),
        (1, 0, 85, False, "stop"),
        (0, 8, 1, False, "failed"),
        (0, 8, 137, False, "failed"),
        (0, 8, 137, True, "requeue"),
        (0, 0, 1, True, "requeue"),
        (1, 0, 1, True, "stop"),
    ],
)
def test_what_follows_the_end_of_an_attempt(idle: int, gain: int, status: int, lost: bool, action: str) -> None:
    state = {"jobs": {"7": {"attempt": 3, "idle": idle, "began": 16}}}
    assert chain.end(state, "7", 16 + gain, status, lost).action == action


@given(st.lists(st.tuples(st.sampled_from([0, 0, 0, 8]), st.sampled_from(["stop", "lost", "killed"])), max_size=30))
def test_there_are_never_more_than_two_attempts_without_progress(attempts: list[tuple[int, str]]) -> None:
    state: dict[str, Any] = {}
    position, idle = 0, 0
    for gain, how in attempts:
        if chain.begin(state, "7", position).action == "stop":
            assert idle == chain.LIMIT
            break
        assert idle < chain.LIMIT
        position += gain
        idle = 0 if gain else idle + 1
        if how == "killed":  # the batch script was gone: nobody says `end`
            continue
        decision = chain.end(state, "7", position, chain.STOPPED if how == "stop" else 1, how == "lost")
        assert (decision.action == "stop") == (idle == chain.LIMIT)
        if decision.action == "stop":
            break


def test_a_new_submission_of_a_stopped_chain_starts_again() -> None:
    state: dict[str, Any] = {"jobs": {"7": {"attempt": 2, "idle": 2, "began": None}}}
    assert chain.begin(state, "7", 0).action == "stop"
    assert chain.begin(state, "8", 0).action == "start"


def test_two_jobs_of_a_run_count_each_for_itself_and_end_each_for_itself() -> None:
    state: dict[str, Any] = {}
    assert chain.begin(state, "7", 0).action == "start"
    assert chain.begin(state, "8", 0).action == "start"
    assert chain.end(state, "8", 0, 2, False).action == "failed"
    assert chain.end(state, "7", 0, chain.STOPPED, False).action == "requeue"
    assert chain.begin(state, "8", 0).action == "start"
    assert chain.begin(state, "7", 0) == chain.Decision("start", "attempt 2")
    assert chain.end(state, "7", 0, chain.STOPPED, False).action == "stop"


def test_a_job_whose_state_was_deleted_while_it_ran_goes_on_and_comes_to_an_end() -> None:
    state: dict[str, Any] = {}
    assert chain.end(state, "7", 8, chain.STOPPED, False).action == "requeue"
    assert chain.begin(state, "7", 8).action == "start"
    assert chain.end(state, "7", 8, chain.STOPPED, False).action == "stop"


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """`scontrol("RUNNING")`: the state of every job; returns the file of what was asked."""
    asked = tmp_path / "asked"

    def answers(state: str) -> Path:
        stub = tmp_path / "scontrol"
        stub.write_text(f"#!/bin/bash\necho $* >> {asked}; echo JobId=7 JobState={state} Reason=None\n")
        stub.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return asked

    return answers


@pytest.mark.parametrize(
    ("slurm", "code"), [("RUNNING", 1), ("SUSPENDED", 1), ("PENDING", 0), ("FAILED", 0), ("COMPLETING", 0)]
)
def test_a_second_job_does_not_start_and_changes_nothing_while_the_first_trains(
    tmp_path: Path, scontrol: Callable[[str], Path], capsys: pytest.CaptureFixture[str], slurm: str, code: int
) -> None:
    asked = scontrol(slurm)
    assert chain.main(["begin", "--run", str(tmp_path), "--job", "7"]) == 0
    before = (tmp_path / chain.FILE).read_text()
    assert chain.main(["begin", "--run", str(tmp_path), "--job", "8"]) == code
    assert asked.read_text() == "-o show job 7\n"
    assert (f"not started: job 7 trains {tmp_path} " in capsys.readouterr().err) == bool(code)
    assert ((tmp_path / chain.FILE).read_text() == before) == bool(code)


@pytest.mark.parametrize(
    ("slurm", "requeued", "code"), [("RUNNING", True, 0), ("COMPLETING", False, 85), ("CANCELLED", False, 85)]
)
def test_only_a_running_job_is_requeued(
    tmp_path: Path, scontrol: Callable[[str], Path], slurm: str, requeued: bool, code: int
) -> None:
    asked = scontrol(slurm)
    here = ["--run", str(tmp_path), "--job", "7"]
    assert chain.main(["begin", *here]) == 0
    (tmp_path / "checkpoints" / "samples-000000000016").mkdir(parents=True)
    (tmp_path / "checkpoints" / "samples-000000000016" / "COMMIT").touch()
    (tmp_path / "checkpoints" / "samples-000000000024").mkdir()  # not committed
    assert chain.main(["end", *here, "--status", "85"]) == code
    assert ("requeue 7" in asked.read_text().splitlines()) == requeued
    lines = [line.partition(" job 7: ")[2] for line in json.loads((tmp_path / chain.FILE).read_text())["history"]]
    assert lines[:2] == ["start at 0 samples: attempt 1", "requeue at 16 samples: stopped on request"]
    assert lines[2:] == ([] if requeued else [f"not requeued here: Slurm has ended the job itself ({slurm})"])


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"history": 3}', '{"history": [], "jobs": {"7": {}}}', '{"history": [], "jobs": []}']
)
def test_a_damaged_state_ends_the_chain_with_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / chain.FILE).write_text(text)
    assert chain.main(["begin", "--run", str(tmp_path), "--job", "7"]) == 1
    assert "delete it to start anew" in capsys.readouterr().err


# --- the task of a node


@pytest.mark.parametrize(
    ("codes", "code"),
    [([], 0), ([85], 85), ([85, 85], 85), ([85, -15], 85), ([-9, 85], 85), ([1, 85], 1), ([85, 3], 3), ([-9], 137)],
)
def test_the_exit_code_of_a_node_is_that_of_its_processes(codes: list[int], code: int) -> None:
    assert node.exit_code(codes) == code


def test_a_task_without_a_node_number_is_refused() -> None:
    with pytest.raises(LaunchError, match="this task does not know its node"):
        node.main(["torchrun"], {})


@pytest.mark.parametrize(
    ("launcher", "code"),
    [("torchrun --nproc-per-node=2", 85), ("torchrun", 3), ("accelerate --num_processes=1 --cpu", 85)],
)
def test_a_launcher_hands_on_why_its_processes_ended(tmp_path: Path, launcher: str, code: int) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(
        "import signal, sys\nassert signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN\n" + f"sys.exit({code})"
    )
    marker = tmp_path / "stopped"
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "SLURM_NODEID": "0", node.STOPPED_FILE: str(marker)}
    words = [*launcher.split(), "--rdzv_backend=static", "--master_port=0", str(script)]
    if "accelerate" in launcher:
        words.remove("--master_port=0")
    done = subprocess.run([sys.executable, "-m", "launch.node", *words], env=environ, capture_output=True, text=True)
    assert done.returncode == (0 if code == 85 else code), done.stderr
    assert marker.exists() == (code == 85)
