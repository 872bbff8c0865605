"""A run that stands still says where: processes that meet in a collective wait for the slowest without a word.

After `train.patience` seconds without an update each process writes `standstill/rank-N.json` into the run folder: what
its main thread does, and from torch's flight recorder the collectives it has begun, group by group. `foundation
inspect` compares them and names the process that all others wait for. Nothing is ended by it: that is left to the
time-out of the collectives.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Tell = Callable[[int, float, Path], None]  # (position, seconds, file)
FOLDER = "standstill"
KEPT = "2000"  # collectives that the recorder remembers
# Its size is read when the first process group is made; gloo and NCCL both write into it.
os.environ.setdefault("TORCH_FR_BUFFER_SIZE", KEPT)


class Patience:
    """Watches for updates from a thread of its own, from the first `beat` on: compilers may take as long as they need.

    `seconds` None watches nothing. `tell` is called from that thread when the file is written.
    """

    def __init__(self, folder: Path, rank: int, seconds: float | None, tell: Tell) -> None:
        self._path, self._rank, self._seconds, self._tell = folder / FOLDER / f"rank-{rank}.json", rank, seconds, tell
        self._beat: tuple[int, float] | None = None
        self._main = threading.get_ident()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="standstill", daemon=True)

    def __enter__(self) -> Patience:
        if self._seconds is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(1)  # it may wait for a disk that does not answer, and dies with the process

    def beat(self, position: int) -> None:
        """The run goes on, and is at `position` (samples seen)."""
        self._beat = position, time.monotonic()

    def _watch(self) -> None:
        told: tuple[int, float] | None = None
        assert self._seconds is not None
        while not self._closed.wait(self._seconds / 4):
            beat = self._beat
            if beat is None or beat == told or (stood := time.monotonic() - beat[1]) < self._seconds:
                continue
            told = beat
            facts = {"rank": self._rank, "position": beat[0], "seconds": round(stood, 1), **whereabouts(self._main)}
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                temporary = self._path.with_suffix(".tmp")
                temporary.write_text(json.dumps(facts, indent=1))
                temporary.replace(self._path)
                self._tell(beat[0], stood, self._path)
            except OSError as error:  # the run folder may be what it stands still for
                print(f"{self._path} cannot be written: {error.strerror}", file=sys.stderr)


def whereabouts(thread: int) -> dict[str, Any]:
    """Host, process, moment, the stack of that thread (the innermost call last) and the collectives of each group."""
    frame = sys._current_frames().get(thread)
    stack = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_stack(frame)] if frame else []
    place = {"host": socket.gethostname(), "process": os.getpid(), "time": round(time.time(), 3)}
    return {**place, "stack": stack, "collectives": collectives(recorded())}


def recorded() -> Mapping[str, Any]:
    """What torch's flight recorder holds; nothing where it cannot say."""
    try:
        from torch._C._distributed_c10d import _dump_fr_trace_json  # type: ignore[attr-defined]  # without a stub

        return json.loads(_dump_fr_trace_json(includeCollectives=True, onlyActive=False))
    except (ImportError, RuntimeError, TypeError, ValueError):  # private: other releases of torch may lack it
        return {}


def collectives(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each process group how many collectives were begun here, and what the last one was."""
    found: dict[str, dict[str, Any]] = {}
    for entry in record.get("entries", ()):
        if not entry.get("is_p2p"):
            last = {"what": entry["profiling_name"], "sizes": entry["input_sizes"]}
            found["/".join(entry["process_group"])] = {"begun": entry["collective_seq_id"], **last}
    return found
