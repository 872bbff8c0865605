"""Updates that go wrong: not made, counted, undone, passed over, and in the end reported."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foundation.config import Config
from foundation.errors import DataError, NumericsError
from foundation.training import evidence
from foundation.training import run as runs
from foundation.training.guard import Guard, Rewind, Window
from foundation.training.rewinding import JUMPS
from foundation.training.run import train
from foundation.training.step import train_step

Make = Callable[..., Config]
numbers = st.floats(-1e3, 1e3, allow_nan=False)


@given(st.lists(numbers, min_size=8, max_size=40), st.floats(1, 50))
def test_a_limit_moves_and_stretches_with_its_values(values: list[float], score: float) -> None:
    one, other = Window(16, score), Window(16, score)
    for value in values:
        one.add(value)
        other.add(2 * value)
    assert other.limit() == pytest.approx(2 * one.limit(), rel=1e-9, abs=1e-6)
    assert one.limit() >= sorted(values[-16:])[len(values[-16:]) // 2 - 1]
    assert list(one.values) == values[-16:]


@given(st.lists(st.floats(0.9, 1.1), min_size=16, max_size=16), st.floats(10, 1e6))
def test_one_outlier_hardly_moves_a_limit(values: list[float], spike: float) -> None:
    window = Window(16, 20.0, values)
    before = window.limit()
    window.add(spike)
    assert window.limit() < before + 20 * 1.4826 * 0.2


def test_a_window_needs_half_its_values_and_ignores_what_is_not_finite() -> None:
    window = Window(8, 5.0)
    for value in (1.0, math.nan, 2.0, math.inf, 3.0):
        window.add(value)
    assert (list(window.values), window.limit()) == ([1.0, 2.0, 3.0], math.inf)
    window.add(2.0)
    assert window.limit() == pytest.approx(2 + 5 * 1.4826 * 0.5)
    assert Window(8, None, [1.0] * 8).limit() == math.inf
    assert Window(8, 5.0, [2.0] * 8).limit() == pytest.approx(2.1)  # equal values: 1 % counts as their deviation


class Watched:
    """A guard whose events and kept batches can be looked at."""

    def __init__(self, config: Config, **more: Any) -> None:
        self.events: list[tuple[str, int]] = []
        self.kept: list[int] = []
        tell = lambda kind, position, **facts: self.events.append((kind, position))  # noqa: E731
        self.guard = Guard(config, tell, lambda batches, position, facts: self.kept.append(position), **more)

    def update(self, position: int, loss: float = 1.0, norm: float = 1.0, step: float = 1.0) -> None:
        limit = self.guard.limit()
        refused = not (math.isfinite(loss) and loss <= limit and math.isfinite(norm))
        values = {"loss": loss, "grad_norm": math.nan if refused else norm, "update_norm": step}
        self.guard.note({name: torch.tensor(value) for name, value in values.items()}, [], position, limit)


def test_spikes_and_kicks_are_told_and_only_good_updates_enter_the_windows(tiny_config: Make) -> None:
    watched = Watched(tiny_config("guard.window=8", "guard.skips=3"))
    for i in range(8):
        watched.update(8 * i)
    watched.update(64, loss=3.0)
    watched.update(72, norm=math.inf)
    watched.update(80, step=9.0)
    watched.update(88, loss=1.1)
    watched.guard.check()
    assert watched.events == [("skipped", 64), ("skipped", 72), ("kicked", 80)]
    assert watched.kept == [64, 72, 80]
    state = json.loads(json.dumps(watched.guard.state()))
    assert state == {
        "losses": pytest.approx([1.0] * 7 + [1.1]),
        "updates": [1.0] * 8,
        "trouble": [64, 72, 80],
        "missing": 2,
    }
    again = Watched(tiny_config("guard.window=8"), state=state)
    assert again.guard.state() == state
    assert again.guard.limit() == watched.guard.limit()


def test_too_many_in_a_window_send_the_run_back_and_old_ones_are_forgotten(tiny_config: Make) -> None:
    watched = Watched(tiny_config("guard.window=8", "guard.skips=1"))
    watched.update(0, loss=math.nan)
    watched.update(8 * 8, loss=math.nan)  # a window later: the first one is forgotten
    watched.update(8 * 10, loss=math.nan)
    with pytest.raises(Rewind) as caught:
        watched.guard.check()
    assert (caught.value.first, caught.value.end) == (64, 88)


def test_going_back_too_often_ends_the_run_with_what_was_seen(tiny_config: Make) -> None:
    config = tiny_config("guard.window=8", "guard.skips=0", "guard.rewinds=2")
    long_ago, lately = [(0, 8)], [(30_000, 30_008), (30_016, 30_024)]
    fine = Watched(config, jumps=long_ago + lately[:1])
    fine.update(30_032, loss=math.nan)
    with pytest.raises(Rewind):
        fine.guard.check()
    over = Watched(config, jumps=lately)
    over.update(30_032, loss=math.nan)
    with pytest.raises(NumericsError) as caught:
        over.guard.check()
    message = str(caught.value)
    assert "1 of the last 8 updates were spoilt, the last one skipped (loss nan" in message
    assert "the run has gone back 2 times (guard.rewinds)" in message
    assert "where: sample 30032" in message
    assert "lower optim.lr" in message


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Make the loss of updates at some positions larger; a function of (position, times seen) → factor."""

    def begin(factor: Callable[[int, int], float]) -> None:
        seen: dict[int, int] = {}

        def step(learner: Any, batches: Any, position: int, limit: float) -> Any:
            seen[position] = seen.get(position, 0) + 1
            times = factor(position, seen[position])
            inner = learner.objective

            class Louder:
                def __getattr__(self, name: str) -> Any:
                    return getattr(inner, name)

                def loss(self, prediction: Any, inputs: Any) -> Any:
                    loss, parts = inner.loss(prediction, inputs)
                    return loss * times, parts

            return train_step(learner._replace(objective=Louder()), batches, position, limit)

        monkeypatch.setattr(runs, "train_step", step)

    return begin


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e3])
def test_a_spoilt_update_is_not_made_and_the_run_goes_on_as_if_it_were_not_there(
    tiny_config: Make, spoil: Callable[..., None], factor: float
) -> None:
    config = tiny_config("guard.window=8", "train.samples=96", "train.checkpoint_every=96", "train.log_every=8")
    spoil(lambda position, _: factor if position == 64 else 1.0)
    folder = train(config)
    found = lines(folder / "metrics.jsonl")
    assert [line["position"] for line in found] == list(range(8, 97, 8))
    spoilt, after = found[8], found[9]
    assert spoilt["grad_norm"] is None
    assert after["loss"] < 2
    with np.load(folder / "skipped" / "samples-000000000064" / "rank0.npz", allow_pickle=False) as arrays:
        assert arrays["position"].tolist() == list(range(64, 72))
        assert arrays["images"].shape[0] == len(arrays["argument1"]) == 8
    facts = json.loads((folder / "skipped" / "samples-000000000064" / "rank0.json").read_text())
    assert facts["position"] == 64
    assert {"position", "sample_id", "source", "key"} == set(facts["samples"][0])


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), DataError("no such file", do="nothing")])
def test_a_batch_that_cannot_be_kept_costs_one_line_and_not_the_run(
    tiny_config: Make,
    spoil: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(evidence, "identity", fail)
    spoil(lambda position, _: math.nan if position == 32 else 1.0)
    folder = train(tiny_config("train.samples=48"))
    assert lines(folder / "metrics.jsonl")[-1]["position"] == 48
    assert "the batch of the update at sample 32 could not be kept" in caplog.text


def test_the_run_goes_back_passes_over_the_samples_and_ends_where_it_should(
    tiny_config: Make, spoil: Callable[..., None]
) -> None:
    config = tiny_config(
        "guard.window=16", "guard.skips=1", "train.samples=160", "train.checkpoint_every=32", "train.log_every=8"
    )
    spoil(lambda position, _: math.nan if position in (72, 88) else 1.0)
    folder = train(config)
    assert json.loads((folder / JUMPS).read_text()) == {"jumps": [[72, 96]]}
    found = {line["position"]: line for line in lines(folder / "metrics.jsonl")}
    assert list(found) == list(range(8, 161, 8))
    for position, line in found.items():  # a line stands for the update that ends there
        learnt = not 72 < position <= 96
        assert ("loss" in line, "samples_hash" in line, line["images_per_s"] > 0) == (learnt,) * 3, position


def test_without_an_earlier_checkpoint_the_run_ends_with_advice(tiny_config: Make, spoil: Callable[..., None]) -> None:
    spoil(lambda position, _: math.nan)
    with pytest.raises(NumericsError) as caught:
        train(tiny_config("guard.skips=1"))
    message = str(caught.value)
    assert "updates since sample 0 were spoilt, and no checkpoint is from before them" in message
    assert "where: sample 16" in message
    assert "a smaller train.checkpoint_every" in message


def test_trouble_that_comes_again_ends_the_run(tiny_config: Make, spoil: Callable[..., None]) -> None:
    spoil(lambda position, _: math.nan if position >= 40 else 1.0)
    with pytest.raises(NumericsError, match="the run has gone back 1 times") as caught:
        train(tiny_config("guard.skips=1", "guard.rewinds=1", "train.checkpoint_every=32", "train.samples=160"))
    assert "no checkpoint holds anything that is not finite" in str(caught.value)
