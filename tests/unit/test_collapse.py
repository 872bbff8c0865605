"""The collapse monitor's numbers: known matrices, their ranges, and what counts as collapsed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foundation.config import MonitorConfig
from foundation.training.collapse import Moments, collapsed, describe, feature_std, mean_cosine, rankme, variance

LIMITS = MonitorConfig()
WELL = {"feature_std": 0.1, "feature_cosine": 0.9, "rankme": 4.0, "target_variance": 0.1}


def rows(count: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def test_features_of_the_same_image_everywhere_are_collapsed_and_directions_on_a_sphere_are_not() -> None:
    same = rows(1, 32).expand(64, 32)
    assert describe(same) == pytest.approx({"feature_std": 0, "feature_cosine": 1, "rankme": 1}, abs=1e-6)
    spread = describe(rows(4000, 32))
    assert spread["feature_std"] == pytest.approx(1, abs=0.01)
    assert spread["feature_cosine"] == pytest.approx(0, abs=0.01)
    assert spread["rankme"] == pytest.approx(32, rel=0.01)


def test_the_effective_rank_of_known_matrices() -> None:
    assert rankme(torch.eye(5)) == pytest.approx(5)
    assert rankme(torch.cat([torch.eye(3), torch.zeros(3, 4)], 1)) == pytest.approx(3)
    assert rankme(rows(9, 1) @ rows(1, 7)) == pytest.approx(1)
    assert rankme(torch.zeros(6, 4)) == 1
    # Singular values 3 and 1: the entropy of (3/4, 1/4).
    assert rankme(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(math.exp(2 * math.log(2) - 0.75 * math.log(3)))


def test_the_mean_cosine_is_that_of_all_pairs_of_different_images() -> None:
    x = rows(7, 5)
    pairs = [torch.cosine_similarity(x[i], x[j], dim=0) for i in range(7) for j in range(7) if i != j]
    assert mean_cosine(x) == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-6)


def test_features_along_one_line_have_deviation_and_no_rank() -> None:
    line = rows(1, 16) * rows(64, 1)
    assert feature_std(line) > 0.5
    assert collapsed(WELL | describe(line), LIMITS) == (
        "the features differ along one direction only (rankme 1, limit 1.05)"
    )


@given(st.integers(2, 20), st.integers(1, 12), st.integers(0, 5), st.sampled_from([1e-20, 1e-3, 1.0, 1e15]))
@settings(max_examples=60, deadline=None)
def test_every_statistic_stays_in_its_range(count: int, dim: int, seed: int, scale: float) -> None:
    x = rows(count, dim, seed) * scale
    assert 0 <= feature_std(x) <= 1 + 1e-9
    assert 1 - 1e-9 <= rankme(x) <= min(count, dim) + 1e-9
    assert -1 - 1e-9 <= mean_cosine(x) <= 1 + 1e-9


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 4), st.floats(-50, 50))
@settings(max_examples=40, deadline=None)
def test_the_variance_does_not_depend_on_who_saw_what(parts: list[int], dim: int, offset: float) -> None:
    parts = [2, *parts]  # some rank saw something
    x = rows(sum(parts), dim).double() + offset
    assert variance(Moments.of(part) for part in x.split(parts)) == pytest.approx(
        float(x.var(0, correction=0).mean()), rel=1e-6, abs=1e-9
    )


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({}, None),
        ({"feature_std": 0.0049}, "the features of different images are the same (feature_std 0.0049, limit 0.005)"),
        ({"feature_std": math.nan}, "the features of different images are the same (feature_std nan, limit 0.005)"),
        ({"target_variance": 0.0}, "the target is the same everywhere (target_variance 0, limit 1e-08)"),
    ],
)
def test_what_has_collapsed_is_said_with_its_number_and_limit(found: dict[str, float], words: str | None) -> None:
    assert collapsed(WELL | found, LIMITS) == words


def test_features_that_are_not_finite_count_as_collapsed() -> None:
    x = rows(8, 4)
    x[3, 2] = math.inf
    assert all(math.isnan(value) for value in describe(x).values())
    assert collapsed(describe(x), LIMITS) is not None


def test_a_probe_without_a_look_at_features_collapses_nothing() -> None:
    assert collapsed({"probe_knn": 0.1}, LIMITS) is None
