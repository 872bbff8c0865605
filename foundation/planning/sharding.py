"""What FSDP2 gives a process of a large cluster, on one machine: `fully_shard` among processes that are not there.

The process group is torch's fake one, which sends nothing; the model is on the meta device and takes no memory. So the
pieces are those of a real start with so many processes, and the planner's formula is held against them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from foundation.config import Config
from foundation.errors import LaunchError
from foundation.models.families import shapes
from foundation.objectives.registry import build
from foundation.planning.memory import shard_degree, share
from foundation.training.blocks import on_meta
from foundation.training.sharded import shard


class Held(NamedTuple):
    """What a rank holds after sharding: parameters of which it has rows, and has none; elements, and by formula."""

    rank: int
    tensors: int
    empty: int
    elements: int
    formula: int


def held(config: Config, engine: str, world: int, gpus_per_node: int, ranks: Sequence[int]) -> list[Held]:
    """What these ranks of `world` hold under fsdp2 or hsdp. Raises LaunchError where a process group exists already."""
    pieces = shard_degree(engine, world, gpus_per_node, config.train.shard_size)
    if world % pieces:
        what = f"{world} processes do not form groups of {pieces}"
        raise LaunchError(what, where="train.shard_size", do=f"choose a divisor of {world}")
    expected, objective, found = shapes(config).every, build(config), []
    for rank in ranks:
        with alone(world, rank, pieces) as mesh:
            model = shard(on_meta(objective.build_model), mesh, config.train)
        local = [p.to_local().numel() if isinstance(p, DTensor) else -1 for p in model.parameters()]
        formula = share(expected, pieces, rank % pieces)
        found.append(Held(rank, sum(n > 0 for n in local), local.count(0), sum(local), formula))
    return found


@contextmanager
def alone(world: int, rank: int, pieces: int) -> Iterator[DeviceMesh]:
    """Be one rank of `world` without the others: the mesh of (replicas, pieces), or of pieces only."""
    if dist.is_initialized():
        what = "this process belongs to a process group already"
        raise LaunchError(what, where="the shard check", do="run it in a process of its own")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        shape = (world,) if pieces == world else (world // pieces, pieces)
        yield init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    finally:
        dist.destroy_process_group()
