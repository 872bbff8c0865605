"""What a launcher (torchrun, accelerate launch, srun) has put into the environment of this process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from foundation.errors import LaunchError

NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SHARDING = {"FULL_SHARD": "fsdp2", "SHARD_GRAD_OP": "fsdp2", "HYBRID_SHARD": "hsdp", "HYBRID_SHARD_ZERO2": "hsdp"}


class Declared(NamedTuple):
    """Where this process stands, the names that a group would need and are `missing`, and the engine, if declared."""

    world_size: int
    local_rank: int
    local_world_size: int
    missing: tuple[str, ...]
    engine: str | None


def declared(environment: Mapping[str, str] = os.environ) -> Declared:
    """Read the environment. Raises LaunchError for numbers that are none and for declarations nothing here obeys.

    `accelerate launch` says FSDP by ACCELERATE_USE_FSDP, FSDP_VERSION and FSDP_SHARDING_STRATEGY, and ZeRO by
    ACCELERATE_USE_DEEPSPEED and ACCELERATE_DEEPSPEED_ZERO_STAGE.
    """
    numbers = {}
    for name, default in (("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")):
        text = environment.get(name, default)
        if not text.isdecimal():
            raise LaunchError(f"{name}={text!r} is no number", where="the environment", do="start with one launcher")
        numbers[name] = int(text)
    if "WORLD_SIZE" not in environment and environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        raise LaunchError(
            "srun started several tasks, and no launcher told them of each other: they would train separate models",
            where="SLURM_STEP_NUM_TASKS",
            do="use foundation submit, or start torchrun as the one task of each node",
        )
    missing = tuple(name for name in NAMES if not environment.get(name))
    world, local, local_world = numbers.values()
    return Declared(world, local, local_world, missing, _engine(environment))


def _engine(environment: Mapping[str, str]) -> str | None:
    """The engine that `accelerate launch` declares."""
    fsdp, zero = (
        environment.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true") for name in ("FSDP", "DEEPSPEED")
    )
    if environment.get("ACCELERATE_USE_MEGATRON_LM", "").lower() in ("1", "true"):
        raise _refusal("Megatron-LM", "choose FSDP or DeepSpeed")
    if fsdp and zero:
        raise _refusal("FSDP and DeepSpeed at once", "choose one")
    if environment.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() in ("1", "true"):
        raise _refusal("a parallelism_config", "use fsdp_sharding_strategy: HYBRID_SHARD instead")
    if zero:
        if environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
            raise _refusal("a DeepSpeed configuration file", "set zero_stage instead")
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if stage not in ("1", "2", "3"):
            raise _refusal(f"ZeRO stage {stage}", "set zero_stage to 1, 2 or 3")
        return f"zero{stage}"
    if fsdp:
        if environment.get("FSDP_VERSION", "1") != "2":
            raise _refusal("FSDP version 1", "set fsdp_version: 2")
        strategy = environment.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD").upper()
        if strategy not in SHARDING:
            raise _refusal(f"the sharding strategy {strategy}", f"choose one of {', '.join(SHARDING)}")
        return SHARDING[strategy]
    return None


def _refusal(what: str, do: str) -> LaunchError:
    return LaunchError(f"accelerate launch declares {what}", where="the accelerate configuration", do=do)
