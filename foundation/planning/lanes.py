"""The data order of a large cluster, on one machine: what every one of its ranks would read, rank after rank."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from foundation.config import Config
from foundation.training.data import last_position, order_of
from shards.catalog import Catalog
from shards.order import Mixture, rank_positions

STAND_IN = np.full(128_000, 7_812)  # 10^9 chips in shards of 512 MB, where no catalog is open


class Dealt(NamedTuple):
    """A global step dealt out to all ranks, beside the same step on one rank."""

    step: int
    samples: int
    agree: int
    """positions whose sample is the one that a single rank reads there, and which exactly one rank reads"""
    lanes_once: int
    """lanes that belong to exactly one rank"""
    seconds: float
    """for all ranks, one after another"""


def mixture(config: Config, catalog: Catalog | None) -> Mixture:
    """The order of a run, or without a catalog that of a stand-in of 10^9 chips."""
    if catalog is None:
        return Mixture([("stand-in", STAND_IN)], None, config.seed, config.data.lanes, config.data.block_shards)
    return order_of(config, catalog)


def dealt(config: Config, order: Mixture, world: int, steps: Sequence[int]) -> list[Dealt]:
    """Deal these global steps to `world` ranks. Raises DataError when they cannot share the batches evenly."""
    batch, lanes = config.train.global_batch, config.data.lanes
    found = []
    for step in steps:
        alone = order.sample_ids(rank_positions(step, batch, lanes, 0, 1))
        ids, reads, owners = np.full(batch, -1), np.zeros(batch, np.int64), np.zeros(lanes, np.int64)
        begin = time.perf_counter()
        for rank in range(world):
            positions = rank_positions(step, batch, lanes, rank, world)
            ids[positions - step * batch] = order.sample_ids(positions)
            reads[positions - step * batch] += 1
            owners[np.unique(positions % lanes)] += 1
        seconds = time.perf_counter() - begin
        agree = int(((ids == alone) & (reads == 1)).sum())
        found.append(Dealt(step, batch, agree, int((owners == 1).sum()), seconds))
    return found


def first_middle_last(config: Config) -> tuple[int, ...]:
    """Global steps at which to look."""
    last = last_position(config) // config.train.global_batch - 1
    return tuple(sorted({0, last // 2, last}))


def peak_bytes(config: Config, catalog: Catalog | None, world: int) -> int:
    """The largest memory of Python and NumPy while the last of `world` ranks makes the order and reads one step."""
    tracemalloc.start()
    order = mixture(config, catalog)
    order.sample_ids(rank_positions(0, config.train.global_batch, config.data.lanes, world - 1, world))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak
