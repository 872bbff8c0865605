"""A process that has imported the trainer and forks whole runs of it: a start costs what a run itself needs.

    python crashing.py points CONFIG FINISHED OUT     # a run dies before each file operation of a save in turn
    python crashing.py kills CONFIG COUNT OUT         # one run is killed at COUNT random moments

The runs are real: signals, threads, files and locks are those of `foundation train`. OUT gets what was seen, as JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the optimiser imports it, which takes longer than a run
from forked import ended, forked
from processes import interrupted, position, record, same_state

from foundation.config import load
from foundation.training import checkpoint, saving
from foundation.training import run as runs
from foundation.training.places import Folder

AT = 80  # the save that dies; 16, 32, 48 and 64 are committed before
SHORT = ("train.keep=2",)  # so that the save has three to remove
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def committed(run: Path) -> list[str]:
    return sorted(path.parent.name for path in (run / "checkpoints").glob("samples-*/COMMIT"))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


class Operations:
    """The file operations of the save at AT: noted, or ended by a kill before number `last`."""

    def __init__(self, last: int | None, half: str = "", note: Path | None = None) -> None:
        self.last, self.half, self.note = last, half, note
        self.seen: list[str] = []
        self.active = False

    def install(self) -> None:
        """In this process, for ever."""
        save, fsync, write = checkpoint.save, os.fsync, Folder.write

        def watched(location: Any, tensors: Any, state: Any, at: int, *rest: Any) -> Any:
            self.active = at == AT
            try:
                return save(location, tensors, state, at, *rest)
            finally:
                if self.active and self.note:
                    self.note.write_text(json.dumps(self.seen))
                self.active = False

        def flushed(descriptor: int) -> None:
            self.met("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        def halved(place: Folder, parts: Any) -> None:
            if self.active and place.name == self.half:
                data = b"".join(parts)
                place.path.parent.mkdir(exist_ok=True)
                place.path.write_bytes(data[: len(data) // 2])
                die()
            write(place, parts)

        saving.checkpoint.save = watched
        os.fsync = flushed
        Folder.write = halved  # type: ignore[method-assign]
        sys.addaudithook(self.audited)

    def audited(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            if not isinstance(path, str) or not (set(mode or "") & set("wxa+") or (flags or 0) & WRITING):
                return
            self.met("open", path)
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            self.met(event, str(arguments[0]))

    def met(self, what: str, path: str) -> None:
        if not self.active or threading.current_thread().name != "checkpoint":
            return
        self.seen.append(f"{what} {path.partition('/checkpoints/')[2] or path}")
        if self.last is not None and len(self.seen) > self.last:
            die()


class Points:
    """One copy of a finished run for every death."""

    def __init__(self, config: Path, finished: Path) -> None:
        self.config, self.finished = config, finished

    def start(self, name: str, operations: Operations | None) -> tuple[int, Path, str]:
        """Exit code, folder and output of a run, which goes on where the copy stands."""

        def prepare() -> None:
            runs.publish = lambda *_: None  # the report is the same with and without a death
            if operations:
                operations.install()

        made = load(self.config, [*SHORT, f"name={name}"])
        log = made.run_folder.parent / f"{name}.log"
        return ended(forked(made, log, prepare)), made.run_folder, log.read_text()

    def copy(self, name: str) -> None:
        """The run as it stood before the save at AT."""
        interrupted(self.finished, load(self.config, [f"name={name}"]).run_folder, AT - 16)

    def operations(self, note: Path) -> list[str]:
        """All of the save, in order; of those that every removal repeats, the first ones."""
        self.copy("noted")
        code, _, text = self.start("noted", Operations(None, note=note))
        assert code == 0, text
        return json.loads(note.read_text())

    def row(self, number: int, what: str, death: Operations) -> dict[str, Any]:
        """Die, look, and start again."""
        name = f"point-{number}"
        self.copy(name)
        code, run, text = self.start(name, death)
        row: dict[str, Any] = {"point": what, "killed": code, "committed": committed(run)}
        row["hidden"] = sorted(path.name for path in (run / "checkpoints").glob(".tmp-samples-*"))
        row["whole"] = [path.parent.name[5:] for path in (run / "checkpoints").glob(".tmp-samples-*/COMMIT")]
        code, run, text = self.start(name, None)
        row |= {"code": code, "text": text, "left": sorted(path.name for path in (run / "checkpoints").iterdir())}
        return row | {"record": record(run) == record(self.finished), "state": same_state(run, self.finished)}


def points(config: Path, finished: Path, out: Path) -> list[dict[str, Any]]:
    """Die before each operation, and in the middle of each file; then start again and go to the end."""
    made = Points(config, finished)
    operations = made.operations(out.with_suffix(".note"))
    deaths = [(k, what) for k, what in enumerate(operations) if what not in operations[:k]]
    rows = [(f"before {what}", Operations(k)) for k, what in deaths]
    halves = ("00000-of-00001.safetensors", "index.json", "state.json", "manifest.json", "COMMIT")
    rows += [(f"in {name}", Operations(None, half=name)) for name in halves]
    with multiprocessing.get_context("fork").Pool(2) as lanes:
        return lanes.starmap(made.row, [(number, *row) for number, row in enumerate(rows)], chunksize=1)


def kills(config: Path, count: int) -> dict[str, Any]:
    """Kill one run `count` times, go to the end, and compare it with one that nobody disturbed."""
    rng, lives = random.Random(0), []
    keys = (
        f"train.samples={40 * (count + 4)}",
        "train.keep=3",
        "monitor.every=48",
        "data.overlap=allow",
    )  # short lives
    whole, killed = (load(config, [*keys, f"name={name}"]) for name in ("whole", "killed"))
    run, log = killed.run_folder, killed.run_folder.parent / "killed.log"
    assert ended(forked(whole, whole.run_folder.parent / "whole.log")) == 0
    for number in range(count):
        goal = 40 * number + 8 * rng.randrange(5)
        before = committed(run)
        pid, began, early = forked(killed, log), time.monotonic(), number % 5 == 4
        moment = rng.uniform(0, 0.6)
        while time.monotonic() < began + moment if early else position(run) <= goal:
            assert time.monotonic() < began + 60, log.read_text()
            if os.waitpid(pid, os.WNOHANG)[0]:
                raise AssertionError(f"the run ended before it was killed:\n{log.read_text()}")
            time.sleep(0.002)
        time.sleep(0 if early else rng.uniform(0, 0.05))  # inside an update, a line, a save, or a start
        os.kill(pid, signal.SIGKILL)
        lives.append({"code": ended(pid), "before": before[-1:], "at": position(run), "text": log.read_text()})
    before = committed(run)
    code = ended(forked(killed, log))
    lives.append({"code": code, "before": before[-1:], "at": position(run), "text": log.read_text()})
    rows = [record(killed.run_folder), record(whole.run_folder)]
    same = rows[0] == rows[1] and same_state(killed.run_folder, whole.run_folder)
    return {"lives": lives, "same": same, "lines": len(rows[1])}


if __name__ == "__main__":
    torch.set_num_threads(1)
    mode, yaml, what, out = sys.argv[1:]
    if mode == "points":
        found: Any = points(Path(yaml), Path(what), Path(out))
    else:
        found = kills(Path(yaml), int(what))
    Path(out).write_text(json.dumps(found))
