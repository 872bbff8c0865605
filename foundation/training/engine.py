"""The one seam between the run and the machines it runs on: the only importer of torch.distributed."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from foundation.errors import ConfigError, LaunchError


class Engine:
    """One process that trains alone; the other engines change what they must."""

    name = "single"

    def __init__(self) -> None:
        self.rank, self.world_size = 0, 1
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as this engine trains it, on its device."""
        return model.to(self.device)

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Around a micro-batch: gradients meet across processes only on the `last` one."""
        return nullcontext()

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        return value

    def sum_int(self, value: int) -> int:
        """The sum of an integer below 2^48 over all processes."""
        return value

    def close(self) -> None:
        """Leave the process group."""


class DDP(Engine):
    """Replicas with averaged gradients: gloo on CPUs, nccl on GPUs."""

    name = "ddp"

    def __init__(self) -> None:
        super().__init__()
        missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise LaunchError(
                f"engine ddp needs {', '.join(missing)} in the environment",
                where="train.engine",
                do="start with: torchrun --nproc-per-node N -m foundation train CONFIG",
            )
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        if self.world_size != int(os.environ["WORLD_SIZE"]):
            raise LaunchError(
                f"the group has {self.world_size} processes, the launcher declared {os.environ['WORLD_SIZE']}",
                do="start all processes with one launcher",
            )

    def wrap(self, model: nn.Module) -> nn.Module:
        """A replica that starts from rank 0's weights."""
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model.to(self.device), device_ids=ids, gradient_as_bucket_view=True)

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """`no_sync` on all but the last micro-batch."""
        assert isinstance(model, DistributedDataParallel)
        return nullcontext() if last else model.no_sync()

    def mean(self, value: Tensor) -> Tensor:
        """All-reduced mean."""
        value = value.detach().clone()
        dist.all_reduce(value)
        return value / self.world_size

    def sum_int(self, value: int) -> int:
        """All-reduced sum, which is also a barrier."""
        total = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(total)
        return int(total)

    def close(self) -> None:
        """Destroy the group, so that a finished run leaves no socket behind."""
        dist.destroy_process_group()


class Row(NamedTuple):
    """An engine, what it is for, and why it cannot run here ('' when it can)."""

    start: Callable[[], Engine]
    description: str
    unavailable: str = ""


NO_GROUPS = "" if dist.is_available() else "this torch was built without torch.distributed"
ENGINES = {
    "single": Row(Engine, "one process, one device"),
    "ddp": Row(DDP, "replicas with averaged gradients; torchrun or accelerate launch start the processes", NO_GROUPS),
}


def unwrap(model: nn.Module) -> nn.Module:
    """The plain model inside an engine's or the compiler's wrapper; checkpoints never show either."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    return getattr(model, "_orig_mod", model)


def start(name: str) -> Engine:
    """The engine a configuration names; `auto` is ddp when a launcher declared several processes.

    Raises ConfigError for an unknown name, LaunchError when name and environment contradict each other: N processes
    with the single engine would be N independent trainings.
    """
    declared = int(os.environ.get("WORLD_SIZE", "1"))
    name = ("ddp" if declared > 1 else "single") if name == "auto" else name
    if name not in ENGINES:
        raise ConfigError(f"unknown engine {name!r}", where="train.engine", do=f"choose auto, {', '.join(ENGINES)}")
    if name == "single" and declared > 1:
        raise LaunchError(
            f"engine single, but {declared} processes were started: they would train {declared} separate models",
            where="train.engine",
            do="use train.engine=auto, or start one process",
        )
    return ENGINES[name].start()
