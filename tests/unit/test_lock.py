"""Two jobs never write one run folder, and no dead one keeps another from it."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from foundation.errors import LaunchError, StorageError
from foundation.training import lock
from foundation.training.lock import NAME, owned

FORK = multiprocessing.get_context("fork")


def hold(folder: Path, ready: Any, worker: bool, sender: bool) -> None:
    """Own the folder until the end of time; with a worker that is forked meanwhile and lives on."""
    with owned(folder, sender=sender):
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
def owner(folder: Path, worker: bool = False, sender: bool = False) -> Iterator[tuple[Any, int]]:
    """A process that owns the folder, and the id of its worker."""
    ready = FORK.Queue()
    process = FORK.Process(target=hold, args=(folder, ready, worker, sender), daemon=True)
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


def test_a_training_waits_until_its_run_has_been_sent_to_mlflow_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with owner(tmp_path, sender=True) as (process, _):
        end = threading.Timer(1.0, process.kill)
        end.start()
        with owned(tmp_path):
            assert not process.is_alive()
            assert (tmp_path / NAME).read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
        end.join()
    who = f"foundation track, process {process.pid} on {socket.gethostname()}"
    told = f"{tmp_path} is being sent to MLflow by {who}: the training waits, 300 s at most\n"
    assert capsys.readouterr().err == told


def test_it_does_not_wait_for_ever_nor_for_another_training_that_was_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def then_a_training() -> None:
        (tmp_path / NAME).write_text("process 7 on n1\n")

    with owner(tmp_path, sender=True) as (process, _):
        with monkeypatch.context() as patch:
            patch.setattr(lock, "WAIT", 0.3)
            with pytest.raises(LaunchError) as caught, owned(tmp_path):
                pass
        who = f"foundation track, process {process.pid} on "
        assert str(caught.value).startswith(f"this run is being sent to MLflow by {who}")
        assert "do:    wait for it, or stop it" in str(caught.value)
        taken = threading.Timer(0.3, then_a_training)
        taken.start()
        began = time.monotonic()
        with pytest.raises(LaunchError, match="another run writes to this folder: process 7 on n1"), owned(tmp_path):
            pass
        assert time.monotonic() - began < lock.WAIT / 2
        taken.join()


@pytest.mark.parametrize("sender", [False, True])
def test_what_sends_a_run_waits_for_nobody(tmp_path: Path, sender: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits"))
    with owner(tmp_path, sender=sender), pytest.raises(LaunchError), owned(tmp_path, sender=True):
        pass


def test_an_owner_that_has_not_written_its_name_yet_is_not_taken_for_the_one_before(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("process 7 on n1\n")  # killed
    file = (tmp_path / NAME).open("r+")
    fcntl.flock(file, fcntl.LOCK_EX)

    def name() -> None:
        file.write("foundation track, process 8 on n1\n")
        file.flush()

    steps = threading.Timer(0.2, name), threading.Timer(1.0, file.close)
    for step in steps:
        step.start()
    with owned(tmp_path):
        assert file.closed
    for step in steps:
        step.join()


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
