"""What a configuration of `accelerate launch` asks for, read before the queue by the rules of the nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from foundation.errors import LaunchError
from foundation.training.declared import declared

SPREAD = ("MULTI_GPU", "FSDP", "DEEPSPEED")
"""Types for which `accelerate launch` starts several processes; for every other one it starts one on each machine."""


def engine(file: Path, nodes: int, processes: int) -> str | None:
    """The engine that the file declares for so many processes on each node; None: it leaves the choice to the run.

    Raises ValueError, with what the file should say, when it cannot start them or the trainer would refuse it.
    """
    tree = _tree(file)
    kind = tree.get("distributed_type")
    if nodes * processes > 1 and kind not in SPREAD:
        raise ValueError(
            f"distributed_type {', '.join(SPREAD)}: with {kind} every machine starts one process, a training of its own"
        )
    fsdp, zero = tree.get("fsdp_config") or {}, tree.get("deepspeed_config") or {}
    environment = {}
    if kind == "FSDP":
        environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": str(fsdp.get("fsdp_version", 1))}
        environment["FSDP_SHARDING_STRATEGY"] = str(fsdp.get("fsdp_sharding_strategy", "FULL_SHARD"))
    elif kind == "DEEPSPEED":
        if nodes > 1 and zero.get("deepspeed_multinode_launcher") != "standard":
            raise ValueError("deepspeed_multinode_launcher: standard, or it starts processes by ssh, outside of Slurm")
        environment = {"ACCELERATE_USE_DEEPSPEED": "true"}
        environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(zero.get("zero_stage", 2))
    try:
        return declared(environment).engine
    except LaunchError as error:
        raise ValueError(f"{error.do} ({error.what})") from error


def _tree(file: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"a YAML file that can be read ({str(error).splitlines()[0]})") from error
    if not isinstance(tree, dict):
        raise ValueError("a YAML file of `accelerate launch`, such as launch/accelerate/ddp.yaml")
    return tree
