"""One run per folder: a lock that the system lets go of when its owner dies, in whatever way."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from foundation.errors import LaunchError, StorageError

NAME = ".lock"
WAIT = 300.0  # seconds; a server that never answers keeps `foundation track` for 85
_MOMENT, _POLL = 0.5, 0.1  # seconds until an owner has surely written who it is; between two looks
_SENDER = "foundation track, "
_held: set[int] = set()


@contextmanager
def owned(folder: Path, name: str = NAME, *, sender: bool = False) -> Iterator[None]:
    """Hold the folder by its lock `name`. Raises LaunchError, which names the owner, when another process does.

    A `sender` to MLflow waits for nobody, and others wait for it, WAIT seconds at most: a job that was queued for days
    does not fail for a line in cron. A file system without locks is accepted: it only loses this protection.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        what = f"the run folder cannot be written: {error.strerror or error}"
        raise StorageError(
            what, where=str(folder), do="free space, correct the permissions, or change run_root or name"
        ) from error
    _held.add(descriptor)
    try:
        _lock(descriptor, folder, sender)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)  # and with it the lock


def _lock(descriptor: int, folder: Path, sender: bool) -> None:
    began, told = time.monotonic(), False
    while not _taken(descriptor):
        owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "an unknown process"
        sends = owner.startswith(_SENDER)
        if sender or time.monotonic() - began >= (WAIT if sends else _MOMENT):
            what = "this run is being sent to MLflow by" if sends else "another run writes to this folder:"
            do = "wait for it, or stop it" if sends else "wait for it, stop it, or choose another `name`"
            raise LaunchError(f"{what} {owner}", where=str(folder), do=do)
        if sends and not told:
            told = True
            text = f"{folder} is being sent to MLflow by {owner}: the training waits, {WAIT:.0f} s at most"
            print(text, file=sys.stderr, flush=True)
        time.sleep(_POLL)
    os.ftruncate(descriptor, 0)
    name = f"process {os.getpid()} on {socket.gethostname()}\n"
    os.pwrite(descriptor, f"{_SENDER if sender else ''}{name}".encode(), 0)
    with suppress(OSError):
        os.fsync(descriptor)  # other nodes read it


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return True


def _let_go() -> None:
    """A worker that is forked from the owner, and may live longer, holds nothing."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)
