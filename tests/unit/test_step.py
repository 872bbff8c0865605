"""One update: the same in any pieces, never from a number that is not finite, always at the rate of its position."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from foundation.config import Config
from foundation.errors import DataError
from foundation.training.data import open_data, training_catalog
from foundation.training.engine import Engine
from foundation.training.setup import build_learner
from foundation.training.step import Learner, train_step
from shards.stream import Batch, Stream

Make = Callable[..., Config]
# SGD at rate 1 (32 · 8 / 256) and no warm-up: the change of a weight is its gradient.
PLAIN = ("optim.lr=32", "optim.warmup_samples=0")


def learner(config: Config, plain: bool = False) -> Learner:
    made = build_learner(config, Engine(config))
    return made._replace(optimizer=torch.optim.SGD(made.model.parameters(), lr=0.0, fused=True)) if plain else made


def batches(config: Config, micro_batch: int = 8, stop: int = 8) -> list[Batch]:
    stream = Stream(
        open_data(config), seed=0, lanes=8, block_shards=2, global_batch=8, micro_batch=micro_batch, stop=stop
    )
    return list(stream)


def weights(made: Learner) -> list[Tensor]:
    return [p.detach().clone() for p in made.model.parameters()]


def change(before: list[Tensor], after: list[Tensor]) -> Tensor:
    return torch.cat([(b - a).flatten() for a, b in zip(before, after, strict=True)])


class Watched:
    """An objective whose `loss` can be looked at and changed."""

    def __init__(self, inner: Any, watch: Callable[[Tensor, Any], None] = lambda *_: None, factor: float = 1.0) -> None:
        self.prepare, self.momentum = inner.prepare, inner.momentum
        self._inner, self._watch, self._factor = inner, watch, factor

    def loss(self, prediction: Tensor, inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        self._watch(prediction, inputs)
        loss, parts = self._inner.loss(prediction, inputs)
        return loss * self._factor, parts


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_accumulation_gives_the_update_of_one_large_batch(tiny_config: Make, micro_batch: int) -> None:
    config = tiny_config(*PLAIN)
    changes, losses = [], []
    for size in (8, micro_batch):
        made = learner(config, plain=True)
        before = weights(made)
        losses.append(train_step(made, batches(config, size), 0))
        changes.append(change(before, weights(made)))
    assert changes[0].abs().max() > 1e-3
    torch.testing.assert_close(changes[1], changes[0], rtol=1e-5, atol=1e-6)
    for name, value in losses[0].items():
        torch.testing.assert_close(losses[1][name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(("factor", "limit"), [(math.nan, math.inf), (math.inf, math.inf), (1.0, 0.1)])
@pytest.mark.parametrize("micro_batch", [8, 2])
def test_an_update_that_must_not_be_leaves_weights_moments_and_their_count_alone(
    tiny_config: Make, factor: float, limit: float, micro_batch: int
) -> None:
    made = learner(tiny_config())
    some = batches(made.config, micro_batch)
    train_step(made, some, 0)
    before = {name: value.clone() for name, value in made.engine.tensors(made.model, made.optimizer).items()}
    spoilt = made._replace(objective=Watched(made.objective, factor=factor))  # type: ignore[arg-type]
    values = train_step(spoilt, some, 8, limit)
    assert math.isnan(values["grad_norm"])
    assert {state["step"].item() for state in made.optimizer.state.values()} == {1}
    after = made.engine.tensors(made.model, made.optimizer)
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert math.isfinite(train_step(made, some, 8)["grad_norm"])


def test_the_norm_of_the_step_is_that_of_the_change_of_the_weights(tiny_config: Make) -> None:
    made = learner(tiny_config(*PLAIN, "optim.weight_decay=0"))
    before = weights(made)
    values = train_step(made, batches(made.config), 0)
    b1, b2 = made.config.optim.betas
    corrected = values["update_norm"].item() * (1 - b2) ** 0.5 / (1 - b1)
    assert change(before, weights(made)).norm().item() / made.lr(0) == pytest.approx(corrected, rel=0.02)  # eps


def test_clipping_limits_the_norm_of_the_update_and_reports_the_norm_before_it(tiny_config: Make) -> None:
    free = learner(tiny_config(*PLAIN), plain=True)
    norm = train_step(free, batches(free.config), 0)["grad_norm"].item()
    limit = norm / 3
    clipped = learner(tiny_config(*PLAIN, f"optim.grad_clip={limit}"), plain=True)
    before = weights(clipped)
    assert train_step(clipped, batches(clipped.config), 0)["grad_norm"].item() == norm
    assert change(before, weights(clipped)).norm().item() == pytest.approx(limit, rel=1e-4)


def test_a_limit_above_the_norm_changes_nothing(tiny_config: Make) -> None:
    after = []
    for more in ((), ("optim.grad_clip=1e6",)):
        made = learner(tiny_config(*PLAIN, *more), plain=True)
        train_step(made, batches(made.config), 0)
        after.append(weights(made))
    assert all(torch.equal(a, b) for a, b in zip(*after, strict=True))


def test_bf16_is_for_the_model_alone(tiny_config: Make) -> None:
    seen = {}
    for precision in ("fp32", "bf16"):
        made = learner(tiny_config(f"train.precision={precision}"))
        kept = seen[precision] = SimpleNamespace()
        watch = lambda prediction, inputs, kept=kept: vars(kept).update(prediction=prediction, target=inputs.target)  # noqa: E731
        made = made._replace(objective=Watched(made.objective, watch))  # type: ignore[arg-type]
        kept.loss = train_step(made, batches(made.config), 0)["loss"]
        assert all(p.dtype == torch.float32 for p in made.model.parameters())
    assert seen["fp32"].prediction.dtype == torch.float32
    assert seen["bf16"].prediction.dtype == torch.bfloat16
    assert seen["bf16"].target.dtype == torch.float32
    assert torch.equal(seen["bf16"].target, seen["fp32"].target)
    assert seen["bf16"].loss.dtype == torch.float32
    assert seen["bf16"].loss.item() == pytest.approx(seen["fp32"].loss.item(), rel=0.05)


@pytest.mark.parametrize(
    ("position", "share"),
    [(0, 0.0), (8, 0.5), (16, 1.0), (16 + 40, 0.5), (16 + 20, 0.5 + 0.5 * math.sqrt(0.5)), (96, 0.0)],
)
def test_the_rate_is_set_from_the_position(tiny_config: Make, position: int, share: float) -> None:
    made = learner(tiny_config("optim.lr=0.32"))  # peak 0.32 · 8 / 256 = 0.01
    train_step(made, batches(made.config), position)
    assert [group["lr"] for group in made.optimizer.param_groups] == pytest.approx([0.01 * share] * 2, abs=1e-12)


def test_at_rate_zero_nothing_is_learnt(tiny_config: Make) -> None:
    made = learner(tiny_config())
    before = weights(made)
    train_step(made, batches(made.config), 0)  # the first step of a warm-up
    assert change(before, weights(made)).abs().max() == 0


def test_the_loss_falls_within_thirty_steps(tiny_config: Make) -> None:
    made = learner(tiny_config("optim.lr=0.1", "train.samples=240"))
    every = batches(made.config, stop=240)
    losses = [train_step(made, [batch], 8 * step)["loss"].item() for step, batch in enumerate(every)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5]), losses


def test_images_with_other_channels_than_the_model_are_refused_before_anything_is_read(tiny_config: Make) -> None:
    config = tiny_config("model.channels=2")
    with pytest.raises(DataError, match=r"the images of \w+ have 1 channels, the model takes 2") as caught:
        training_catalog(config)
    assert "set model.channels=1, or leave" in str(caught.value)
