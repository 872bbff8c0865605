"""A score is honest: drawn from train only, tested on unseen chips, with an interval and beside its controls."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import one_hot

from foundation.errors import ConfigError, DataError, NumericsError
from foundation.evaluation import attentive, controls, fewshot, knn, metrics, probe, scores
from foundation.evaluation.attention import attention_distance, attention_distances, token_distances
from foundation.evaluation.features import Listing, check_disjoint, extract, images, listing
from foundation.evaluation.protocols import BACKGROUND, PIXELS, RANDOM, Options, Task
from foundation.evaluation.scores import Score
from foundation.evaluation.sides import own
from foundation.evaluation.suite import measure
from foundation.evaluation.tuning import Recipe

NAMES = ("a", "b", "c")
SLOW = settings(max_examples=25, deadline=None)


class Chips(list):
    """A reader in memory: labelled chips whose centre is bright in a class's own place."""

    def __init__(self, count: int, offset: int = 0, names: tuple[str, ...] = NAMES, size: int = 16) -> None:
        rng = np.random.default_rng(offset)
        for i in range(count * len(names)):
            pixels = rng.integers(0, 60, (1, size, size), dtype=np.uint8)
            label = i % len(names)
            pixels[0, 6 + label : 8 + label, 6:10] = 250
            rule = {"scale": 255.0, "decibels": 0.0}
            self.append(SimpleNamespace(pixels=pixels, **rule, label=label, key=f"k{offset + i}", source="toy"))


class Toy(nn.Module):
    """An encoder that passes pixels on: tokens are the rows of the image, the class token is their flattened sum."""

    dim, patch, prefix = 16, 1, 1

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(16, 16)
        nn.init.eye_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        rows = x[:, 0].transpose(1, 2).mean(1)
        return torch.stack([self.mix(rows), 2 * rows, 4 * rows], 1)

    def pooled(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]


def task(**changes: object) -> Task:
    train = listing(Chips(12), NAMES)
    return replace(Task(train, listing(Chips(8, 1000), NAMES, train.classes), 16), **changes)


