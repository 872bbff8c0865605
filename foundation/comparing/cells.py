"""A cell is a training and its scores. Both go on where they were stopped; what is finished is not done again."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from foundation import signals
from foundation.comparing.plan import Cell, Comparison
from foundation.config import config_hash, flatten, load
from foundation.errors import CheckpointError, ConfigError
from foundation.files import read_json, write_whole

MARK, LOG = "judged.json", "cell.log"
LAST_LINES = 12  # of the log of a cell that failed


class Outcome(NamedTuple):
    """What became of a cell: its number, whether it is finished, how long it took, and its last lines if it failed."""

    number: int
    finished: bool
    seconds: float
    lines: str = ""


def finished(comparison: Comparison, cell: Cell) -> bool:
    """Whether the run of this very configuration has been judged as the comparison asks."""
    mark = cell.config.run_folder / MARK
    return mark.exists() and read_json(mark).items() >= judged(comparison, cell).items()


def judged(comparison: Comparison, cell: Cell) -> dict[str, Any]:
    """What the mark of a finished cell says, beside its scores: the run and how it was judged."""
    return {"config": config_hash(cell.config), "evaluate": comparison.spec.evaluate.model_dump(mode="json")}


def run_cell(comparison: Comparison, number: int, device: str | None = None) -> Path:
    """Train and judge one cell in this process; returns its run folder.

    Asked to stop, the training saves and raises Stopped; the evaluation, which starts anew, raises signals.Requested.
    Raises ConfigError for a number out of range, and what training and evaluation raise.
    """
    if not 0 <= number < len(comparison.cells):
        what = f"there is no cell {number}: this comparison has {len(comparison.cells)}, counted from 0"
        raise ConfigError(what, where="--cell", do="`--list` shows them")
    cell = comparison.cells[number]
    if finished(comparison, cell):
        return cell.config.run_folder
    import torch

    from foundation.evaluation.protocols import Options
    from foundation.evaluation.runs import judge_run
    from foundation.training.run import train

    _refuse_another(cell)
    run = train(cell.config)
    how = comparison.spec.evaluate
    data = how.data or cell.config.data.catalog[0]
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with signals.at_once():
        scores = judge_run(
            run,
            data,
            ",".join(how.protocols),
            Options(how.mode, how.recipe, how.shots, range(how.draws)),
            allow_shared_groups=True,  # marked; a refusal would come after the training
            crop=how.crop,
            device=where,
            controls=number == 0,  # the same in every cell
            report=False,  # the training has drawn one
        )
    mark = judged(comparison, cell) | {"scores": [asdict(score) for score in scores]}
    write_whole(run / MARK, json.dumps(mark, indent=1))
    return run


def _refuse_another(cell: Cell) -> None:
    """A finished run of another configuration in this folder is not this cell. Raises CheckpointError."""
    kept = cell.config.run_folder / "config.yaml"
    if not kept.exists():
        return
    then, now = flatten(load(kept)), flatten(cell.config)  # keys newer than the run have their defaults
    if changed := [key for key in now if then[key] != now[key]]:
        raise CheckpointError(
            f"the folder of this cell holds a run with other values of: {', '.join(changed)}",
            where=str(cell.config.run_folder),
            do="move it away, or give the comparison another name",
        )


def run_all(
    comparison: Comparison, command: Sequence[str], jobs: int, done: Callable[[Outcome], None]
) -> list[Outcome]:
    """Run every cell that is not finished, `jobs` at a time, each `command --cell K` in a process of its own.

    With GPUs each job has one of them in turn; without, the cores are shared out. A cell that fails does not stop the
    others. Interrupted, the processes save their checkpoints and end.
    """
    waiting = [n for n, cell in enumerate(comparison.cells) if not finished(comparison, cell)]
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(jobs):
        slots.put(slot)
    found: list[Outcome] = []
    with ThreadPoolExecutor(jobs) as pool, _children() as start:  # in this order: no cell begins after an interruption

        def one(number: int) -> Outcome:
            slot = slots.get()
            try:
                return _spawn(comparison, number, command, _environment(slot, jobs), start)
            finally:
                slots.put(slot)

        for future in as_completed([pool.submit(one, number) for number in waiting]):
            found.append(future.result())
            done(found[-1])
    return found


def _spawn(
    comparison: Comparison,
    number: int,
    command: Sequence[str],
    environment: dict[str, str],
    start: Callable[..., subprocess.Popen[bytes] | None],
) -> Outcome:
    """One cell in a process whose output goes to its log."""
    cell, began = comparison.cells[number], time.monotonic()
    log = cell.config.run_folder / LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as file:
        process = start([*command, "--cell", str(number)], stdout=file, stderr=subprocess.STDOUT, env=environment)
        code = process.wait() if process else -signal.SIGTERM
    lines = "" if code == 0 else "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
    return Outcome(number, code == 0 and finished(comparison, cell), time.monotonic() - began, lines)


@contextmanager
def _children() -> Iterator[Callable[..., subprocess.Popen[bytes] | None]]:
    """A function that starts processes; when the block is left by an exception or SIGTERM they are asked to stop."""
    running: list[subprocess.Popen[bytes]] = []
    stopping, one_at_a_time = False, threading.Lock()  # no process begins unseen by the one that asks them to stop

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    mine = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if mine else None

    def start(command: Sequence[str], **how: Any) -> subprocess.Popen[bytes] | None:
        with one_at_a_time:
            if stopping:
                return None
            # A session of its own: an interruption by hand reaches this process alone, which asks the others to save.
            running.append(process := subprocess.Popen(command, start_new_session=True, **how))
            return process

    try:
        yield start
    except BaseException:
        with one_at_a_time:
            stopping = True
        for process in running:
            process.send_signal(signal.SIGTERM)
        raise
    finally:
        if mine:
            signal.signal(signal.SIGTERM, before)


def _environment(slot: int, jobs: int) -> dict[str, str]:
    """A GPU of its own for each slot where there are any, else its share of the cores."""
    import torch

    environment = dict(os.environ)
    if gpus := torch.cuda.device_count():
        seen = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = seen if seen != [""] else [str(n) for n in range(gpus)]
        return environment | {"CUDA_VISIBLE_DEVICES": names[slot % gpus]}
    share = max(1, (os.cpu_count() or 1) // jobs)
    return {"OMP_NUM_THREADS": str(share), **environment}


def command_line(path: Path, overrides: Sequence[str], device: str | None) -> list[str]:
    """The command that `run_all` gives a cell's number."""
    return [
        *(sys.executable, "-m", "foundation", "compare", str(path), *overrides),
        *(("--device", device) if device else ()),
    ]
