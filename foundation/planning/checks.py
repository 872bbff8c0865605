"""Checks beyond formulas: the shards and the data order of a cluster, made on one machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from foundation.config import Config
from foundation.planning.cluster import Cluster
from foundation.planning.lanes import dealt, first_middle_last, mixture, peak_bytes
from foundation.planning.plan import Plan, division_problems, open_catalog

MB = 1e6


class Checked(NamedTuple):
    """A table, what it cost, and whether everything in it agrees."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    cost: str
    passed: bool

    def to_json(self) -> dict[str, Any]:
        """Plain types: rows as dictionaries."""
        rows = [dict(zip(self.header, row, strict=True)) for row in self.rows]
        return {"title": self.title, "rows": rows, "cost": self.cost, "passed": self.passed}


def shard_check(config: Config, cluster: Cluster, plan: Plan) -> Checked:
    """What the first and the last rank hold of the model under the planned engine; fsdp2, where that does not shard."""
    from foundation.planning.sharding import held  # seconds of imports

    engine, world = plan.engine if plan.engine in ("fsdp2", "hsdp") else "fsdp2", cluster.world
    begin = time.perf_counter()
    found = held(config, engine, world, cluster.gpus_per_node, sorted({0, world - 1}))
    seconds = time.perf_counter() - begin
    rows = [
        (
            f"{h.rank}",
            f"{h.tensors}",
            f"{h.empty}",
            f"{h.elements:,}",
            f"{4 * h.elements / MB:,.2f}",
            f"{16 * h.elements / MB:,.2f}",
            f"{h.elements - h.formula:,}",
        )
        for h in found
    ]
    header = ("rank", "tensors", "empty", "parameters", "MB in fp32", "with gradient, moments", "off the formula")
    title = f"shards: {config.model.size} under {engine}, 1 of {world} processes at a time"
    cost = f"{seconds:.1f} s; no parameter has memory and nothing is sent"
    return Checked(title, header, rows, cost, all(h.elements == h.formula for h in found))


def order_check(config: Config, cluster: Cluster, data: bool) -> Checked:
    """Whether all ranks together read what one rank reads, every lane by one of them, at three steps of the run."""
    world, batch, lanes = cluster.world, config.train.global_batch, config.data.lanes
    header = ("update", "positions", "as on one rank", "lanes", "of one rank each", "us per rank")
    title = f"order: {world} ranks, global batch {batch}, {lanes} lanes"
    if division_problems(config, world):
        return Checked(title, header, [], "not dealt out, since the ranks cannot share the batches", False)
    catalog = open_catalog(config)[0] if data else None
    found = dealt(config, mixture(config, catalog), world, first_middle_last(config))
    rows = [
        tuple(f"{value:,.0f}" for value in (d.step, d.samples, d.agree, lanes, d.lanes_once, d.seconds / world * 1e6))
        for d in found
    ]
    what = f"{catalog.samples:,} samples" if catalog else "a stand-in of 10^9 samples, no catalog being open"
    cost = f"{sum(d.seconds for d in found):.1f} s, {peak_bytes(config, catalog, world) / MB:.1f} MB per rank, {what}"
    return Checked(title, header, rows, cost, all(d.agree == batch and d.lanes_once == lanes for d in found))
