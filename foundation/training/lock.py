"""One run per folder: a lock that the system lets go of when its owner dies, in whatever way."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from foundation.errors import LaunchError, StorageError

NAME = ".lock"
_held: set[int] = set()


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Hold the folder. Raises LaunchError, which names the owner, when another process does.

    A file system without locks is accepted: it only loses this protection.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        what = f"the run folder cannot be written: {error.strerror or error}"
        raise StorageError(
            what, where=str(folder), do="free space, correct the permissions, or change run_root or name"
        ) from error
    _held.add(descriptor)
    try:
        _lock(descriptor, folder)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)  # and with it the lock


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "an unknown process"
        raise LaunchError(
            f"another run writes to this folder: {owner}",
            where=str(folder),
            do="wait for it, stop it, or choose another `name`",
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def _let_go() -> None:
    """A worker that is forked from the owner, and may live longer, holds nothing."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)
