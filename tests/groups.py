"""Processes as launchers make them, forked from one that has imported the trainer: a start costs no import."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["foundation.training.run", "torch._dynamo", "deepspeed", "accelerate.commands.launch", "pytest"]
)


class Job(NamedTuple):
    """A process that calls `program(*arguments)`, with these variables in its environment."""

    program: Callable[..., object]
    arguments: tuple[object, ...]
    environment: Mapping[str, object]


def group(world: int, program: Callable[..., object], *arguments: object, seconds: float = 600) -> tuple[int, str]:
    """`program(*arguments)` by `world` processes of one machine, as torchrun starts it; see `together`."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    return together([Job(program, arguments, shared | {"RANK": n, "LOCAL_RANK": n}) for n in range(world)], seconds)


def together(jobs: list[Job], seconds: float = 120) -> tuple[int, str]:
    """Exit status, that of the first to fail, and output of these processes; those that hang are killed."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("DS_ACCELERATOR", "cpu")  # what the first call finds here, all processes have
        forkserver.ensure_running()
        log = Path(folder) / "log"
        processes = [FORKS.Process(target=_run, args=(log, job)) for job in jobs]
        for process in processes:
            process.start()
        end = time.monotonic() + seconds
        while (left := [p.sentinel for p in processes if p.exitcode is None]) and time.monotonic() < end:
            if any(process.exitcode for process in processes):
                break
            connection.wait(left, timeout=max(0, end - time.monotonic()))
        code = next((p.exitcode for p in processes if p.exitcode), 0)
        for process in processes:
            process.terminate()  # a launcher ends its processes
            process.join(60)
            process.kill()
        output = log.read_text()
    assert not left or code, f"the processes hang; they printed\n{output}"
    return code, output


def _run(log: Path, job: Job) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update({name: str(value) for name, value in job.environment.items()})
    torch.set_num_threads(1)
    job.program(*job.arguments)
