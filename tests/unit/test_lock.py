"""Two jobs never write one run folder, and no dead one keeps another from it."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from foundation.errors import LaunchError, StorageError
from foundation.training.lock import NAME, owned

FORK = multiprocessing.get_context("fork")


def hold(folder: Path, ready: Any, worker: bool) -> None:
    """Own the folder until the end of time; with a worker that is forked meanwhile and lives on."""
    with owned(folder):
        reading, writing = os.pipe()
        child = os.fork() if worker else -1
        if child == 0:
            os.write(writing, b"forked")  # and with that has let go
        elif worker:
            os.read(reading, 6)
        if child:
            ready.put(child)
        signal.pause()


@contextmanager
def owner(folder: Path, worker: bool = False) -> Iterator[tuple[Any, int]]:
    """A process that owns the folder, and the id of its worker."""
    ready = FORK.Queue()
    process = FORK.Process(target=hold, args=(folder, ready, worker), daemon=True)
    process.start()
    child = ready.get(timeout=30)
    try:
        yield process, child
    finally:
        process.kill()
        process.join()
        if worker:
            os.kill(child, signal.SIGKILL)


def test_a_second_job_is_refused_and_told_who_is_there(tmp_path: Path) -> None:
    with owner(tmp_path / "run") as (process, _), pytest.raises(LaunchError) as caught, owned(tmp_path / "run"):
        pass
    who = f"process {process.pid} on {socket.gethostname()}"
    assert str(caught.value).startswith(f"another run writes to this folder: {who}\n  where: {tmp_path / 'run'}\n")
    assert "wait for it, stop it, or choose another `name`" in str(caught.value)


def test_the_refused_one_does_not_take_the_lock_from_its_owner(tmp_path: Path) -> None:
    with owner(tmp_path) as (process, _):
        for _ in range(2):
            with pytest.raises(LaunchError, match=f"process {process.pid} on "), owned(tmp_path):
                pass


@pytest.mark.parametrize("worker", [False, True])
def test_the_lock_dies_with_its_owner_whatever_workers_live_on(tmp_path: Path, worker: bool) -> None:
    with owner(tmp_path, worker) as (process, child):
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if worker:
            os.kill(child, 0)  # it is there
        with owned(tmp_path):
            assert (tmp_path / NAME).read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_a_folder_is_free_again_after_its_owner_ended_or_failed(tmp_path: Path) -> None:
    with owned(tmp_path / "new" / "run"):
        pass
    with pytest.raises(ValueError, match="inside"), owned(tmp_path / "new" / "run"):
        raise ValueError("inside")
    with owned(tmp_path / "new" / "run"), pytest.raises(LaunchError), owned(tmp_path / "new" / "run"):
        pass


def test_an_owner_that_left_no_name_is_called_unknown(tmp_path: Path) -> None:
    with (tmp_path / NAME).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(LaunchError, match="another run writes to this folder: an unknown process"), owned(tmp_path):
            pass


def test_a_disk_without_locks_is_accepted_and_any_other_error_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(number: int) -> Any:
        def flock(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        return flock

    for number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        monkeypatch.setattr(fcntl, "flock", fails(number))
        with owned(tmp_path):
            assert (tmp_path / NAME).read_text().startswith(f"process {os.getpid()} on ")
    monkeypatch.setattr(fcntl, "flock", fails(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"), owned(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "run"
    with pytest.raises(StorageError, match="the run folder cannot be written: Not a directory") as caught, owned(place):
        pass
    assert re.search(rf"where: {tmp_path}/file/run\n.*change run_root or name", str(caught.value))
