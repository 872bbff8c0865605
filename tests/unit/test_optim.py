"""Every parameter has exactly one rule, and the learning rate is a function of samples seen, not of the cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from foundation.config import Config, OptimConfig, from_dict
from foundation.objectives.registry import build
from foundation.training.engine import Engine
from foundation.training.optim import build_optimizer, learning_rate, peak_lr, rule_table, rules
from foundation.training.step import Learner

GOLDEN = Path(__file__).parents[1] / "golden" / "lr_schedule.json"
SCHEDULES = st.tuples(
    st.integers(1, 10**9), st.floats(0, 1), st.floats(1e-6, 1.0), st.floats(0, 1)
)  # total, share of warm-up, peak, floor as a share of the peak


def nano() -> Any:
    return build(from_dict({"model": {"size": "nano"}})).build_model()


def test_every_trained_parameter_is_in_exactly_one_group() -> None:
    model = nano()
    model.encoder.patch_embed.requires_grad_(False)
    listed = [name for rule in rules(model, 0.05) for name in rule.names]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(listed) == sorted(trained)
    held = [
        id(p)
        for group in build_optimizer(model, rules(model, 0.05), OptimConfig()).param_groups
        for p in group["params"]
    ]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_vectors_do_not_decay_and_everything_else_does() -> None:
    model = nano()
    decay = {name: rule.weight_decay for rule in rules(model, 0.05) for name in rule.names}
    assert all(decay[name] == (0.05 if p.ndim > 1 else 0.0) for name, p in model.named_parameters())
    groups = build_optimizer(model, rules(model, 0.07), OptimConfig()).param_groups
    assert {(group["weight_decay"], p.ndim > 1) for group in groups for p in group["params"]} == {
        (0.0, False),
        (0.07, True),
    }
    assert {group["betas"] for group in groups} == {(0.9, 0.95)}


def test_the_printed_table_counts_every_parameter() -> None:
    model = nano()
    table = rule_table(model, OptimConfig(weight_decay=0.05))
    assert sum(int(row[2].replace(",", "")) for row in table) == sum(p.numel() for p in model.parameters())
    assert sum(int(row[1]) for row in table) == len(list(model.parameters()))
    assert [row[3] for row in table] == ["0", "0.05"]


def test_a_model_without_vectors_has_one_group() -> None:
    model = nn.Linear(2, 2, bias=False)
    assert len(build_optimizer(model, rules(model, 0.05), OptimConfig()).param_groups) == 1


def test_the_schedule_is_the_published_one() -> None:
    golden = json.loads(GOLDEN.read_text())
    optim = OptimConfig(lr=golden["base_lr"])
    images = 94_776
    total, warmup = golden["epochs"] * images, golden["warmup_epochs"] * images
    ours = [learning_rate(e * images, total, warmup, peak_lr(optim, golden["batch"])) for e in golden["epoch"]]
    assert ours == pytest.approx(golden["lr"], rel=1e-9, abs=1e-15)


@given(schedule=SCHEDULES, at=st.lists(st.floats(0, 1.2), min_size=2, max_size=20))
def test_the_rate_rises_in_the_warm_up_then_falls_and_stays_between_its_bounds(
    schedule: tuple[int, float, float, float], at: list[float]
) -> None:
    total, share, peak, low = schedule
    warmup, floor = int(total * share), peak * low
    positions = sorted(int(x * total) for x in at)
    values = [learning_rate(p, total, warmup, peak, floor) for p in positions]
    rise = [v for p, v in zip(positions, values, strict=True) if p <= warmup]
    fall = [v for p, v in zip(positions, values, strict=True) if p >= warmup]
    assert rise == sorted(rise)
    assert fall == sorted(fall, reverse=True)
    assert all(0 <= v <= peak * (1 + 1e-12) for v in values)
    assert all(v >= floor * (1 - 1e-12) for v in fall)


@given(schedule=SCHEDULES)
def test_the_rate_starts_at_zero_peaks_after_the_warm_up_and_ends_at_the_floor(
    schedule: tuple[int, float, float, float],
) -> None:
    total, share, peak, low = schedule
    warmup, floor = int(total * share), peak * low
    assert learning_rate(0, total, warmup, peak, floor) == pytest.approx(0 if warmup else peak)
    assert learning_rate(warmup, total, warmup, peak, floor) == pytest.approx(peak)
    if warmup < total:
        assert learning_rate(total, total, warmup, peak, floor) == pytest.approx(floor)
        assert learning_rate(10 * total, total, warmup, peak, floor) == pytest.approx(floor)
        middle = learning_rate((warmup + total) / 2, total, warmup, peak, floor)
        assert middle == pytest.approx((peak + floor) / 2, rel=1e-6) or total - warmup <= 1


def learner(world_size: int, **train: Any) -> Learner:
    config: Config = from_dict(
        {
            "data": {"lanes": 4},
            "optim": {"lr": 1e-3, "min_lr": 1e-5, "warmup_samples": 1000},
            "train": {"samples": 10_000, "global_batch": 512, **train},
        }
    )
    engine = Engine(config)
    engine.world_size = world_size
    model = nn.Linear(1, 1)
    return Learner(config, engine, None, model, torch.optim.AdamW(model.parameters()), None)  # type: ignore[arg-type]


@given(position=st.integers(0, 12_000))
def test_the_rate_does_not_depend_on_the_cluster(position: int) -> None:
    rates = {learner(world, micro_batch=micro).lr(position) for world, micro in [(1, None), (4, 16), (64, 8)]}
    assert len(rates) == 1


def test_peak_and_floor_scale_with_the_global_batch() -> None:
    assert learner(1).lr(1000) == pytest.approx(2e-3)
    assert learner(1).lr(10_000) == pytest.approx(2e-5)
    assert learner(1, global_batch=256).lr(1000) == pytest.approx(1e-3)
    assert peak_lr(OptimConfig(lr=1e-3, reference_batch=512), 256) == pytest.approx(5e-4)
