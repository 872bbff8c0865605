"""The plan finds every reason for which training refuses a run on its engine, and no other."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from foundation.config import Config, from_dict, load
from foundation.errors import ExplainedError
from foundation.objectives.registry import OBJECTIVES
from foundation.planning.cluster import Cluster
from foundation.planning.engines import engine_problems, fitting, recommend
from foundation.planning.plan import plan
from foundation.training import engines

LATENT = Path(__file__).parents[2] / "configs" / "objectives" / "i-jepa.yaml"
KEYS: dict[str, tuple[Any, ...]] = {
    "engine": ("auto", *engines.ENGINES),
    "precision": ("fp32", "bf16"),
    "micro_batch": (None, 8),  # of a share of 32 or 256
    "float8": (False, True),
    "shard_size": (None, 2, 3),
    "offload": (False, True),
}


def runs() -> Iterator[Config]:
    """All combinations of the keys that decide what an engine takes, without and with a teacher."""
    bases = [from_dict({"data": {"lanes": 64}, "train": {"global_batch": 256}}), load(LATENT, ["data.lanes=64"])]
    for base, values in product(bases, product(*KEYS.values())):
        train = {**dict(zip(KEYS, values, strict=True)), "global_batch": 256}
        yield base.model_copy(update={"train": base.train.model_copy(update=train)})


def refused(run: Config) -> str:
    """What training says when it starts here; empty when its engine begins to form the processes."""
    try:
        engines.start(run)
    except ExplainedError as error:
        return error.what
    return ""


@pytest.mark.parametrize(("world", "node"), [(1, 1), (8, 8), (8, 4)])
def test_a_plan_without_problems_starts_and_a_run_that_starts_has_none(
    world: int, node: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(node))
    begun: Any = lambda _: None  # noqa: E731 - instead of all that follows the checks
    for name, row in engines.ENGINES.items():
        monkeypatch.setitem(engines.ENGINES, name, row._replace(start=begun, unavailable=""))
    cluster, verdicts = Cluster(world, gpus_per_node=node), set()
    for run in runs():
        problems, reason = list(engine_problems(run, cluster)), refused(run)
        assert bool(problems) == bool(reason), (run.train, problems, reason)
        assert not reason or reason in [problem.what for problem in problems]
        verdicts.add(reason.replace("zero2", "zero1").replace("zero3", "zero1"))
    several = 2 if world > 1 else 0  # `single` for many and groups of 3 (of one process: of 2, too)
    assert len([v for v in verdicts if v]) >= 5 + several, verdicts


@pytest.mark.parametrize(
    ("train", "problem"),
    [
        ({"engine": "zero1", "precision": "bf16", "micro_batch": 8}, "would add up the gradients of several"),
        ({"engine": "ddp", "precision": "bf16", "float8": True}, "float8 does not go with engine ddp in bf16"),
        ({"engine": "fsdp2", "precision": "fp32", "float8": True}, "float8 does not go with engine fsdp2 in fp32"),
        ({"engine": "fsdp2", "shard_size": 2}, "engine fsdp2 has no groups of processes"),
        ({"engine": "auto", "shard_size": 2}, "engine ddp has no groups of processes"),
    ],
)
def test_the_whole_plan_shows_it_with_what_to_do(train: dict[str, Any], problem: str) -> None:
    run = from_dict({"data": {"lanes": 64}, "train": {"global_batch": 256, **train}})
    (found,) = plan(run, Cluster(8), data=False).problems
    assert problem in found
    assert "; use train." in found


def test_what_is_recommended_is_not_refused() -> None:
    cluster = Cluster(8)
    for run in runs():
        # Where no engine takes the run there is nothing better to name.
        if all(any(engine_problems(with_engine(run, name), cluster)) for name in engines.ENGINES):
            continue
        found = recommend(run, cluster, run.train.micro_batch or 32)
        changes = {"engine": found.engine, "micro_batch": found.micro_batch}
        changed = run.model_copy(update={"train": run.train.model_copy(update=changes)})
        assert not list(engine_problems(changed, cluster)), (run.train, found)


def with_engine(run: Config, name: str) -> Config:
    return run.model_copy(update={"train": run.train.model_copy(update={"engine": name})})


def test_zero1_in_bf16_does_not_take_smaller_micro_batches_to_fit() -> None:
    def found(engine: str, precision: str) -> Any:
        keys = {"global_batch": 4096, "precision": precision}
        run = from_dict({"model": {"size": "huge"}, "data": {"lanes": 64}, "train": keys})
        return fitting(run, Cluster(8), engine, 512)

    for engine, precision in (("zero2", "bf16"), ("zero1", "fp32")):
        _, micro, mode = found(engine, precision)
        assert (micro < 512, mode) == (True, "none")
    assert found("zero1", "bf16") is None or found("zero1", "bf16")[1:] == (512, "full")


def test_objectives_of_both_kinds_are_among_the_runs() -> None:
    assert {run.objective.name for run in runs()} == {"sar-jepa", "i-jepa"} <= set(OBJECTIVES)
