"""A run on a cluster, as far as it can be known before it starts.

What would make the run fail is collected, not raised: the first error of a job is rarely the last.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from foundation.config import Config
from foundation.errors import ExplainedError
from foundation.planning.cluster import GPUS, Cluster
from foundation.planning.engines import (
    GB,
    Candidate,
    Choice,
    candidate,
    compute_seconds,
    divisors,
    engine_problems,
    fitting,
    recommend,
    startable,
)
from foundation.planning.figures import (
    Figure,
    batch_figures,
    checkpoint_figures,
    data_figures,
    interval_warning,
    memory_figures,
    model_figures,
    schedule_figures,
    speed_figures,
)
from foundation.planning.validation import scaling_checks, table_checks
from foundation.training.data import order_of, training_catalog
from shards.catalog import Catalog
from shards.order import check_division


@dataclass(frozen=True)
class Plan:
    """Everything the planner found; without problems the run can start."""

    engine: str
    figures: list[Figure] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def figure(self, name: str) -> Any:
        """The value of a figure by its name."""
        return next(f.value for f in self.figures if f.name == name)

    def to_json(self) -> dict[str, Any]:
        """Plain types, with the published points beside their predictions."""
        checks = [{**c._asdict(), "deviation": c.deviation} for c in (*table_checks(), *scaling_checks())]
        candidates = [
            {**c._asdict(), "memory": {**c.memory._asdict(), "total": c.memory.total}} for c in self.candidates
        ]
        figures = [f._asdict() for f in self.figures]
        return {**asdict(self), "figures": figures, "candidates": candidates, "validation": checks}


def one_line(error: ExplainedError) -> str:
    """An error as one line: what, where, and what to do."""
    where = f" ({error.where})" if error.where and error.where not in error.what else ""
    return f"{error.what}{where}" + (f"; {error.do}" if error.do else "")


def division_problems(config: Config, world: int) -> list[str]:
    """Why this many processes cannot share the batches of a run, exactly where training refuses, and what would fit."""
    train, lanes = config.train, config.data.lanes
    try:
        check_division(train.global_batch, lanes, 0, world, train.micro_batch or 1)
    except ExplainedError as error:
        return [f"{error.what}; {division_advice(config, world)}"]
    return []


def nearest(step: int, value: int) -> int:
    """The multiple of `step` that is nearest to a value, the larger of two, at least one step."""
    return max(1, (value + step // 2) // step) * step


def division_advice(config: Config, world: int) -> str:
    """The nearest number of processes that these batches allow, and the nearest batches for so many processes."""
    train, lanes = config.train, config.data.lanes
    batch, micro = train.global_batch, train.micro_batch
    counts = [] if batch % lanes else [d for d in divisors(lanes) if batch // d % (micro or 1) == 0]
    found = {"data.lanes": nearest(world, lanes)}
    found["train.global_batch"] = nearest(found["data.lanes"], batch)
    share = found["train.global_batch"] // world
    if micro:
        found["train.micro_batch"] = next(d for d in divisors(share) if d <= micro)
    now = {"data.lanes": lanes, "train.global_batch": batch, "train.micro_batch": micro}
    text = "set " + " ".join(f"{key}={value}" for key, value in found.items() if value != now[key])
    if lanes != found["data.lanes"]:
        text += ", which changes the order of the data"
    if not counts:
        return text
    return f"start {min(counts, key=lambda d: abs(d - world))} processes, or {text}"


def open_catalog(config: Config) -> tuple[Catalog | None, str]:
    """The training catalog and '', or None and why it cannot be used; overlap with tests is left to the audit."""
    try:
        catalog = training_catalog(config)
        order_of(config, catalog)
    except ExplainedError as error:
        return None, one_line(error)
    return catalog, ""


def plan(
    config: Config, cluster: Cluster, *, data: bool = True, mtbf_hours: float | None = None, disk: float = 2e9
) -> Plan:
    """Everything about this run on this cluster.

    data: whether to open the catalog. mtbf_hours: mean time between failures of the whole cluster; None: one in 50,676
    GPU hours. disk: bytes/s with which a node writes checkpoints.
    """
    problems, warnings = division_problems(config, cluster.world), list[str]()
    undivided = bool(problems)
    problems += map(one_line, engine_problems(config, cluster))
    share = max(1, config.train.global_batch // cluster.world)
    micro = min(config.train.micro_batch or share, share)
    best = recommend(config, cluster, micro)
    chosen = config.train.engine
    engine = best.engine if chosen == "auto" else chosen
    engines = dict.fromkeys([*startable(config, cluster), engine])
    candidates = [candidate(config, cluster, name, micro) for name in engines]
    mine = next(c for c in candidates if c.engine == engine)
    if not mine.fits:
        problems.append(too_large(config, cluster, mine, micro, best))
    if chosen == "auto" and engine not in ("single", "ddp"):
        warnings.append(f"train.engine=auto is ddp under torchrun; set train.engine={engine}, as planned here")
    warnings += faster(candidates, mine)
    if cluster.nodes > 1 and cluster.world % cluster.gpus_per_node:
        warnings.append(f"{cluster.world} processes fill {cluster.nodes} nodes of {cluster.gpus_per_node} unevenly")
    figures = [
        *model_figures(config),
        *batch_figures(config, cluster, micro),
        *memory_figures(config, mine, cluster, micro),
    ]
    # Without whole batches there is no update to time.
    if not undivided:
        figures += speed_figures(config, cluster, mine)
        figures += (kept := checkpoint_figures(config, cluster, mine, mtbf_hours, disk))
        warnings += interval_warning(config, mine, kept)
        if (compute := compute_seconds(config, cluster)) < mine.step / 1.5:
            warnings.append(
                f"processes compute for {compute / mine.step:.0%} of an update and wait for each other else: give each "
                f"more than {share} images (a larger train.global_batch, or fewer processes)"
            )
    figures.append(Figure("engine", "recommended engine", best.engine, "", "derived", best.reason))
    figures += schedule_figures(config)
    if data:
        catalog, why = open_catalog(config)
        problems += [why] if why else []
        figures += data_figures(config, catalog, None if undivided else mine.images_per_s / cluster.nodes)
    else:
        figures.append(Figure("data", "catalog", "not opened", "", "assumed", "asked not to"))
    return Plan(engine, figures, candidates, problems, warnings)


def faster(candidates: list[Candidate], mine: Candidate) -> list[str]:
    """That another engine which fits as it is would be faster by more than a tenth."""
    best = max((c for c in candidates if c.fits), key=lambda c: c.images_per_s, default=mine)
    if not mine.fits or best.images_per_s < 1.1 * mine.images_per_s:
        return []
    more = best.images_per_s / mine.images_per_s - 1
    return [
        f"train.engine={best.engine} fits too, with {best.memory.total / GB:.1f} GB, and is {more:.0%} faster by these "
        f"formulas; measure both"
    ]


def too_large(config: Config, cluster: Cluster, mine: Candidate, micro: int, best: Choice) -> str:
    """That the engine does not fit, and the smallest change that helps."""
    room = GPUS[cluster.gpu].memory / GB
    what = f"{mine.engine} needs {mine.memory.total / GB:.1f} GB per process, {cluster.gpu} has {room:.0f}"
    option = fitting(config, cluster, mine.engine, micro)
    if option is None and not best.micro_batch:
        return f"{what}; use more processes or a larger GPU"
    _, size, mode = option or (mine, best.micro_batch, best.checkpointing)
    changes = {"engine": mine.engine if option else best.engine, "micro_batch": size, "activation_checkpointing": mode}
    same = {
        "engine": mine.engine,
        "micro_batch": micro,
        "activation_checkpointing": config.train.activation_checkpointing,
    }
    return f"{what}; {' '.join(f'train.{key}={value}' for key, value in changes.items() if value != same[key])} fits"
