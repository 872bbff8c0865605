"""What follows when a job ends: done, again, or never again. Called by the batch script.

    python3 -I chain.py begin --run RUN --job ID                      # exit code 1: do not start
    python3 -I chain.py end   --run RUN --job ID --status N [--lost]  # exit code of the job

Outside a container this runs with the Python of the host: standard library only, and nothing that Python 3.6 does not
know, which is why annotations stand in quotes.

Progress is the newest committed checkpoint. An attempt that a dead node or Slurm itself ends never says `end`, and
Slurm requeues such a job without asking, so attempts are counted when they begin: no loop is endless.
"""

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


def begin(state: "dict[str, Any]", job: str, position: int) -> Decision:
    """Count an attempt, and the one before when it never came to its end; changes `state`."""
    mine = _own(state, job)
    if mine["began"] is not None:
        _close(mine, position)
    if mine["idle"] >= LIMIT:
        return Decision("stop", f"{LIMIT} attempts without progress")
    mine["attempt"] += 1
    mine["began"] = position
    return Decision("start", f"attempt {mine['attempt']}")


def end(state: "dict[str, Any]", job: str, position: int, status: int, lost: bool) -> Decision:
    """What follows an attempt that ended with this exit status; `lost`: a node did not answer. Changes `state`."""
    mine = _own(state, job)
    _close(mine, position)
    if status == 0:
        return Decision("done", "finished")
    if status != STOPPED and not lost:
        return Decision("failed", f"exit status {status}")
    why = "a node is lost" if lost else "stopped on request"
    if mine["idle"] >= LIMIT:
        return Decision("stop", f"{why}; {LIMIT} attempts without progress")
    return Decision("requeue", why)


def _own(state: "dict[str, Any]", job: str) -> "dict[str, Any]":
    """The counters of a job. One that somebody submitted again has its own: that is a decision, not a loop."""
    own: dict[str, Any] = state.setdefault("jobs", {}).setdefault(job, {"attempt": 0, "idle": 0, "began": None})
    return own


def _close(mine: "dict[str, Any]", position: int) -> None:
    """An attempt whose beginning is not known, since somebody deleted the state meanwhile, counts as idle."""
    mine["idle"] = 0 if mine["began"] is not None and position > mine["began"] else mine["idle"] + 1
    mine["began"] = None


def rival(state: "dict[str, Any]", job: str) -> str:
    """Another job that trains this run now; empty without one.

    The dependency of the job script holds a second job back, but whoever sends it can take that away.
    """
    begun = (other for other, its in state["jobs"].items() if other != job and its["began"] is not None)
    return next((other for other in begun if job_state(other) in ("RUNNING", "SUSPENDED")), "")


def read(run: Path) -> "dict[str, Any]":
    """The state of the chain of a run. Raises ValueError when the file is not one."""
    try:
        text = (run / FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return {"history": [], "jobs": {}}
    state = json.loads(text)
    if not isinstance(state, dict) or not isinstance(state.get("history"), list):
        raise ValueError("not the state of a chain")
    if not isinstance(state.setdefault("jobs", {}), dict):
        raise ValueError("no counters of jobs")
    return state


def write(run: Path, state: "dict[str, Any]", job: str, line: str) -> None:
    """Save the state with one more line of its history: whole, or not at all."""
    print(f"chain: {line}", flush=True)
    now = time.strftime("%Y-%m-%d %H:%M:%S%z")
    state["history"] = [*state["history"], f"{now} job {job}: {line}"][-KEPT:]
    temporary = run / f".{FILE}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(state, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(run / FILE)


def job_state(job: str) -> str:
    """What Slurm says of a job, e.g. RUNNING; empty when it does not answer."""
    return _scontrol("-o", "show", "job", job).stdout.partition(" JobState=")[2].partition(" ")[0]


def requeue(job: str) -> str:
    """Put a running job back into the queue; why not, if not.

    A job that was cancelled still runs this, and a requeue would raise it from the dead; one that Slurm itself has put
    back needs none.
    """
    state = job_state(job)
    if state != "RUNNING":
        return f"Slurm has ended the job itself ({state or 'unknown'})"
    asked = _scontrol("requeue", job)
    return asked.stderr.strip() if asked.returncode else ""


def _scontrol(*words: str) -> "subprocess.CompletedProcess[str]":
    """In ASCII: a job may name a path in any encoding, and Python 3.6 prints nothing else without a locale."""
    pipe = subprocess.PIPE  # capture_output is of Python 3.7
    command = ["scontrol", *words]
    return subprocess.run(command, stdout=pipe, stderr=pipe, encoding="ascii", errors="backslashreplace", check=False)


def main(arguments: "list[str] | None" = None) -> int:
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
        other = rival(state, given.job) if given.when == "begin" else ""
        if other:  # the file is that job's, which may write it at this moment
            todo = f"wait for it, or end it: scancel {other}"
            print(f"chain: not started: job {other} trains {given.run} at this moment; {todo}", file=sys.stderr)
            return 1
        if given.when == "begin":
            decision = begin(state, given.job, position)
        else:
            decision = end(state, given.job, position, given.status, given.lost)
    except (ValueError, KeyError, TypeError) as error:
        print(f"chain: {given.run / FILE} cannot be used ({error!r}); delete it to start anew", file=sys.stderr)
        return 1
    write(given.run, state, given.job, f"{decision.action} at {position} samples: {decision.reason}")
    if decision.action != "requeue":
        return {"start": 0, "done": 0}.get(decision.action, given.status or 1)
    refusal = requeue(given.job)
    if refusal:
        write(given.run, state, given.job, f"not requeued here: {refusal}")
    return given.status if refusal else 0


if __name__ == "__main__":
    sys.exit(main())
