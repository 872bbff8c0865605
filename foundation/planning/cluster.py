"""Hardware, and the time that collectives take on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from foundation.planning.memory import shard_degree

FAILURE_HOURS = 50_676  # GPU hours between failures: 419 in 54 days on 16,384 GPUs (Llama 3, arXiv 2407.21783)


class Gpu(NamedTuple):
    """A device by its data sheet: bytes of memory, dense FLOP/s by precision, bytes/s between GPUs and out of a node.

    `nvlink` is what a ring reaches, not the sheet. The reference table names neither it nor the latency inside a node:
    350 GB/s and 1.5 us are what its hsdp column implies (the A100's: in proportion to the sheets).
    """

    memory: float
    bf16: float
    fp32: float
    fp8: float
    nvlink: float
    nic: float


GPUS = {
    "h100": Gpu(80e9, 989e12, 67e12, 1979e12, 350e9, 400e9),
    "h200": Gpu(141e9, 989e12, 67e12, 1979e12, 350e9, 400e9),
    "a100": Gpu(80e9, 312e12, 19.5e12, 0.0, 235e9, 200e9),
    "cpu": Gpu(8e9, 0.1e12, 0.1e12, 0.0, 5e9, 1e9),  # one process of a laptop: assumed throughout
}


def known_gpu(device_name: str) -> str | None:
    """The name in GPUS of a device as it calls itself; None for others, the slower PCIe boards included."""
    words = device_name.lower().replace("-", " ").split()
    if "pcie" in words and "a100" not in words:
        return None
    return next((name for name in GPUS if name in words and name != "cpu"), None)


class Cluster(NamedTuple):
    """Where a run is to go. Bandwidths in bytes/s; `nic` is all network cards of a node together."""

    world: int
    gpus_per_node: int = 8
    gpu: str = "h100"
    nic: float = 400e9
    nvlink: float = 350e9
    efficiency: float = 0.8
    """share of `nic` that a ring reaches"""
    hop: float = 3e-6
    """seconds of one step of a ring between nodes"""
    node_hop: float = 1.5e-6
    """the same inside a node"""
    mfu: float = 0.4
    """share of the dense peak while computing: 0.4 is half of what products reach in bf16"""
    overlap: float = 0.5
    """share of the communication that computing hides"""
    given: frozenset[str] = frozenset()
    """names of the fields above that are not assumptions of the planner"""

    @classmethod
    def of(cls, world: int, gpus_per_node: int, gpu: str, given: Mapping[str, float]) -> Cluster:
        """A cluster of this GPU: values that are `given`, the data sheet's for other bandwidths."""
        values: dict[str, Any] = {"nic": GPUS[gpu].nic, "nvlink": GPUS[gpu].nvlink, **given}
        return cls(world, gpus_per_node, gpu, given=frozenset(given), **values)

    def known(self, field: str) -> Literal["given", "assumed"]:
        """Where the value of a field comes from."""
        return "given" if field in self.given else "assumed"

    @property
    def nodes(self) -> int:
        """Whole or partial nodes."""
        return -(-self.world // self.gpus_per_node)

    @property
    def device(self) -> str:
        """Its type as torch names it."""
        return "cpu" if self.gpu == "cpu" else "cuda"

    def ring(self, processes: int) -> tuple[float, float]:
        """Bytes/s and seconds per step of a ring over so many neighbouring processes."""
        if processes <= self.gpus_per_node:
            return self.nvlink, self.node_hop
        return min(self.nvlink, self.nic * self.efficiency), self.hop


def one_pass(sent: float, units: int, shards: int, cluster: Cluster) -> float:
    """Seconds of one gather, or reduction to shards, of so many bytes in `units` blocks over a ring of `shards`."""
    bandwidth, hop = cluster.ring(shards)
    return sent * (shards - 1) / shards / bandwidth + units * (shards - 1) * hop


def communication(
    engine: str,
    count: float,
    units: int,
    cluster: Cluster,
    *,
    gather: int = 2,
    reduce: int = 2,
    accumulation: int = 1,
    shard_size: int | None = None,
) -> float:
    """Seconds of collectives per update on `count` parameters in `units` sharded blocks.

    `gather` and `reduce` are bytes of a gathered weight and a reduced gradient, B the bytes/s of the slowest link of a
    ring over W processes, s the processes that share one copy, k the micro-batches of an update:

    ddp          2 · reduce · P (W-1)/W / B
    zero1, zero2 the same and gather · P (W-1)/W / B; zero2 reduces k times
    fsdp2        (2 k gather + reduce) · P (W-1)/W / B + (2 k + 1) · units (W-1) · hop; zero3 reduces k times
    hsdp         fsdp2 over s, and 2 · reduce · P (W/s-1)/(W/s) / B' once per node, B' = nic · efficiency

    All gradient reduction but that of zero2 and zero3 waits for the last micro-batch.
    """
    world = cluster.world
    if world == 1 or engine == "single":
        return 0.0
    if engine in ("ddp", "zero1", "zero2"):
        times = accumulation if engine == "zero2" else 1
        sent = (2 * reduce * times + (0 if engine == "ddp" else gather)) * count
        return one_pass(sent, 0, world, cluster)
    shards = shard_degree(engine, world, cluster.gpus_per_node, shard_size)
    reductions = accumulation if engine == "zero3" else 1
    seconds = 2 * accumulation * one_pass(gather * count, units, shards, cluster)
    seconds += reductions * one_pass(reduce * count, units, shards, cluster)
    replicas = world / shards
    if replicas > 1:
        # Each process reduces its piece over the replicas; those of a node share its network cards.
        piece = 2 * reduce * count / shards * (replicas - 1) / replicas
        inside = world <= cluster.gpus_per_node
        shared = piece * min(shards, cluster.gpus_per_node) / (cluster.nic * cluster.efficiency)
        seconds += piece / cluster.nvlink if inside else shared
    return seconds


def step_seconds(compute: float, seconds: float, overlap: float) -> float:
    """Time of an update: computing, and the communication it does not hide; never less than either."""
    return max(compute + (1 - overlap) * seconds, seconds)


def young(stall: float, mtbf: float) -> float:
    """Seconds between checkpoints that lose least: sqrt(2 · stall · mean time between failures) (Young, 1974)."""
    return math.sqrt(2 * stall * mtbf)
