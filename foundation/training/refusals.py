"""What engines do not take, from the configuration and the number of processes alone: the start of a run raises it, a
plan lists it.

Nothing distributed is imported here.
"""

from __future__ import annotations

from collections.abc import Iterator

from foundation.config import Config
from foundation.errors import ConfigError, ExplainedError, LaunchError
from foundation.models.families import shapes


def meant(engine: str, world: int) -> str:
    """The engine of `train.engine` where no launcher declares one: auto is ddp for several processes."""
    return engine if engine != "auto" else "ddp" if world > 1 else "single"


def sums_in_bf16(config: Config, engine: str, steps: int) -> bool:
    """Whether gradients of `steps` micro-batches would be added up in bf16."""
    return engine == "zero1" and config.train.precision == "bf16" and steps > 1


def refusals(config: Config, engine: str, world: int, node: int) -> Iterator[ExplainedError]:
    """Every reason why an engine (not auto) does not take a run of `world` processes, `node` of them on each node."""
    train = config.train
    if engine == "single" and world > 1:
        yield LaunchError(
            f"engine single, but {world} processes would train {world} separate models",
            where="train.engine",
            do="use train.engine=auto, or start one process",
        )
    if train.float8 and (engine not in ("fsdp2", "hsdp") or train.precision != "bf16"):
        yield ConfigError(
            f"float8 does not go with engine {engine} in {train.precision}",
            where="train.float8",
            do="use train.engine=fsdp2 or hsdp with train.precision=bf16, or train.float8=false",
        )
    if train.offload and engine in ("single", "ddp"):
        yield ConfigError(
            f"engine {engine} keeps its state on the device",
            where="train.offload",
            do="use train.engine=fsdp2, hsdp or zero1 to zero3, or train.offload=false",
        )
    if train.shard_size and engine != "hsdp":
        yield ConfigError(
            f"engine {engine} has no groups of processes",
            where="train.shard_size",
            do="use train.engine=hsdp, or train.shard_size=null",
        )
    if engine == "hsdp" and world % (size := train.shard_size or node):
        yield LaunchError(
            f"{world} processes do not form groups of {size}",
            where="train.shard_size",
            do="choose a divisor of the number of processes, at most those of a node",
        )
    if engine.startswith("zero") and train.precision == "bf16" and shapes(config).teacher:
        yield ConfigError(
            f"{engine} in bf16 would keep the teacher in bf16 alone, too coarse for its small changes",
            where="train.engine",
            do="use train.engine=fsdp2, hsdp or ddp, or train.precision=fp32",
        )
    share = train.global_batch // world
    if sums_in_bf16(config, engine, share // (train.micro_batch or max(1, share))):
        yield ConfigError(
            f"{engine} in bf16 would add up the gradients of several micro-batches in bf16",
            where="train.engine",
            do="use train.engine=zero2, or train.micro_batch=null",
        )
