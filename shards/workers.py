"""Work for several processes, in order, and the lock that keeps a catalog folder for one packing at a time."""

from __future__ import annotations

import fcntl
import multiprocessing as mp
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

from shards.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")
_shared: Any = None  # in a worker: what every task of the pool reads


class Workers:
    """`count` processes (0: this one) that all know `shared`; ends them on leaving the context."""

    def __init__(self, count: int, shared: Any) -> None:
        self.count, self.shared = count, shared
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool:
            if kind is KeyboardInterrupt:  # what they write has no name yet, and is written again
                for process in list(self._pool._processes.values()):
                    process.terminate()
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Any, Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """function(shared, task) for every task, results in order; raises DataError when a process dies."""
        if not self.count:
            yield from (function(self.shared, task) for task in tasks)
            return
        if not self._pool:  # spawned: a fork of a process that has threads may hang
            spawn = mp.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.count, spawn, initializer=_start, initargs=(self.shared,))
        running: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                with _interrupts_held():
                    running.append(self._pool.submit(_call, function, task))
                if len(running) > 2 * self.count:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "a process that packs was killed",
                do="if memory was short, use fewer workers; pack again, and it goes on where it stopped",
            ) from error


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes that start in here never get Ctrl-C, which goes to a whole group: the parent ends them. It waits."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(shared: Any) -> None:
    global _shared
    _shared = shared
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A killed parent cannot end its workers, which would wait for work for ever."""
    parent = mp.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _call(function: Callable[[Any, Task], Result], task: Task) -> Result:
    return function(_shared, task)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for one packing; raises DataError when another has it. A killed one leaves no lock behind."""
    path = folder / ".pack.lock"
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = True
        else:  # the holder before may have removed the file between our open and our lock
            held = not path.exists() or os.fstat(file).st_ino != path.stat().st_ino
        if held:
            raise DataError("another packing writes to this folder", where=str(folder), do="wait until it has ended")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(file)
