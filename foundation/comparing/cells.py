"""A cell is a training and its scores: goes on where it was stopped, is not done again, and never by two at once."""

from __future__ import annotations

import hashlib
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
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from foundation import signals
from foundation.comparing.plan import Cell, Comparison
from foundation.config import Config, config_hash, flatten, load
from foundation.errors import CheckpointError, ConfigError, LaunchError
from foundation.files import read_json, write_whole
from foundation.training.lock import owned

MARK, LOG, LOCK = "judged.json", "cell.log", ".cell.lock"
LAST_LINES = 12  # of the log of a cell that failed
BUSY = 75  # exit code, that of sysexits.h for what another time will do
MACHINE = ("run_root", "tracking.", "train.threads", "train.patience", "data.workers", "data.cache")
"""Keys, and beginnings of keys, that say where a cell runs and who is told: a cell stays what it is without them."""


class Busy(LaunchError):
    """Another process works on this cell."""


class Outcome(NamedTuple):
    """What became of a cell: its number, whether it is finished, how long it took, and its last lines if it is not.

    `busy`: it was left to another process.
    """

    number: int
    finished: bool
    seconds: float
    lines: str = ""
    busy: bool = False


def finished(comparison: Comparison, cell: Cell) -> bool:
    """Whether the run of this very configuration has been judged as the comparison asks."""
    path, asked = cell.config.run_folder / MARK, judged(comparison, cell)
    if not path.exists():
        return False
    mark = read_json(path)
    if mark.get("config") == config_hash(cell.config):  # older marks name the whole configuration
        mark["config"] = asked["config"]
    return bool(mark.items() >= asked.items())


def judged(comparison: Comparison, cell: Cell) -> dict[str, Any]:
    """What the mark of a finished cell says, beside its scores: the run and how it was judged."""
    return {"config": _identity(cell.config), "evaluate": comparison.spec.evaluate.model_dump(mode="json")}


def _identity(config: Config) -> str:
    """The first 12 hex digits of the sha256 of what decides."""
    text = json.dumps(_decisive(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _decisive(config: Config) -> dict[str, Any]:
    """The keys that decide what a cell is."""
    return {key: value for key, value in flatten(config).items() if not key.startswith(MACHINE)}


def run_cell(comparison: Comparison, number: int, device: str | None = None) -> Path:
    """Train and judge one cell in this process; returns its run folder.

    Asked to stop, the training saves and raises Stopped; the evaluation, which starts anew, raises signals.Requested.
    Raises ConfigError for a number out of range, Busy, StorageError, and what training and evaluation raise.
    """
    if not 0 <= number < len(comparison.cells):
        what = f"there is no cell {number}: this comparison has {len(comparison.cells)}, counted from 0"
        raise ConfigError(what, where="--cell", do="`--list` shows them")
    cell = comparison.cells[number]
    folder = cell.config.run_folder
    if finished(comparison, cell):
        return folder
    with ExitStack() as held:
        try:
            held.enter_context(owned(folder, LOCK))
        except LaunchError as error:
            what = "another process works on this cell"
            raise Busy(what, where=str(folder), do="wait for it; then --collect makes the table") from error
        return folder if finished(comparison, cell) else _run(comparison, number, device)


def _run(comparison: Comparison, number: int, device: str | None) -> Path:
    """Train a cell that nobody else works on, and judge it."""
    from foundation.training.run import train

    cell = comparison.cells[number]
    _refuse_another(cell)
    run = train(cell.config)
    tried = run / ".judging"
    try:
        with signals.at_once():
            _judge(comparison, number, run, device)
    except signals.Requested:
        if tried.exists():  # without an end to it, a time limit that is too short would bring it back for ever
            tried.unlink()
            raise LaunchError(
                "the evaluation, which starts anew each time, was asked to stop a second time",
                where=str(run),
                do="give it more time (sbatch --time), or fewer protocols, shots or draws",
            ) from None
        tried.touch()
        raise
    tried.unlink(missing_ok=True)
    return run


def _judge(comparison: Comparison, number: int, run: Path, device: str | None) -> None:
    """Score the run of a cell as the comparison asks, and mark it."""
    import torch

    from foundation.evaluation.protocols import Options
    from foundation.evaluation.runs import judge_run

    cell, how = comparison.cells[number], comparison.spec.evaluate
    data = how.data or cell.config.data.catalog[0]
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
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


def _refuse_another(cell: Cell) -> None:
    """A finished run of another configuration in this folder is not this cell. Raises CheckpointError."""
    kept = cell.config.run_folder / "config.yaml"
    if not kept.exists():
        return
    then, now = _decisive(load(kept)), _decisive(cell.config)  # keys newer than the run have their defaults
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
    others, and one that another process works on is left to it. Interrupted, the processes save their checkpoints and
    end.
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
    with open(log, "ab") as file:  # another process may write to it
        before = file.tell()
        process = start([*command, "--cell", str(number)], stdout=file, stderr=subprocess.STDOUT, env=environment)
        code = process.wait() if process else -signal.SIGTERM
    printed = log.read_bytes()[before:].decode(errors="replace").splitlines()
    lines = "" if code == 0 else "\n".join(printed[-LAST_LINES:])
    done = code == 0 and finished(comparison, cell)
    return Outcome(number, done, time.monotonic() - began, lines, busy=code == BUSY)


@contextmanager
def _children() -> Iterator[Callable[..., subprocess.Popen[bytes] | None]]:
    """A function that starts processes; they are asked to stop when the block is left by an exception or a signal.

    That is SIGTERM, and SIGHUP, which a terminal that is closed sends, unless it is ignored (nohup).
    """
    running: list[subprocess.Popen[bytes]] = []
    stopping, one_at_a_time = False, threading.Lock()  # no process begins unseen by the one that asks them to stop

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    mine = threading.current_thread() is threading.main_thread()
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if mine and signal.getsignal(n) != signal.SIG_IGN]
    before = [(number, signal.signal(number, stop)) for number in numbers]

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
        for number, handler in before:
            signal.signal(number, handler)


def _environment(slot: int, jobs: int) -> dict[str, str]:
    """A GPU of its own for each slot where there are any, else its share of the cores."""
    import torch

    environment = dict(os.environ)
    if gpus := torch.cuda.device_count():
        seen = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = seen if seen != [""] else [str(n) for n in range(gpus)]
        return environment | {"CUDA_VISIBLE_DEVICES": names[slot % gpus]}
    share = max(1, len(os.sched_getaffinity(0)) // jobs)  # of the cores that are ours, not of all there are
    return {"OMP_NUM_THREADS": str(share), **environment}


def command_line(path: Path, overrides: Sequence[str], device: str | None) -> list[str]:
    """The command that `run_all` gives a cell's number."""
    return [
        *(sys.executable, "-m", "foundation", "compare", str(path), *overrides),
        *(("--device", device) if device else ()),
    ]
