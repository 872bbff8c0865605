"""Bytes of one process by what they are for, as formulas of the configuration."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from foundation.config import Config
from foundation.models.families import Rows, shapes, size
from foundation.planning.activations import activations, batch_bytes, widths

CONTEXT = 1.5e9  # CUDA context, cuBLAS workspaces and NCCL channels of one process: assumed
MARGIN = 0.10  # share of everything else that the allocator loses to fragmentation: assumed
BUCKET, LIVE = 500_000_000, 1_000_000_000  # elements of DeepSpeed's reduce bucket and of stage 3's gathered weights


class Memory(NamedTuple):
    """Bytes of one process on its device, by term; `host` is what offloading moves to the memory of the node."""

    parameters: float
    gradients: float
    optimizer: float
    ema: float
    copies: float
    """low-precision weights: all of them under autocast or ZeRO, gathered blocks under FSDP"""
    buffers: float
    activations: float
    batch: float
    margin: float
    host: float = 0.0

    @property
    def total(self) -> float:
        """On the device."""
        return sum(self) - self.host

    @property
    def state(self) -> float:
        """What grows with the parameters: all but activations, batch and margin."""
        return self.parameters + self.gradients + self.optimizer + self.ema + self.copies + self.buffers


def share(tensors: Iterable[Rows], shards: int, index: int = 0) -> int:
    """Elements that process `index` of `shards` holds when FSDP2 cuts these parameters by rows.

    The first processes get ceil(rows / shards) rows of each, one gets the rest, the others none: the first holds most.
    """
    found = 0
    for rows, elements in tensors:
        most = -(-rows // shards)
        found += max(0, min(most, rows - index * most)) * elements
    return found


def padded(tensors: Iterable[Rows], engine: str, shards: int) -> int:
    """Elements that gathering moves: under fsdp2 and hsdp every process sends as many as the first one holds."""
    return shards * share(tensors, shards) if engine in ("fsdp2", "hsdp") else size(tensors)


def shard_degree(engine: str, world: int, gpus_per_node: int, shard_size: int | None) -> int:
    """Processes that share one copy of what the engine shards."""
    if engine in ("single", "ddp"):
        return 1
    return min(world, shard_size or gpus_per_node) if engine == "hsdp" else world


def memory(
    config: Config, engine: str, micro_batch: int, accumulation: int, world: int, gpus_per_node: int, device: str
) -> Memory:
    """The terms for an engine. P parameters, shard degree s, width e of the arithmetic (4 for fp32, 2 for bf16).

    single, ddp: fp32 weights, gradients and two moments, 16 P; bf16 adds autocast's copy of the weights, 2 P, which it
    keeps of trained ones alone.
    fsdp2, hsdp: 16 P / s, where P is what it is with the rows of every parameter rounded up to a multiple of s, since
    processes hold whole rows; two gathered blocks and all outside blocks in e bytes, the gradients of as many in fp32;
    with accumulation gradients stay whole between micro-batches, 4 P more.
    zero1..3: the working weights (e P; zero3: / s) and gradients (e P; zero2 and zero3: / s) and 12 P / s of fp32
    master and moments; two buckets of at most 5e8 gradients and one more in fp32; zero3: at most 1e9 gathered weights.
    A teacher has weights in fp32, and neither gradients nor moments.
    EMA: 4 P / s of fp32 where weights are sharded, else 4 P. Offload moves the optimiser, for fsdp2 and hsdp also
    weights and gradients, to the host. Margin: 10 % of the rest and, on a GPU, 1.5 GB.
    """
    train, s = config.train, shapes(config)
    shards = shard_degree(engine, world, gpus_per_node, train.shard_size)
    e, count = widths(train.precision, device).element, float(padded(s.trained, engine, shards))
    followed = float(padded(s.teacher, engine, shards))
    weights = gradients = 4 * count / (shards if engine in ("fsdp2", "hsdp") else 1)
    moments, copies, buffers = 2 * weights, 0.0, 0.0
    if engine in ("fsdp2", "hsdp"):
        root, frozen, *blocks = (padded(p, engine, shards) for p in (s.root, s.frozen, s.block, s.decoder_block))
        live = 2.0 * max(blocks) + root
        copies, buffers = e * (live + frozen), 4 * live
        gradients += 4 * count if accumulation > 1 and shards > 1 else 0.0
    elif engine.startswith("zero"):
        weights = e * count / (shards if engine == "zero3" else 1)
        gradients = e * count / (1 if engine == "zero1" else shards)
        moments = 12 * count / shards
        copies = e * min(count, LIVE) if engine == "zero3" else 0.0
        buffers = (2.0 * e + 4) * min(count, BUCKET)
    elif e < 4:
        copies = e * count
    spread = shards if engine in ("fsdp2", "hsdp", "zero3") else 1
    weights += 4 * followed / spread
    ema = 4 * count / spread if config.optim.ema_half_life else 0.0
    host = 0.0
    if train.offload and engine not in ("single", "ddp"):
        host, moments = moments, 0.0
        if engine in ("fsdp2", "hsdp"):
            host, weights, gradients = host + weights + gradients, 0.0, 0.0
    used = activations(config, micro_batch, device, engine in ("single", "ddp")).total
    batch = batch_bytes(config, micro_batch)
    subtotal = weights + gradients + moments + ema + copies + buffers + used + batch
    margin = MARGIN * subtotal + (CONTEXT if device == "cuda" else 0.0)
    return Memory(weights, gradients, moments, ema, copies, buffers, used, batch, margin, host)
