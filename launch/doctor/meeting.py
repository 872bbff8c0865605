"""How the processes meet: through a store first, which needs no group, and then in a process group.

The store finds what would make a group hang without a word: ranks that are missing, and ranks that exist twice. It
also carries the answers, so that rank 0 can still print a table when the group cannot be formed.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from foundation.errors import LaunchError
from foundation.training.declared import Declared
from launch.doctor.rows import Frozen

M = TypeVar("M", bound=Frozen)
DO = "see that this address resolves and can be reached from every node, and that all processes start"
LINGER = 10.0  # seconds that the owner of the store waits for the others to have read the verdict


class Stage(NamedTuple, Generic[M]):
    """The answers of all processes, complete only where the table is made."""

    values: list[M | None]
    """By rank; None for a process that failed or did not answer."""
    errors: dict[int, str]
    """What went wrong, by rank."""
    go: bool
    """Whether all have answered, the same everywhere."""


class Meeting:
    """A process that is alone; it also says what a meeting of several can do."""

    size = 1
    reporter = True
    """Whether this process judges and prints: rank 0, or the first to arrive when there is no rank 0."""
    complete = True
    """Whether each rank has come once; without, there is nothing to do together."""

    def __init__(self, rank: int, patience: float) -> None:
        self.rank, self.patience = rank, patience

    def arrive(self, mine: str) -> list[str]:
        """Wait for all; the words of those who came, where the table is made."""
        return [mine]

    def collect(self, topic: str, mine: str) -> list[str | None]:
        """What each rank says, where the table is made; None for one that says nothing in time."""
        return [mine]

    def share(self, topic: str, said: str) -> str:
        """What the reporter says, everywhere."""
        return said

    def leave(self) -> None:
        """End; the reporter last."""

    def stage(self, topic: str, kind: type[M], action: Callable[[], M]) -> Stage[M]:
        """Do something on all processes and gather what came of it; nobody waits for one that failed."""
        try:
            answer = "+" + action().model_dump_json()
        except Exception as error:  # whatever goes wrong on a node is an answer, never the end of the search
            answer = f"-{getattr(error, 'what', '') or f'{type(error).__name__}: {error}'}"
        values: list[M | None] = []
        errors: dict[int, str] = {}
        for rank, text in enumerate(self.collect(topic, answer)):
            good = text is not None and text.startswith("+")
            values.append(kind.model_validate_json(text[1:]) if text and good else None)
            if not good:
                errors[rank] = text[1:] if text else f"no answer within {self.patience:g} s"
        return Stage(values, errors, self.agree(topic, not errors))

    def agree(self, topic: str, good: bool) -> bool:
        """What the reporter thinks, everywhere."""
        return self.share(f"{topic}?", "yes" if good else "no") == "yes"


class Several(Meeting):
    """A meeting through a store that all can reach."""

    def __init__(self, store: Store, rank: int, size: int, patience: float) -> None:
        super().__init__(rank, patience)
        self.store, self.size = PrefixStore("doctor", store), size
        self._others = size - 1

    def arrive(self, mine: str) -> list[str]:
        """See `Meeting`. Raises LaunchError when the world is full already."""
        first_of_rank = self.store.add(f"rank/{self.rank}", 1) == 1
        number = self.store.add("arrived", 1)
        if number > self.size:
            raise LaunchError(
                f"process {number} of a world of {self.size} has come, as rank {self.rank}",
                where=socket.gethostname(),
                do="start all processes with one launcher; give each run a MASTER_PORT of its own",
            )
        self.store.set(f"arrival/{number}", mine)
        if number == self.size:
            self.store.set("all", "here")
        self._wait("all", self.patience)
        heads = first_of_rank and self.rank == 0 if self.store.check(["rank/0"]) else number == 1
        self.reporter = heads and self.store.add("reporters", 1) == 1  # rank 0 may come when the first one has given up
        if not self.reporter:
            self.complete = self.share("complete", "") == "yes"
            return []
        present = self.store.add("arrived", 0)
        self._others = min(present, self.size) - 1
        ranks = [self.store.check([f"rank/{rank}"]) for rank in range(self.size)]
        self.complete = all(ranks) and present == self.size
        self.share("complete", "yes" if self.complete else "no")
        keys = [f"arrival/{each}" for each in range(1, self._others + 2)]
        return [self.store.get(key).decode() for key in keys]

    def collect(self, topic: str, mine: str) -> list[str | None]:
        """See `Meeting`."""
        self.store.set(f"{topic}/{self.rank}", mine)
        if not self.reporter:
            return []
        end = time.monotonic() + self.patience
        keys = [f"{topic}/{rank}" for rank in range(self.size)]
        return [self.store.get(key).decode() if self._wait(key, end - time.monotonic()) else None for key in keys]

    def share(self, topic: str, said: str) -> str:
        """See `Meeting`. Raises LaunchError when the reporter is gone."""
        if self.reporter:
            self.store.set(topic, said)
        elif not self._wait(topic, 2 * self.patience + LINGER):
            raise LaunchError(
                f"rank 0 has said nothing about {topic!r} for {2 * self.patience + LINGER:g} s",
                where=f"rank {self.rank} on {socket.gethostname()}",
                do="see what rank 0 printed",
            )
        return self.store.get(topic).decode()

    def leave(self) -> None:
        """The process that owns the store stays until the others have read the verdict."""
        left = self.store.add("left", int(not self.reporter))
        end = time.monotonic() + LINGER
        while self.reporter and left < self._others and time.monotonic() < end:
            time.sleep(0.01)
            left = self.store.add("left", 0)

    def _wait(self, key: str, seconds: float) -> bool:
        """Whether a key exists within the time."""
        try:
            self.store.wait([key], timedelta(seconds=max(seconds, 0.001)))
        except dist.DistError:
            return self.store.check([key])
        return True


class Group:
    """A process group as training forms it: gloo on CPUs, nccl on GPUs. Blocking calls with a time limit."""

    def __init__(self, meeting: Several, cuda: bool) -> None:
        self.rank, self.size = meeting.rank, meeting.size
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        if cuda:  # or a collective that hangs ends the process, and no table is printed
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
        backend = "cpu:gloo,cuda:nccl" if cuda else "cpu:gloo"
        store = PrefixStore("group", meeting.store)
        limit = timedelta(seconds=meeting.patience)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=limit)
        self.largest(0.0)  # all can be reached, on both backends
        self.all_reduce(torch.zeros(1, device=self.device))

    def send(self, tensor: Tensor, to: int) -> None:
        """To one rank."""
        dist.send(tensor, to)

    def receive(self, tensor: Tensor, source: int) -> None:
        """Fill the tensor with what a rank sends."""
        dist.recv(tensor, source)

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum in place."""
        dist.all_reduce(tensor)

    def largest(self, value: float) -> float:
        """The largest value of all, on the CPU; nobody leaves before all have come."""
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return float(tensor)

    def finish(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Leave the group."""
        dist.destroy_process_group()


def meet(launched: Declared, patience: float) -> Meeting:
    """The meeting of the processes that the environment declares.

    Raises LaunchError when the environment is not that of a launcher, or its address cannot be reached.
    """
    if launched.world_size == 1:
        return Meeting(0, patience)
    if launched.missing:
        raise LaunchError(
            f"{launched.world_size} processes need {', '.join(launched.missing)} in the environment",
            where="the environment",
            do="start with: torchrun --nproc-per-node N -m foundation doctor",
        )
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        socket.getaddrinfo(os.environ["MASTER_ADDR"], None)  # fails at once; the store would go on trying
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=patience)))
    except (dist.DistError, ValueError, OSError) as error:
        do = DO + ", only one of them as rank 0" * (os.environ["RANK"] == "0")
        raise LaunchError(f"the process group cannot be formed: {error}", where=place, do=do) from error
    return Several(store, rank, size, patience)


def nccl_version() -> str:
    """The NCCL that torch uses; empty: none."""
    return ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else ""
