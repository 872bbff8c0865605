"""The numbers of a plan, each with how it is known: measured, derived by a formula, or assumed."""

from __future__ import annotations

from typing import Literal, NamedTuple

from foundation.config import Config
from foundation.models.families import flops, parameters, tokens
from foundation.planning.activations import activations
from foundation.planning.cluster import FAILURE_HOURS, GPUS, Cluster, young
from foundation.planning.engines import GB, Candidate, compute_seconds, peak, with_checkpointing
from foundation.planning.memory import shard_degree
from foundation.training.data import last_position
from foundation.training.optim import lr_at
from shards.catalog import Catalog

Tag = Literal["measured", "given", "derived", "assumed"]
DAY = 86_400.0
BARS = "▁▂▃▄▅▆▇█"
COPY = 5e9  # bytes/s with which a process copies its state to host memory that is not pinned: assumed


class Figure(NamedTuple):
    """One number or word of the plan."""

    section: str
    name: str
    value: float | str
    unit: str
    tag: Tag
    note: str = ""


def model_figures(config: Config) -> list[Figure]:
    """Size and arithmetic."""
    p, f, t = parameters(config), flops(config), tokens(config)
    name = f"{config.model.size}/{config.model.patch}"
    and_teacher = f", {p.teacher:,} of them of the teacher, which is not trained" if p.teacher else ""
    passed = "all pass encoder" + " and decoder" * bool(config.model.decoder.depth)
    if t.blocks:
        passed = f"all pass the teacher, {t.visible} the encoder, {t.blocks} x {t.decoded} the predictor; means"
    elif t.visible is not None:
        passed = f"all pass the decoder, {t.windows * t.visible} visible ones the encoder"
    return [
        Figure("model", "parameters", p.total, "", "derived", f"{name} with decoder{and_teacher}"),
        Figure("model", "tokens per image", t.windows * t.length, "", "derived", passed),
        Figure("model", "forward per image", f.forward / 1e9, "GFLOP", "derived", "matrix products"),
        Figure(
            "model",
            "training per image",
            f.training / 1e9,
            "GFLOP",
            "derived",
            "three forward passes" + " but of the teacher" * bool(t.blocks),
        ),
    ]


def batch_figures(config: Config, cluster: Cluster, micro: int) -> list[Figure]:
    """The batch arithmetic."""
    train = config.train
    share, rest = divmod(train.global_batch, cluster.world)
    divides = not rest and share % micro == 0
    text = (
        f"{cluster.world} x {micro} x {share // micro} (processes x micro x accum.)" if divides else "does not divide"
    )
    updates = last_position(config) // train.global_batch
    return [
        Figure("batch", "global batch", train.global_batch, "images", "derived", text),
        Figure("batch", "updates", updates, "", "derived", f"{train.samples:,} samples, rounded up to whole batches"),
        Figure("batch", "lanes per process", config.data.lanes / cluster.world, "", "derived"),
    ]


def memory_figures(config: Config, mine: Candidate, cluster: Cluster, micro: int) -> list[Figure]:
    """Bytes of one process by term, and what its activations are with and without checkpointing."""
    need, room, mode = mine.memory, GPUS[cluster.gpu].memory, config.train.activation_checkpointing
    autocast = mine.engine in ("single", "ddp")
    kept = {
        each: activations(with_checkpointing(config, each), micro, cluster.device, autocast)
        for each in ("none", "selective", "full")
    }
    others = ", ".join(f"{each} {a.total / GB:.3g}" for each, a in kept.items() if each != mode)
    notes = {
        "parameters": "the process with the most rows" if mine.engine in ("fsdp2", "hsdp") else "",
        "activations": f"checkpointing {mode}; {others}",
        "margin": "10 % fragmentation" + (", 1.5 GB of context" if cluster.device == "cuda" else ""),
    }
    found = [
        Figure("memory", name, value / GB, "GB", "assumed" if name == "margin" else "derived", notes.get(name, ""))
        for name, value in need._asdict().items()
        if value
    ]
    place = next(i for i, figure in enumerate(found) if figure.name == "activations") + 1
    found.insert(place, Figure("memory", "of them RPE", kept[mode].positions / GB, "GB", "derived", "bias and table"))
    note = f"{mine.engine}; {cluster.gpu} has {room / GB:.0f} GB"
    return [*found, Figure("memory", "total per process", need.total / GB, "GB", "derived", note)]


def speed_figures(config: Config, cluster: Cluster, mine: Candidate) -> list[Figure]:
    """Time of an update and of the run."""
    compute, most = compute_seconds(config, cluster), peak(config, cluster)
    precision = "float8" if config.train.float8 else config.train.precision
    used = flops(config).training * mine.images_per_s / cluster.world / most
    days = last_position(config) / mine.images_per_s / DAY
    sheet = f"of {most / 1e12:g} TFLOP/s in {precision}, the data sheet's"
    network = f"per node, all cards; {cluster.efficiency:.0%} of the sheet's"
    return [
        Figure("speed", "MFU while computing", cluster.mfu, "", cluster.known("mfu"), sheet),
        Figure(
            "speed", "overlap", cluster.overlap, "", cluster.known("overlap"), "share of comm. that computing hides"
        ),
        Figure(
            "speed", "NVLink", cluster.nvlink / GB, "GB/s", cluster.known("nvlink"), "as a ring inside a node sees it"
        ),
        Figure("speed", "network", cluster.nic * cluster.efficiency / GB, "GB/s", cluster.known("nic"), network),
        Figure("speed", "compute", compute * 1e3, "ms", "derived", "per update"),
        Figure("speed", "communication", mine.communication * 1e3, "ms", "derived", mine.engine),
        Figure("speed", "update", mine.step * 1e3, "ms", "derived"),
        Figure(
            "speed",
            "images per second",
            mine.images_per_s,
            "",
            "derived",
            f"{mine.images_per_s / cluster.world:,.0f} each",
        ),
        Figure("speed", "MFU", used, "", "derived", "with communication; recomputed passes do not count"),
        Figure("speed", "days", days, "", "derived", f"{days * 24 * cluster.world:,.1f} GPU hours"),
    ]


