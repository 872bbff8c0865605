"""Metrics are the libraries' own, also in the bootstrap; scores and answers are what they were before."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foundation.evaluation import fewshot, knn, metrics, probe, scores


def clusters(n: int, seed: int, spread: float = 1.6, d: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(4).repeat_interleave(n)
    return torch.eye(4, d)[y] * 3 + spread * torch.randn(4 * n, d, generator=generator), y


@pytest.mark.parametrize("metric", metrics.METRICS)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 60), classes=st.integers(2, 5), hard=st.booleans())
@settings(max_examples=15, deadline=None)
def test_a_bootstrap_sample_has_the_value_the_library_gives_it(
    metric: str, seed: int, n: int, classes: int, hard: bool
) -> None:
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=draw)
    p = (torch.randn(n, classes, generator=draw) * (100 if hard else 2)).softmax(1)
    counts = torch.cat([torch.ones(1, n).double(), *metrics.resamples(seed, "test", 4, n)])
    found = metrics.resampled(metric, y, p, counts)
    for row, value in zip(counts, found.tolist(), strict=True):
        pick = torch.arange(n).repeat_interleave(row.long())
        assert value == pytest.approx(metrics.METRICS[metric](y[pick], p[pick]), abs=1e-6)


def test_bootstrap_samples_do_not_depend_on_how_many_are_made_at_once() -> None:
    whole = torch.cat([*metrics.resamples(3, "x", 7, 11)])
    assert whole.shape == (7, 11)
    assert whole.sum(1).tolist() == [11.0] * 7
    assert torch.equal(whole, torch.cat([*metrics.resamples(3, "x", 7, 11, chunk=2)]))


def test_confidence_that_is_right_as_often_as_it_says_is_calibrated() -> None:
    y = torch.tensor([0] * 3 + [1])
    p = torch.tensor([[0.75, 0.25]] * 4)
    assert metrics.calibration_error(y, p) == pytest.approx(0, abs=1e-6)
    assert metrics.calibration_error(1 - y, p) == pytest.approx(0.5, abs=1e-6)
    # Votes that sum to a little more than one are still probabilities, not logits.
    assert metrics.calibration_error(y[:3], torch.tensor([[1.0000001, 0.0]] * 3)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("shift", "least"), [(0.0, 0.4), (0.15, 0.8)])
def test_the_interval_of_the_calibration_error_covers_that_of_the_source(shift: float, least: float) -> None:
    """Answers that are right as often as their confidence says, or less often by `shift`: that is their error.

    Of calibrated answers the basic interval holds the 0 in about two thirds of the cases, the percentiles never.
    """
    trials, n, covered = 60, 200, {"basic": 0, "percentiles": 0}
    draw = torch.Generator().manual_seed(0)
    for trial in range(trials):
        confidence = 0.55 + 0.4 * torch.rand(n, generator=draw)
        p = torch.stack([confidence, 1 - confidence], 1)
        y = (torch.rand(n, generator=draw) >= confidence - shift).long()
        counts = torch.cat([*metrics.resamples(trial, "test", 200, n)])
        found = metrics.resampled("calibration error", y, p, counts)
        low, high = metrics.interval("calibration error", metrics.calibration_error(y, p), found)
        covered["basic"] += low - 1e-9 <= shift <= high
        low, high = found.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
        covered["percentiles"] += low <= shift <= high
    assert covered["basic"] >= least * trials
    if shift == 0:
        assert covered["percentiles"] == 0


def test_other_intervals_are_percentiles_and_no_interval_begins_below_zero() -> None:
    found = torch.linspace(0.2, 0.6, 401)
    assert metrics.interval("accuracy", 0.3, found) == pytest.approx((0.21, 0.59), abs=1e-6)
    assert metrics.interval("calibration error", 0.3, found) == pytest.approx((0.01, 0.39), abs=1e-6)
    assert metrics.interval("calibration error", 0.25, found) == pytest.approx((0, 0.29), abs=1e-6)


def test_answers_and_scores_are_what_they_were_when_protocols_returned_classes() -> None:
    (x, y), (z, truth) = clusters(40, 0), clusters(60, 1)
    answers = {
        "knn": knn.probabilities(x, y, z, 4),
        "linear": probe.probabilities(x, y, z, 4)[0],
        "fewshot": fewshot.linear(x, y, z, 4, 0),
    }
    marks = {name: hashlib.sha256(bytes(p.argmax(1).tolist())).hexdigest()[:16] for name, p in answers.items()}
    assert marks == {"knn": "c0221829254428e8", "linear": "5a75f237308482d1", "fewshot": "03cf4ad4b0df55b1"}
    known = {
        ("knn", "accuracy"): (0.7625, 0.7083333333333334, 0.8166666666666667),
        ("knn", "balanced accuracy"): (0.7625, 0.7115057077560194, 0.8175951962690049),
        ("linear", "accuracy"): (0.7291666666666666, 0.6708333333333333, 0.7833333333333333),
        ("linear", "balanced accuracy"): (0.7291666666666667, 0.6777980130240397, 0.7871985947766873),
        ("fewshot", "accuracy"): (0.675, 0.6083333333333333, 0.7333333333333333),
        ("fewshot", "balanced accuracy"): (0.675, 0.6146301737478207, 0.7311026691791399),
    }
    for (name, metric), expected in known.items():
        found = scores.score("e", name, metric, truth, [answers[name]], (0,))
        assert (found.mean, found.low, found.high) == pytest.approx(expected, abs=1e-12)
