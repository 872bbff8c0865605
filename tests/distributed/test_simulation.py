"""Clusters that are not there: shards of 512 ranks and the data order of 4,096, on one machine."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from processes import ROOT, finish, start

from foundation.config import Config, from_dict
from foundation.errors import LaunchError
from foundation.models.families import FAMILY, parameters, shapes
from foundation.planning.checks import order_check
from foundation.planning.cluster import Cluster
from foundation.planning.lanes import dealt, mixture, peak_bytes
from foundation.planning.sharding import alone, held
from shards.errors import DataError
from shards.order import Mixture


def recipe(size: str, lanes: int = 512) -> Config:
    """The published recipe in another size, for many processes."""
    train = {"global_batch": 2 * lanes, "precision": "bf16"}
    return from_dict({"model": {"size": size}, "data": {"lanes": lanes}, "train": train})


def rows(h: Any, pieces: int, config: Config) -> int:
    """Parameters with fewer rows than reach the rank's place, counted from the model's own shapes."""
    return sum(h.rank % pieces * -(-t.rows // pieces) >= t.rows for t in shapes(config).every)


def by_command(size: str) -> dict[int, tuple[int, int]]:
    """Rank → (empty tensors, elements), from the command a user would give, which must find no problem."""
    arguments = (f"model.size={size}", "data.lanes=512", "train.global_batch=2048", "train.precision=bf16")
    options = ("--no-data", "--world", 512, "--shard-check", "--order-check", "--json")
    program = start("plan", ROOT / "configs" / "sar-jepa.yaml", *arguments, "train.engine=fsdp2", *options)
    status, text = finish(program, 300)
    assert status == 0, text
    found = json.loads(text)
    assert found["problems"] == []
    assert [check["passed"] for check in found["checks"]] == [True, True]
    rows = found["checks"][0]["rows"]
    assert {row["off the formula"] for row in rows} == {"0"}
    return {int(row["rank"]): (int(row["empty"]), int(row["parameters"].replace(",", ""))) for row in rows}


def directly(size: str) -> dict[int, tuple[int, int]]:
    """The same, in this process."""
    found = held(recipe(size), "fsdp2", 512, 8, (0, 511))
    assert [h.elements for h in found] == [h.formula for h in found]
    return {h.rank: (h.empty, h.elements) for h in found}


@pytest.mark.slow
@pytest.mark.parametrize(("size", "shard"), [("7b", directly), ("22b", by_command)])
def test_512_ranks_hold_what_the_planner_says_of_the_large_models(size: str, shard: Any) -> None:
    found = shard(size)
    # Class and mask token and one table per block have a single row, which rank 0 holds; all else divides.
    row = FAMILY[size]
    single = 2 + row.depth + 8
    assert {rank: empty for rank, (empty, _) in found.items()} == {0: 0, 511: single}
    first, other = found[0][1], found[511][1]
    assert first - other == 2 * row.dim + 50 * (row.depth * row.dim // row.heads + 8 * 512 // 16)
    assert first + 511 * other == parameters(recipe(size)).total


@pytest.mark.parametrize(("engine", "pieces"), [("fsdp2", 512), ("hsdp", 8)])
def test_ranks_without_rows_are_counted(engine: str, pieces: int) -> None:
    """768 rows on 512 ranks: two each for the first 384, none for the others."""
    run = recipe("base")
    found = held(run, engine, 512, 8, (0, 384, 511))
    assert [h.elements for h in found] == [h.formula for h in found]
    assert [h.empty for h in found] == [rows(h, pieces, run) for h in found]
    assert [h.tensors + h.empty for h in found] == [len(shapes(run).every)] * 3
    if engine == "fsdp2":
        assert found[2].empty > found[0].empty == 0


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_all_ranks_together_hold_the_model_once(world: int) -> None:
    run = from_dict({"model": {"size": "nano", "decoder": {"width": 36, "depth": 1, "heads": 3}}})
    found = held(run, "fsdp2", world, 8, range(world))
    assert [h.elements for h in found] == [h.formula for h in found]
    assert sum(h.elements for h in found) == parameters(run).total
    assert not dist.is_initialized()


def test_groups_that_do_not_form_and_a_group_that_exists_are_refused() -> None:
    run = from_dict({"model": {"size": "nano"}, "train": {"shard_size": 3}})
    with pytest.raises(LaunchError, match="8 processes do not form groups of 3"):
        held(run, "hsdp", 8, 8, (0,))
    with alone(2, 0, 2), pytest.raises(LaunchError, match="belongs to a process group already"):
        held(run, "fsdp2", 8, 8, (0,))
    assert not dist.is_initialized()


@pytest.mark.slow
def test_4096_ranks_read_what_one_rank_reads_and_share_its_lanes() -> None:
    """A billion chips in two sources of unequal weight, at both ends of a run."""
    run = recipe("base", lanes=8192)
    parts = [("wide", np.full(100_000, 7_812)), ("narrow", np.full(28_000, 7_812))]
    order = Mixture(parts, {"wide": 1.0, "narrow": 3.0}, 0, 8192, 4)
    found = dealt(run, order, 4096, (0, 60_000))
    assert [d.agree for d in found] == [16_384] * 2
    assert [d.lanes_once for d in found] == [8192] * 2
    assert peak_bytes(run, None, 4096) < 100e6


def test_a_deal_that_differs_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank that reads the positions of another: its own are not read, and two ranks have one lane."""
    from foundation.planning import lanes

    true = lanes.rank_positions
    monkeypatch.setattr(lanes, "rank_positions", lambda s, b, n, rank, world: true(s, b, n, rank % 7, world))
    run = recipe("base", lanes=64)
    (found,) = dealt(run, mixture(run, None), 8, (0,))
    assert found.samples == 128
    assert found.agree == 96  # those of rank 7 are read by nobody, those of rank 0 twice
    assert found.lanes_once == 48
    assert not order_check(run, Cluster(8), data=False).passed


def test_ranks_that_cannot_share_the_lanes_are_not_dealt_out() -> None:
    run = recipe("base", lanes=60)
    with pytest.raises(DataError, match="60 lanes cannot be shared evenly by 8 processes"):
        dealt(run, mixture(run, None), 8, (0,))
    found = order_check(run, Cluster(8), data=False)
    assert not found.passed
    assert "cannot share" in found.cost
