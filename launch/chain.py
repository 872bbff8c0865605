"""What follows when a job ends: done, again, or never again. Called by the batch script; standard library only.

    python -m launch.chain begin --run RUN --job ID                      # exit code 1: do not start
    python -m launch.chain end   --run RUN --job ID --status N [--lost]  # exit code of the job

Progress is the newest committed checkpoint. An attempt that a dead node or Slurm itself ends never says `end`, and
Slurm requeues such a job without asking, so attempts are counted when they begin: no loop is endless.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

STOPPED = 85
"""Exit code of a run that saved and stopped because it was asked to."""
LIMIT = 2
"""Attempts without progress, one after the other, after which a job is not started again."""
KEPT = 1000
FILE = "chain.json"
COMMITTED = "committed"
"""File of a run: the position of its newest checkpoint, wherever that is."""


class Decision(NamedTuple):
    """What follows, and why."""

    action: str
    """`start`, `done`, `requeue`, `stop` or `failed`."""
    reason: str


def newest(run: Path) -> int:
    """Samples seen by the newest committed checkpoint; 0 without one.

    The run says so in a file; a folder of checkpoints is looked at as well, since a run may die between the two.
    """
    noted = [file.read_text(encoding="utf-8", errors="replace").strip() for file in run.glob(COMMITTED)]
    found = [file.parent.name.partition("-")[2] for file in (run / "checkpoints").glob("samples-*/COMMIT")]
    return max((int(text) for text in (*noted, *found) if text.isdecimal()), default=0)


def begin(state: dict[str, Any], job: str, position: int) -> Decision:
    """Count an attempt, and the one before when it never came to its end; changes `state`."""
    if state.get("job") != job:  # somebody submitted it again: that is a decision, not a loop
        state.update(job=job, attempt=0, idle=0, began=None)
    if state["began"] is not None:
        _close(state, position)
    if state["idle"] >= LIMIT:
        return Decision("stop", f"{LIMIT} attempts without progress")
    state["attempt"] += 1
    state["began"] = position
    return Decision("start", f"attempt {state['attempt']}")


def end(state: dict[str, Any], position: int, status: int, lost: bool) -> Decision:
    """What follows an attempt that ended with this exit status; `lost`: a node did not answer. Changes `state`."""
    _close(state, position)
    if status == 0:
        return Decision("done", "finished")
    if status != STOPPED and not lost:
        return Decision("failed", f"exit status {status}")
    why = "a node is lost" if lost else "stopped on request"
    if state["idle"] >= LIMIT:
        return Decision("stop", f"{why}; {LIMIT} attempts without progress")
    return Decision("requeue", why)


def _close(state: dict[str, Any], position: int) -> None:
    state["idle"] = 0 if position > state["began"] else state["idle"] + 1
    state["began"] = None


def read(run: Path) -> dict[str, Any]:
    """The state of the chain of a run. Raises ValueError when the file is not one."""
    try:
        text = (run / FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return {"history": []}
    state = json.loads(text)
    if not isinstance(state, dict) or not isinstance(state.get("history"), list):
        raise ValueError("not the state of a chain")
    return state


def write(run: Path, state: dict[str, Any], line: str) -> None:
    """Save the state with one more line of its history: whole, or not at all."""
    print(f"chain: {line}", flush=True)
    now = time.strftime("%Y-%m-%d %H:%M:%S%z")
    state["history"] = [*state["history"], f"{now} job {state['job']}: {line}"][-KEPT:]
    temporary = run / f".{FILE}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(state, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(run / FILE)


def job_state(job: str) -> str:
    """What Slurm says of a job, e.g. RUNNING; empty when it does not answer."""
    asked = subprocess.run(["scontrol", "-o", "show", "job", job], capture_output=True, text=True, check=False)
    return asked.stdout.partition(" JobState=")[2].partition(" ")[0]


def requeue(job: str) -> str:
    """Put a running job back into the queue; why not, if not.

    A job that was cancelled still runs this, and a requeue would raise it from the dead; one that Slurm itself has put
    back needs none.
    """
    state = job_state(job)
    if state != "RUNNING":
        return f"Slurm has ended the job itself ({state or 'unknown'})"
    asked = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    return asked.stderr.strip() if asked.returncode else ""


def main(arguments: list[str] | None = None) -> int:
    """Exit code of `begin` (0: start) or of the job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("when", choices=["begin", "end"])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--job", required=True)
    parser.add_argument("--status", type=int, default=0)
    parser.add_argument("--lost", action="store_true")
    given = parser.parse_args(arguments)
    position = newest(given.run)
    try:
        state = read(given.run)
        if given.when == "begin":
            decision = begin(state, given.job, position)
        else:
            decision = end(state, position, given.status, given.lost)
    except (ValueError, KeyError, TypeError) as error:
        print(f"chain: {given.run / FILE} cannot be used ({error!r}); delete it to start anew", file=sys.stderr)
        return 1
    write(given.run, state, f"{decision.action} at {position} samples: {decision.reason}")
    if decision.action != "requeue":
        return {"start": 0, "done": 0}.get(decision.action, given.status or 1)
    refusal = requeue(given.job)
    if refusal:
        write(given.run, state, f"not requeued here: {refusal}")
    return given.status if refusal else 0


if __name__ == "__main__":
    sys.exit(main())