def checkpoint_figures(
    config: Config, cluster: Cluster, mine: Candidate, mtbf_hours: float | None, disk: float
) -> list[Figure]:
    """Size, stall and interval of checkpoints, beside Young's interval."""
    ema, train = config.optim.ema_half_life, config.train
    p = parameters(config)
    size = (p.total - p.teacher) * (16 if ema else 12) + 4 * p.teacher
    pieces = shard_degree(mine.engine, cluster.world, cluster.gpus_per_node, train.shard_size)
    # Replicas, and ZeRO, which gathers tensor by tensor, copy everything in every process.
    copy, write = size / (pieces if mine.engine in ("fsdp2", "hsdp") else 1) / COPY, size / cluster.nodes / disk
    stall = copy if train.async_checkpoint else copy + write
    hours = mtbf_hours or FAILURE_HOURS / cluster.world
    # A second save waits for the first.
    best, every = max(young(stall, hours * 3600), write), train.checkpoint_every / mine.images_per_s
    lost = stall / every + every / (2 * hours * 3600)
    waits = f"the copy to the host, {COPY / GB:g} GB/s" + ("" if train.async_checkpoint else ", and the writing")
    failing: Tag = "given" if mtbf_hours else "assumed"
    return [
        Figure("checkpoint", "size", size / GB, "GB", "derived", "fp32 weights, two moments" + ", average" * bool(ema)),
        Figure("checkpoint", "stall", stall, "s", "assumed", waits),
        Figure("checkpoint", "writing", write, "s", "assumed", f"{disk / GB:g} GB/s from each node"),
        Figure("checkpoint", "between failures", hours, "h", failing, "" if mtbf_hours else "one in 50,676 GPU hours"),
        Figure("checkpoint", "Young interval", best / 60, "min", "derived", "or the writing, where that takes longer"),
        Figure("checkpoint", "interval", every / 60, "min", "derived", f"{train.checkpoint_every:,} samples"),
        Figure("checkpoint", "time lost", lost, "", "derived", "share, to checkpoints and failures"),
    ]


def interval_warning(config: Config, mine: Candidate, kept: list[Figure]) -> list[str]:
    """What to do about checkpoints at twice or half Young's interval, where that costs over 0.1 % of the time.

    An interval longer than the run is the whole run.
    """
    value, end = {f.name: float(f.value) for f in kept}, last_position(config)
    best, every = min(value["Young interval"], end / mine.images_per_s / 60), value["interval"]
    extra = value["time lost"] - value["stall"] / (best * 60) - best / (120 * value["between failures"])
    alone = config.train.checkpoint_every >= end
    if best / 2 <= every <= 2 * best or extra < 1e-3 or (alone and every > best):
        return []
    samples = max(config.train.global_batch, round(best * 60 * mine.images_per_s))
    return [
        f"train.checkpoint_every is {every:.3g} min, Young's interval {value['Young interval']:.3g} min: it loses "
        f"{extra:.1%} of the time more than train.checkpoint_every={samples} would"
    ]


def schedule_figures(config: Config) -> list[Figure]:
    """The learning rate at the points one looks at first."""
    total, warm = config.train.samples, config.optim.warmup_samples
    points = [
        ("start", 0.0),
        ("end of warm-up", warm),
        *((f"{q} of 4", total * q / 4) for q in (1, 2, 3)),
        ("end", total),
    ]
    found = [
        Figure("schedule", f"lr, {name}", lr_at(config, at), "", "derived", f"{at:,.0f} samples") for name, at in points
    ]
    return [*found, Figure("schedule", "lr, curve", "", "", "derived", curve(config))]


def curve(config: Config, columns: int = 32) -> str:
    """The learning rate over the run as a line of bars, from 0 to its largest value."""
    values = [lr_at(config, config.train.samples * (i + 0.5) / columns) for i in range(columns)]
    top = max(values)
    return "".join(BARS[round(value / top * (len(BARS) - 1))] for value in values)


def data_figures(config: Config, catalog: Catalog | None, rate: float | None) -> list[Figure]:
    """How often the run sees each source, and what a node reads at `rate` images/s; or that the catalog is closed."""
    if catalog is None:
        return [Figure("data", "catalog", "not opened", "", "assumed", "no coverage without it")]
    weights, end = config.data.weights, last_position(config)
    whole = sum(weights.values()) or 1.0
    found = [Figure("data", "samples", catalog.samples, "", "measured", f"{end / catalog.samples:,.1f} passes")]
    for source in catalog.sources:
        part = weights.get(source.name, 0.0) / whole if weights else source.samples / catalog.samples
        note = f"{part:.1%} of the stream, {source.samples:,} samples, {len(source.shards)} shard(s)"
        found.append(Figure("data", source.name, end * part / max(1, source.samples), "passes", "derived", note))
    if rate:
        shards = [shard for source in catalog.sources for shard in source.shards]
        each = sum(shard.bytes for shard in shards) / max(1, sum(shard.samples for shard in shards))
        found.append(
            Figure("data", "read per node", each * rate / GB, "GB/s", "derived", f"{each:,.0f} bytes an image")
        )
    return found
