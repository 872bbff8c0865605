"""The slowest of several processes is named with what it needs over the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from foundation.config import from_dict
from foundation.training import pace as module
from foundation.training.pace import KEPT, Pace


class Clock:
    """Seconds that the test lets pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "perf_counter", clock)
    return clock


class Others:
    """An engine of four processes, of which this is number 2; the others have told these numbers."""

    world_size, rank, device = 4, 2, torch.device("cpu")

    def __init__(self, needs: dict[int, tuple[float, float]]) -> None:
        self.needs = needs

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        whole = value.clone()
        for rank, (need, wait) in self.needs.items():
            assert not value[rank].any()
            whole[rank] = torch.tensor([need, wait])
        return whole / self.world_size


def learner(engine: Any, micro_batch: int = 2) -> Any:
    tree = {"train": {"global_batch": 16, "micro_batch": micro_batch}, "data": {"lanes": 16}}
    return SimpleNamespace(engine=engine, config=from_dict(tree), model=nn.Linear(2, 2))


def update(pace: Pace, model: nn.Module, clock: Clock, seconds: float, passes: int = 2) -> None:
    pace.begin()
    for _ in range(passes):
        clock.now += seconds
        model(torch.zeros(1, 2))


def test_the_slowest_is_named_with_its_ratio_and_its_waiting(clock: Clock) -> None:
    one = learner(Others({0: (1.0, 0.1), 1: (2.0, 0.2), 3: (3.0, 0.3)}))
    pace = Pace(one)
    for seconds in (1.5, 2.5):
        update(pace, one.model, clock, seconds)
    # Two micro-batches like the first, of 2 s each, and an update of 4 s of which half is waiting: 6 s.
    found = pace.read({"images_per_s": 4.0, "data_wait": 0.5})
    assert found == pytest.approx({"slowest_rank": 2, "slowest_ratio": 6 / 2.5, "slowest_wait": 0.5})
    assert pace.read({"images_per_s": 4.0, "data_wait": 0.5}) == {}, "a new window has begun"


def test_passes_outside_of_an_update_do_not_count(clock: Clock) -> None:
    one = learner(Others({0: (1.0, 0.0), 1: (1.0, 0.0), 3: (1.0, 0.0)}), micro_batch=4)
    pace = Pace(one)
    update(pace, one.model, clock, 1.0, passes=1)
    clock.now += 100
    one.model(torch.zeros(1, 2))  # a look of the monitor
    assert pace.read({"images_per_s": 1.0, "data_wait": 0.0})["slowest_ratio"] == pytest.approx(1.0)


def test_a_long_window_keeps_its_newest_updates(clock: Clock) -> None:
    one = learner(Others({0: (1.0, 0.0), 1: (1.0, 0.0), 3: (1.0, 0.0)}), micro_batch=4)
    pace = Pace(one)
    update(pace, one.model, clock, 1e9, passes=1)
    for _ in range(KEPT):
        update(pace, one.model, clock, 3.0, passes=1)
    assert pace.read({"images_per_s": 1.0, "data_wait": 0.0})["slowest_ratio"] == pytest.approx(3.0)


def test_one_process_measures_nothing() -> None:
    alone = SimpleNamespace(world_size=1, rank=0, device=torch.device("cpu"))
    one = learner(alone)
    pace = Pace(one)
    pace.begin()
    assert not one.model._forward_hooks
    assert pace.read({"images_per_s": 1.0, "data_wait": 0.0}) == {}
