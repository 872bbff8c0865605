"""Which device a process takes, and that no two take the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from foundation.errors import LaunchError
from launch.doctor.gpus import plain
from launch.doctor.meeting import nccl_version
from launch.doctor.rows import ONE_IMAGE, Frozen, Place, Row, Status, equal, gib, groups, least, where

FREE = 0.9  # share of a GPU's memory that should be free: less is another process


class Device(Frozen):
    """The device of one process."""

    kind: str
    """Type of torch device: cuda or cpu."""
    index: int = 0
    name: str = ""
    uuid: str = ""
    total: int = 0
    free: int = 0
    """Bytes."""
    nccl: str = ""


def claim(local_rank: int) -> Device:
    """Take the GPU of this process, as training does. Raises LaunchError when there are fewer GPUs than processes."""
    if not torch.cuda.is_available():
        return Device(kind="cpu")
    seen = torch.cuda.device_count()
    if local_rank >= seen:
        raise LaunchError(
            f"process {local_rank} of this node has no GPU: {seen} are seen",
            do="start as many processes per node as it has GPUs",
        )
    torch.cuda.set_device(local_rank)
    free, total = torch.cuda.mem_get_info(local_rank)
    properties = torch.cuda.get_device_properties(local_rank)
    return Device(
        kind="cuda",
        index=local_rank,
        name=properties.name,
        uuid=plain(str(properties.uuid)),
        total=total,
        free=free,
        nccl=nccl_version(),
    )


def rows(places: Sequence[Place], facts: Sequence[Device]) -> Iterator[Row]:
    """Kinds, sharing, and memory of the devices; one fact a place."""
    kinds = {fact.kind for fact in facts}
    if kinds == {"cpu"}:
        yield Row("devices", Status.note, "no GPU: the processes compute on CPUs")
        return
    if len(kinds) > 1:
        without = [place for place, fact in zip(places, facts, strict=True) if fact.kind == "cpu"]
        do = "is the driver loaded there (nvidia-smi), and does the container get the GPUs (--nv, --gpus all)?"
        yield Row("devices", Status.failed, f"torch sees no GPU on {where(without, places)}", do)
        return
    shared = [
        f"GPU {uuid or 'without a UUID'} of {node} is taken by ranks {', '.join(str(place.rank) for place in who)}"
        for (node, uuid), who in groups(places, [(p.node, f.uuid) for p, f in zip(places, facts, strict=True)])
        if len(who) > 1
    ]
    if shared:
        do = "give each process a GPU of its own: see CUDA_VISIBLE_DEVICES and LOCAL_RANK there"
        yield Row("devices", Status.failed, "; ".join(shared), do)
    else:
        names = ", ".join(dict.fromkeys(fact.name for fact in facts))
        yield Row("devices", Status.ok, f"{len(facts)} GPU(s), one for each process: {names}")
    free = [fact.free / max(fact.total, 1) for fact in facts]
    do = "end what else holds memory there: nvidia-smi"
    for row in least("GPU memory free", places, free, FREE, lambda share: f"{share:.0%}", do):
        yield row._replace(found=f"{row.found} of {gib(min(fact.total for fact in facts))}")
    yield equal("version of NCCL", places, [fact.nccl for fact in facts], ONE_IMAGE)