def clusters(n: int, d: int = 8, spread: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """n points around each of four far centres."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(4).repeat_interleave(n)
    return torch.eye(4, d)[y] * 3 + spread * torch.randn(4 * n, d, generator=generator), y


# --- what is read -----------------------------------------------------------------------------------------------------


def test_features_keep_the_order_of_the_reader_and_leave_the_encoder_as_it_was() -> None:
    chips, encoder, seen = Chips(5), Toy().train(), []
    chips.insert(3, SimpleNamespace(**{**vars(chips[0]), "label": -1, "key": "unlabelled"}))
    samples = listing(chips, NAMES)
    found = extract(encoder, samples, 16, batch=4, progress=lambda done, total: seen.append((done, total)))
    assert found.keys == tuple(c.key for c in chips if c.label >= 0)
    assert found.x.shape == (15, 16)
    assert found.y.tolist() == [c.label for c in chips if c.label >= 0]
    torch.testing.assert_close(found.mean, 3 * found.x)
    expected = torch.from_numpy(np.stack([c.pixels for c in chips if c.label >= 0]))[:, 0].float().mean(2) / 255
    torch.testing.assert_close(found.x, expected, atol=1e-5, rtol=0)
    assert encoder.training
    assert seen == [(4, 15), (8, 15), (12, 15), (15, 15)]


def test_images_follow_the_selection_with_crop_and_resize() -> None:
    samples = listing(Chips(3), NAMES)
    assert images(samples.take(torch.tensor([4, 0])), 32, crop=8).shape == (2, 1, 32, 32)
    assert torch.equal(images(samples.take(torch.tensor([4, 0])), 16)[1], images(samples, 16)[0])


def test_a_test_set_uses_the_classes_of_the_training_set_by_name() -> None:
    swapped = listing(Chips(2), ("c", "b", "a"), ("a", "b", "c"))
    assert swapped.y.tolist() == [2, 1, 0] * 2


def test_unknown_and_missing_classes_are_refused_by_name() -> None:
    with pytest.raises(DataError, match="classes that the training samples do not have: c"):
        listing(Chips(2), NAMES, ("a", "b"))
    chips = Chips(2)
    for chip in chips:
        chip.label = -1
    with pytest.raises(DataError, match="none of the 6 samples has a class"):
        listing(chips, NAMES)


def test_the_same_pixels_in_train_and_test_are_refused_whatever_their_keys() -> None:
    train = listing(Chips(4), NAMES)
    chips = Chips(4, 1000)
    chips[5].pixels = train.reader[2].pixels
    with pytest.raises(DataError, match="1 of 12 training samples are also among the 12 test samples") as caught:
        check_disjoint(train, listing(chips, NAMES))
    assert "k2 = k1005" in str(caught.value)
    with pytest.raises(DataError, match="12 of 12"):
        check_disjoint(train, train)
    other = listing(Chips(4, 1000), NAMES)
    check_disjoint(train, replace(other, keys=train.keys))


# --- few shots --------------------------------------------------------------------------------------------------------


@SLOW
@given(st.integers(0, 2**31), st.integers(1, 6), st.randoms())
def test_a_draw_is_balanced_nested_and_blind_to_the_order_of_packing(seed: int, shots: int, shuffle: object) -> None:
    y, hashes = torch.arange(21) % 3, tuple(f"k{i:02d}" for i in range(21))
    picked = fewshot.draw(y, hashes, NAMES, shots, seed)
    assert torch.bincount(y[picked]).tolist() == [shots] * 3
    assert len(set(picked.tolist())) == 3 * shots
    assert set(picked.tolist()) <= set(fewshot.draw(y, hashes, NAMES, shots + 1, seed).tolist())
    order = list(range(21))
    shuffle.shuffle(order)  # type: ignore[attr-defined]
    again = fewshot.draw(y[order], tuple(hashes[i] for i in order), NAMES, shots, seed)
    assert [hashes[order[i]] for i in again] == [hashes[i] for i in picked]


def test_another_seed_draws_other_shots() -> None:
    y, keys = torch.zeros(50, dtype=torch.int64), tuple(map(str, range(50)))
    assert len({tuple(fewshot.draw(y, keys, ("a",), 5, seed).tolist()) for seed in range(10)}) == 10


def test_a_draw_from_a_class_that_is_too_small_names_it_with_its_count() -> None:
    with pytest.raises(DataError, match="fewer different training images: b 3, c 0") as caught:
        fewshot.draw(torch.tensor([0] * 9 + [1] * 3), tuple(map(str, range(12))), NAMES, 5, 0)
    assert "5 shots" in str(caught.value)


def test_the_schedule_warms_up_for_two_epochs_and_then_follows_a_cosine() -> None:
    recipe = Recipe()
    assert [recipe.rate(e) for e in (0, 1, 2)] == [1e-5, 1e-5, 1e-3]
    assert math.isclose(recipe.rate(22), 5e-4)
    assert recipe.rate(39) == min(recipe.rate(e) for e in range(2, 40))


def test_the_linear_layer_learns_separable_shots_and_repeats_itself_exactly() -> None:
    (x, y), (z, truth) = clusters(40), clusters(50, seed=1)
    state = torch.get_rng_state()
    first = fewshot.linear(x, y, z, 4, seed=0)
    torch.testing.assert_close(first.sum(1), torch.ones(200))
    assert metrics.accuracy(truth, first) > 0.95
    assert torch.equal(first, fewshot.linear(x, y, z, 4, seed=0))
    assert torch.equal(state, torch.get_rng_state())


def test_permuted_labels_give_chance_in_every_protocol() -> None:
    (x, y), (z, truth) = clusters(60, spread=1.0), clusters(100, seed=1, spread=1.0)
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(3))]
    answers = (knn.probabilities(x, y, z, 4), probe.probabilities(x, y, z, 4)[0], fewshot.linear(x, y, z, 4, 0))
    for found in (*answers, attentive.predict(x[:, None], y, z[:, None], 4)[0]):
        assert abs(metrics.accuracy(truth, found) - 0.25) < 0.15
        torch.testing.assert_close(found.sum(1), torch.ones(400))


def test_separable_features_give_full_marks_to_neighbours_and_probe() -> None:
    (x, y), (z, truth) = clusters(30), clusters(20, seed=1)
    predicted, chosen = probe.probabilities(x, y, z, 4)
    assert metrics.accuracy(truth, predicted) == metrics.accuracy(truth, knn.probabilities(x, y, z, 4)) == 1
    assert chosen["C"] in probe.STRENGTHS
    assert chosen["converged"]


def test_fine_tuning_learns_without_touching_the_encoder_it_was_given() -> None:
    t, encoder = task(), Toy()
    before = copy.deepcopy(encoder.state_dict())
    index = fewshot.draw(t.train.y, t.train.hashes, t.train.classes, 10, 0)
    recipe = Recipe(lr=0.05, epochs=60)
    tune = lambda: fewshot.finetune(  # noqa: E731
        encoder, images(t.train.take(index), 16), t.train.y[index], [images(t.test, 16)], 3, 0, recipe=recipe
    )
    first = tune()
    assert metrics.accuracy(t.test.y, first) > 0.9
    assert torch.equal(first, tune())
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_a_loss_that_is_not_finite_stops_the_few_shot_run() -> None:
    x, y = clusters(5)
    with pytest.raises(NumericsError, match="the few-shot loss is nan") as caught:
        fewshot.linear(x * torch.nan, y, x, 4, seed=7)
    assert "seed 7, epoch 0" in str(caught.value)


# --- neighbours and probe ---------------------------------------------------------------------------------------------


def test_neighbours_are_counted_by_weight_and_never_more_than_there_are() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
    found = knn.probabilities(bank, torch.tensor([0, 1, 1]), torch.tensor([[5.0, 0.1], [0.0, 2.0]]), 3)
    assert found.argmax(1).tolist() == [0, 1]
    assert found.shape == (2, 3)
    assert not found[:, 2].any()


def test_the_probe_holds_out_a_fifth_of_each_class_and_needs_two_classes() -> None:
    y = torch.tensor([0] * 50 + [1] * 10 + [2])
    assert torch.bincount(y[probe.held_out(y)], minlength=3).tolist() == [10, 2, 0]
    one_each, chosen = probe.probabilities(torch.eye(2), torch.tensor([0, 2]), torch.eye(2), 3)
    assert (one_each.argmax(1).tolist(), chosen["C"], chosen["held_out_accuracy"]) == ([0, 2], 1.0, None)
    assert not one_each[:, 1].any()
    with pytest.raises(DataError, match="at least two classes"):
        probe.probabilities(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64), torch.randn(4, 2), 1)


# --- scores -----------------------------------------------------------------------------------------------------------


def test_the_t_interval_has_known_values() -> None:
    mean, low, high = scores.t_interval([0.545, 0.638, 0.598, 0.58, 0.576])
    half = 2.7764451 * 0.0341145 / math.sqrt(5)  # t(.975; 4) · s / √n
    assert (mean, low, high) == pytest.approx((0.5874, 0.5874 - half, 0.5874 + half), abs=1e-4)
    assert scores.t_interval([0.9, 1.0])[2] == 1
    assert scores.t_interval([0.7]) == (0.7, 0.7, 0.7)


def test_one_result_gets_a_bootstrap_interval_that_is_always_the_same() -> None:
    y = torch.zeros(400, dtype=torch.int64)
    predicted = one_hot((torch.arange(400) % 4 == 0).long())
    one = scores.score("e", "knn", "accuracy", y, [predicted], (0,))
    deviation = math.sqrt(0.75 * 0.25 / 400)
    assert one.mean == 0.75
    assert (one.low, one.high) == pytest.approx((0.75 - 1.96 * deviation, 0.75 + 1.96 * deviation), abs=0.01)
    assert one == scores.score("e", "knn", "accuracy", y, [predicted], (0,))


def test_balanced_accuracy_weighs_classes_alike() -> None:
    y, predicted = torch.tensor([0] * 9 + [2]), one_hot(torch.tensor([0] * 10), 3)
    assert metrics.accuracy(y, predicted) == 0.9
    assert metrics.balanced_accuracy(y, predicted) == 0.5


def test_scores_survive_json_and_are_rendered_as_tables() -> None:
    from rich.console import Console

    found = [scores.Score("my|net", "knn", "accuracy", 0.5, 0.4, 0.6, (0,), (0.5,), 10, {"k": 3})]
    assert scores.from_rows(json.loads(scores.to_json(found))) == found
    assert json.loads(scores.to_json(found))[0]["settings"] == {"k": 3}
    assert "| my\\|net | knn | accuracy | 50.0 % | 40.0 – 60.0 | bootstrap | 10 |" in scores.to_markdown(found)
    with (console := Console(width=120)).capture() as printed:
        console.print(scores.to_table(found))
    assert "my|net" in printed.get()


# --- controls ---------------------------------------------------------------------------------------------------------


def test_the_background_is_blind_to_the_target_and_sees_the_texture() -> None:
    image = torch.rand(1, 128, 128)
    target = image.clone()
    target[:, 40:88, 40:88] = 1
    assert torch.equal(*controls.background_features([image, target]))
    numbers = controls.background_features([image, image.repeat_interleave(2, -1)[..., :128], torch.zeros(1, 8, 9)])
    assert numbers.shape == (3, len(controls.NUMBERS))
    assert numbers.isfinite().all()
    assert (numbers[0, 6:].abs() < 0.1).all()
    assert numbers[1, 6] > 0.4 > numbers[1, 7].abs() + 0.2  # doubled columns: correlated along rows only


def test_the_background_is_taken_after_the_crop_the_encoder_gets() -> None:
    samples = listing(Chips(2), NAMES)
    native = [torch.from_numpy(c.pixels).float() / 255 for c in samples.reader]
    cropped = controls.background_features([p[:, 2:14, 2:14] for p in native])
    torch.testing.assert_close(controls.listing_background(samples, 12), cropped)


def measured(*what: Any) -> list[Score]:
    return [one for found in measure(*what) for one in found.scores]


@pytest.mark.parametrize("protocol", ["knn", "linear", "attentive", "fewshot", "finetune"])
def test_every_score_stands_beside_the_untrained_encoder_and_the_background(protocol: str) -> None:
    options = Options(shots=(5, 10), seeds=(0, 1, 2), epochs=2)
    found = measured({"pretrained": Toy(), RANDOM: Toy()}, task(), protocol, options)
    names = ("pretrained", RANDOM, BACKGROUND, PIXELS)
    assert {s.encoder for s in found} == set(names)
    pairs = {e: [(s.protocol, s.metric) for s in found if s.encoder == e] for e in names}
    assert pairs["pretrained"] == pairs[RANDOM] == pairs[BACKGROUND] == pairs[PIXELS]
    assert {metric for _, metric in pairs[RANDOM]} == set(metrics.METRICS)
    assert all(s.n_test == 24 and 0 <= s.low <= s.mean <= s.high <= 1 for s in found if s.metric == "accuracy")
    first = next(s for s in found if s.encoder == "pretrained")
    assert first.mean > (0.9 if protocol in ("knn", "linear", "fewshot") else 0.3)
    twin = first.settings["paired"]
    assert (twin["against"], twin["difference"], twin["p"]) == (RANDOM, 0, 1)  # the same network twice
    assert "against random-init, paired" in scores.to_markdown(found)
    if protocol == "fewshot":
        assert len(set(first.settings["draws"].values())) == 3
    if protocol in ("attentive", "finetune"):
        assert next(s for s in found if s.encoder == PIXELS).settings["control"] == "linear probe"


def test_fine_tuning_says_that_its_background_control_is_linear() -> None:
    found = measured({RANDOM: Toy()}, task(), "fewshot", Options("finetune", shots=(2,), seeds=(0, 1)))
    assert [(s.protocol, s.settings["mode"]) for s in found if s.metric == "accuracy"] == [
        ("2-shot finetune", "finetune"),
        ("2-shot finetune", "linear"),
        ("2-shot finetune", "linear"),
    ]


def test_a_suite_without_control_or_with_wrong_words_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"«zeroshot» is none of knn.*; mode «x».*; recipe «y».*no «random-init»"):
        measure({"pretrained": Toy()}, task(), "zeroshot", Options("x", "y"))


def test_a_suite_refuses_a_training_chip_in_the_test_set() -> None:
    t = task()
    both: Listing = listing(Chips(3), NAMES)
    with pytest.raises(DataError, match="also among"):
        measure({RANDOM: Toy()}, replace(t, test=both), "knn")


def test_a_packed_catalog_is_evaluated_from_end_to_end(tmp_path: Path) -> None:
    from foundation.models.vit import ViT
    from shards.synthetic import write

    catalog = write(tmp_path, size=48, per_class_train=6, per_class_test=4, pretrain=0)
    torch.manual_seed(0)
    packed = Task(*own(catalog, catalog), image_size=48, crop=40)
    found = measured({RANDOM: ViT(32, 2, 2)}, packed, "fewshot", Options(shots=(5,), seeds=(0, 1)))
    assert [s.encoder for s in found if s.metric == "accuracy"] == [RANDOM, BACKGROUND, PIXELS]
    assert found[0].n_test == 4 * len(catalog.classes)


# --- attention --------------------------------------------------------------------------------------------------------


def test_distances_between_tokens_are_in_pixels() -> None:
    d = token_distances((2, 3), 16)
    assert d[0].tolist() == pytest.approx([0, 16, 32, 16, 16 * math.sqrt(2), 16 * math.sqrt(5)])
    assert torch.equal(d, d.T)


@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([8, 16]))
@settings(max_examples=15, deadline=None)
def test_uniform_attention_has_the_mean_distance_and_identity_none(h: int, w: int, patch: int) -> None:
    n = h * w
    uniform = torch.full((2, 3, n, n), 1 / n)
    expected = np.mean([[patch * math.dist(divmod(i, w), divmod(j, w)) for i in range(n)] for j in range(n)])
    torch.testing.assert_close(
        attention_distance(uniform, (h, w), patch, 0), torch.full((2, 3), float(expected)), rtol=1e-5, atol=1e-5
    )
    assert not attention_distance(torch.eye(n).expand(1, 2, n, n), (h, w), patch, 0).any()


def test_what_goes_to_the_class_token_counts_as_no_distance() -> None:
    n = 9
    attention = torch.full((1, 1, 1 + n, 1 + n), 0.5 / n)
    attention[..., 0] = 0.5
    expected = 0.5 * token_distances((3, 3), 16).mean()
    torch.testing.assert_close(attention_distance(attention, (3, 3), 16)[0, 0], expected)


def test_distances_of_an_encoder_cover_its_blocks_images_and_heads() -> None:
    from foundation.models.vit import ViT

    encoder = ViT(32, 3, 2).train()
    found = attention_distances(encoder, torch.rand(4, 1, 48, 32))
    assert found.shape == (3, 4, 2)
    assert ((found > 0) & (found < 16 * math.hypot(2, 1))).all()
    assert encoder.training


def test_a_score_of_an_encoder_that_saw_test_images_says_so_wherever_it_is_shown() -> None:
    y = torch.tensor([0, 1])
    seen = {"weights": "16 samples", "pretrained_on_test_images": 2}
    for facts, shown in ((seen, True), ({**seen, "pretrained_on_test_images": 0}, False)):
        one = scores.score("pretrained", "knn", "accuracy", y, [one_hot(y)], (0,), facts)
        assert ("PRETRAINED ON 2 OF THE TEST IMAGES" in scores.to_markdown([one])) is shown
