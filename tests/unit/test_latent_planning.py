"""What a plan says of I-JEPA: parameters, operations, the teacher's memory and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from latent_runs import config, images, latent
from torch.utils.flop_counter import FlopCounterMode

from foundation.config import load
from foundation.models.families import flops, parameters, shapes, size, tokens
from foundation.planning.activations import batch_bytes
from foundation.planning.cluster import Cluster, communication, one_pass
from foundation.planning.engines import candidate, compute_seconds, startable
from foundation.planning.memory import memory, padded
from foundation.planning.plan import plan

FILE = Path(__file__).parents[2] / "configs" / "objectives" / "i-jepa.yaml"


@pytest.mark.parametrize(("channels", "registers"), [(1, 0), (3, 2)])
def test_parameters_and_operations_are_planned_as_they_are(channels: int, registers: int) -> None:
    run = config(registers=registers)
    model_keys = run.model.model_copy(update={"channels": channels, "attention": "reference"})
    run = run.model_copy(update={"model": model_keys})
    objective = latent(run)
    model: Any = objective.build_model()
    every, trained, teacher = (size(part) for part in (shapes(run).every, shapes(run).trained, shapes(run).teacher))
    assert every == parameters(run).total == sum(p.numel() for p in model.parameters())
    assert teacher == parameters(run).teacher == sum(p.numel() for p in model.teacher.parameters())
    assert trained == every - teacher == sum(p.numel() for p in model.parameters() if p.requires_grad)
    inputs = objective.prepare(images(4, channels), torch.arange(4))
    counts = objective.tokens(objective.blocks(0))
    expected = flops(run, counts)
    with FlopCounterMode(display=False) as forward:
        prediction = model(*inputs.model_args)
    assert forward.get_total_flops() == 4 * expected.forward
    loss, _ = objective.loss(prediction, inputs)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    trainable = expected.forward - expected.teacher
    assert backward.get_total_flops() == 4 * (2 * trainable - expected.embed)
    assert expected.training == 3 * trainable + expected.teacher
    held = sum(t.numel() * t.element_size() for t in inputs.model_args)
    drawn, mean = counts, tokens(run)
    assert batch_bytes(run, 4) - held == 4 * 8 * (mean.taken - drawn.taken + 4 * (mean.masked - drawn.masked))
    assert abs(flops(run).forward / expected.forward - 1) < 0.2


def test_a_teacher_takes_weights_and_neither_gradients_nor_moments() -> None:
    run = load(FILE, ["train.precision=fp32"])
    p = parameters(run)
    alone = memory(run, "ddp", 4, 1, 8, 8, "cuda")
    assert (alone.parameters, alone.gradients) == (4 * p.total, 4 * (p.total - p.teacher))
    assert alone.optimizer == 8 * (p.total - p.teacher)
    half = memory(load(FILE), "ddp", 4, 1, 8, 8, "cuda")
    assert half.copies == 2 * (p.total - p.teacher)  # autocast keeps copies of what is trained alone
    sharded = memory(run, "fsdp2", 4, 1, 8, 8, "cuda")
    assert sharded.parameters == pytest.approx(alone.parameters / 8, rel=0.02)
    assert sharded.gradients == pytest.approx(alone.gradients / 8, rel=0.02)


def test_a_teacher_is_never_recomputed() -> None:
    run, f = load(FILE), flops(load(FILE))
    again = load(FILE, ["train.activation_checkpointing=full"])
    plain, more = (compute_seconds(each, Cluster(8)) for each in (run, again))
    assert more / plain == pytest.approx((f.training + f.forward - f.teacher) / f.training)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_teacher_is_gathered_once_for_every_micro_batch(engine: str, steps: int) -> None:
    run, cluster = load(FILE, ["train.precision=fp32"]), Cluster(16)
    s, count = shapes(run), 2048 // 16 // steps
    units = s.depth + s.decoder_depth
    trained = communication(
        engine, padded(s.trained, engine, 16), units, cluster, gather=4, reduce=4, accumulation=steps
    )
    teacher = steps * one_pass(4 * padded(s.teacher, engine, 16), s.depth, 16, cluster)
    assert candidate(run, cluster, engine, count).communication == pytest.approx(trained + teacher)


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_zero_in_bf16_is_refused_by_the_plan_as_by_the_run(engine: str) -> None:
    found = plan(load(FILE, [f"train.engine={engine}"]), Cluster(8), data=False)
    assert any("would keep the teacher in bf16 alone" in problem for problem in found.problems)
    exact = plan(load(FILE, [f"train.engine={engine}", "train.precision=fp32"]), Cluster(8), data=False)
    assert not any("teacher" in problem for problem in exact.problems)
    assert startable(load(FILE), Cluster(64)) == ["ddp", "hsdp", "fsdp2"]
    assert engine in startable(load(FILE, ["train.precision=fp32"]), Cluster(64))
