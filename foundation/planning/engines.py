"""Engines on a cluster: what each needs and takes, which fits, and which one the rule prefers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from foundation.config import Config
from foundation.errors import ConfigError, ExplainedError
from foundation.models.families import FAMILY, flops, parameters, shapes
from foundation.planning.activations import widths
from foundation.planning.cluster import GPUS, Cluster, communication, one_pass, step_seconds
from foundation.planning.memory import Memory, memory, padded, shard_degree
from foundation.training.refusals import meant, refusals, sums_in_bf16

REPLICATED_UP_TO = 2e9  # parameters: beyond, 16 bytes each leave too little of a GPU to a replica
GB = 1e9


class Candidate(NamedTuple):
    """An engine on this cluster: bytes of one process, seconds of communication and of an update, images/s in all."""

    engine: str
    memory: Memory
    fits: bool
    communication: float
    step: float
    images_per_s: float


def divisors(number: int) -> list[int]:
    """All divisors, the largest first."""
    return [d for d in range(number, 0, -1) if number % d == 0]


def peak(config: Config, cluster: Cluster) -> float:
    """Dense FLOP/s of the GPU in the arithmetic of the run."""
    gpu = GPUS[cluster.gpu]
    if config.train.precision == "fp32":
        return gpu.fp32
    return gpu.fp8 if config.train.float8 and gpu.fp8 else gpu.bf16


def compute_seconds(config: Config, cluster: Cluster) -> float:
    """Seconds of arithmetic in an update: FLOP of its images over mfu · peak; full checkpointing: a forward pass more.

    A teacher, which has no backward pass, is not recomputed. Selective checkpointing repeats no product, so it counts
    as free here.
    """
    f = flops(config)
    work = f.training + (f.forward - f.teacher if config.train.activation_checkpointing == "full" else 0)
    return work * config.train.global_batch / cluster.world / (cluster.mfu * peak(config, cluster))


def candidate(config: Config, cluster: Cluster, engine: str, micro: int) -> Candidate:
    """An engine with micro-batches of this size."""
    share = config.train.global_batch // cluster.world
    steps = max(1, share // micro)
    need = memory(config, engine, micro, steps, cluster.world, cluster.gpus_per_node, cluster.device)
    e = widths(config.train.precision, cluster.device).element
    units = FAMILY[config.model.size].depth + config.model.decoder.depth
    # Gradients meet in fp32 in every engine; gathered weights have the width of the arithmetic.
    shards = shard_degree(engine, cluster.world, cluster.gpus_per_node, config.train.shard_size)
    options: dict[str, Any] = {"gather": e, "accumulation": steps, "shard_size": config.train.shard_size}
    s = shapes(config)
    seconds = communication(engine, padded(s.trained, engine, shards), units, cluster, reduce=4, **options)
    if s.teacher and engine in ("fsdp2", "hsdp", "zero3"):  # gathered for forward passes alone
        seconds += steps * one_pass(e * padded(s.teacher, engine, shards), s.depth, shards, cluster)
    step = step_seconds(compute_seconds(config, cluster), seconds, cluster.overlap)
    fits = need.total <= GPUS[cluster.gpu].memory
    return Candidate(engine, need, fits, seconds, step, config.train.global_batch / step)


def startable(config: Config, cluster: Cluster) -> list[str]:
    """Engines that so many processes can form and that take the run, the simplest first; all, where none takes it.

    hsdp needs several whole groups.
    """
    if cluster.world == 1:
        return ["single"]
    group = shard_degree("hsdp", cluster.world, cluster.gpus_per_node, config.train.shard_size)
    grouped = 1 < group < cluster.world and cluster.world % group == 0
    engines = ["ddp", "zero1", "zero2", *(["hsdp"] if grouped else []), "fsdp2", "zero3"]
    return [engine for engine in engines if not any(refused(config, cluster, engine))] or engines


def refused(config: Config, cluster: Cluster, engine: str) -> Iterator[ExplainedError]:
    """What training says when it starts on this cluster."""
    yield from refusals(config, engine, cluster.world, min(cluster.world, cluster.gpus_per_node))


def preferred(config: Config, cluster: Cluster) -> list[str]:
    """Those among them that the rule considers, in its order.

    Replicas, then ZeRO-1 and 2, up to 2 B parameters; above, shards inside a node (hsdp); shards over all processes
    only when those do not fit.
    """
    engines = startable(config, cluster)
    if cluster.world == 1 or parameters(config).total <= REPLICATED_UP_TO:
        return engines
    return [engine for engine in engines if engine not in ("ddp", "zero1", "zero2")]


class Choice(NamedTuple):
    """An engine, micro-batch and checkpointing that fit, and why these; a micro-batch of 0: nothing fits."""

    engine: str
    micro_batch: int
    checkpointing: str
    reason: str


def with_checkpointing(config: Config, mode: str) -> Config:
    """The same run with another activation checkpointing."""
    return config.model_copy(update={"train": config.train.model_copy(update={"activation_checkpointing": mode})})


def fitting(config: Config, cluster: Cluster, engine: str, micro: int) -> tuple[Candidate, int, str] | None:
    """How an engine fits, changing as little as possible: (candidate, micro-batch, checkpointing), or None.

    Replicas take smaller micro-batches first, since accumulating costs them nothing; shards recompute first, since
    accumulating costs them whole gradients and more gathers. None is a micro-batch that the engine refuses.
    """
    now, share = config.train.activation_checkpointing, config.train.global_batch // cluster.world
    smaller = [d for d in divisors(share) if d < micro]
    replicas = engine in ("single", "ddp", "zero1", "zero2")
    first = [(d, now) for d in smaller] if replicas else [(micro, "full")]
    for size, mode in ((micro, now), *first, *((d, "full") for d in (micro, *smaller))):
        if sums_in_bf16(config, engine, share // size):
            continue
        found = candidate(with_checkpointing(config, mode), cluster, engine, size)
        if found.fits:
            return found, size, mode
    return None


def recommend(config: Config, cluster: Cluster, micro: int) -> Choice:
    """The first engine of the rule that fits, and how."""
    order, billions = preferred(config, cluster), parameters(config).total / 1e9
    for engine in order:
        if option := fitting(config, cluster, engine, micro):
            found, size, mode = option
            rule = {
                "single": "one process",
                "ddp": f"{billions:.2f} B parameters: up to 2 B a replica each",
                "hsdp": f"{billions:.1f} B parameters: above 2 B shards inside a node",
            }.get(engine, f"{billions:.1f} B parameters")
            if engine != order[0]:
                rule += f"; {', '.join(order[: order.index(engine)])} would not fit"
            room = f"{found.memory.total / GB:.1f} of {GPUS[cluster.gpu].memory / GB:.0f} GB"
            return Choice(engine, size, mode, f"{rule}; {room} at micro-batch {size}, checkpointing {mode}")
    return Choice(order[-1], 0, "full", "no engine fits this GPU, even with one image at a time and all recomputed")


def engine_problems(config: Config, cluster: Cluster) -> Iterator[ExplainedError]:
    """What the configured engine refuses, whatever the memory; auto is what it is under torchrun."""
    yield from refused(config, cluster, meant(config.train.engine, cluster.world))
    if config.train.float8 and not GPUS[cluster.gpu].fp8:
        yield ConfigError(
            f"train.float8 needs a GPU that has it; {cluster.gpu} does not",
            where="train.float8",
            do="use another GPU, or train.float8=false",
        )
