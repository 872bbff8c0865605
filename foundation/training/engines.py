"""Which engines there are, and which one a configuration means on these machines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch.distributed as dist

from foundation.config import Config
from foundation.errors import ConfigError, LaunchError
from foundation.training.declared import declared
from foundation.training.engine import DDP, Engine
from foundation.training.refusals import meant, refusals
from foundation.training.stopping import Stopped


class Row(NamedTuple):
    """An engine, what it is for, and why it cannot run here ('' when it can)."""

    start: Callable[[Config], Engine]
    description: str
    unavailable: str = ""


def _lazy(module: str, name: str) -> Callable[[Config], Engine]:
    return lambda config: getattr(import_module(f"foundation.training.{module}"), name)(config)


NO_GROUPS = "" if dist.is_available() else "this torch was built without torch.distributed"
NO_ZERO = NO_GROUPS or ("" if find_spec("deepspeed") else "needs DeepSpeed: pip install 'sar-foundation[deepspeed]'")
ENGINES = {
    "single": Row(Engine, "one process, one device"),
    "ddp": Row(DDP, "replicas with averaged gradients; a launcher starts the processes", NO_GROUPS),
    "fsdp2": Row(_lazy("sharded", "FSDP2"), "parameters, gradients and moments spread over all processes", NO_GROUPS),
    "hsdp": Row(_lazy("sharded", "HSDP"), "spread inside a node (train.shard_size), replicas between nodes", NO_GROUPS),
    "zero1": Row(_lazy("zero", "Zero1"), "DeepSpeed: moments spread over all processes", NO_ZERO),
    "zero2": Row(_lazy("zero", "Zero2"), "DeepSpeed: moments and gradients spread", NO_ZERO),
    "zero3": Row(_lazy("zero", "Zero3"), "DeepSpeed: parameters, moments and gradients spread", NO_ZERO),
}


@contextmanager
def running(config: Config) -> Iterator[Engine]:
    """`start`, and `close` where all ranks leave together: at the end, and when the run was asked to stop.

    Not after an error: taking down NCCL waits for ranks that wait for this one in a collective, so the process would
    not end, its message not be seen, and the launcher, which ends the others, not know. Raises as `start`.
    """
    engine = start(config)
    try:
        yield engine
    except Stopped:
        engine.close()
        raise
    engine.close()


def start(config: Config) -> Engine:
    """The engine of a configuration; `auto` is what the launcher declared, ddp for several processes without a word.

    Raises ConfigError for an unknown name, the first of `refusals`, and LaunchError when configuration and environment
    contradict each other: N processes with the single engine would be N independent trainings.
    """
    name, launched = config.train.engine, declared()
    if name not in ("auto", *ENGINES):
        raise ConfigError(f"unknown engine {name!r}", where="train.engine", do=f"choose auto, {', '.join(ENGINES)}")
    name = meant(launched.engine or name, launched.world_size) if name == "auto" else name
    for refusal in refusals(config, name, launched.world_size, launched.local_world_size):
        raise refusal
    if launched.engine and launched.engine != name:
        raise LaunchError(
            f"the configuration says engine {name}, accelerate launch declares {launched.engine}",
            where="train.engine",
            do=f"use train.engine=auto, or another accelerate configuration than the one for {launched.engine}",
        )
    if reason := ENGINES[name].unavailable:
        raise LaunchError(f"engine {name} cannot run here: {reason}", where="train.engine", do="choose another engine")
    return ENGINES[name].start(config)
