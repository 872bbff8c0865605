"""Two encoders are compared on the same images, exactly for one seed and over images and seeds for several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import one_hot

from foundation.errors import DataError
from foundation.evaluation import paired
from foundation.evaluation.predictions import Predictions, write


def answers(right: torch.Tensor, encoder: str = "pretrained", protocol: str = "knn", weights: str = "a") -> Predictions:
    """Answers to two classes that are right where `right` bool [S, N] says so."""
    seeds, n = right.shape
    y = torch.arange(n) % 2
    p = one_hot(torch.where(right, y, 1 - y), 2).float()
    hashes = tuple(f"{i * 7919 % 100003:064x}" for i in range(n))
    return Predictions(encoder, protocol, weights, ("x", "y"), hashes, tuple(range(seeds)), y, p)


def wrong_at(n: int, *places: int) -> torch.Tensor:
    right = torch.ones(1, n, dtype=torch.bool)
    right[0, list(places)] = False
    return right


def test_mcnemar_counts_only_the_images_on_which_they_differ() -> None:
    first, second = wrong_at(40, *range(8))[0], wrong_at(40, 0, 20)[0]
    assert paired.mcnemar(first, second) == pytest.approx(2 * (1 + 8) / 2**8)  # 7 against 1 of 8 differing
    assert paired.mcnemar(first, first) == 1
    found = paired.compare(answers(first[None]), answers(second[None]))
    assert (found.difference, found.p, found.test) == (pytest.approx(6 / 40), pytest.approx(18 / 256), paired.MCNEMAR)
    assert found.low < found.difference < found.high
    assert found.accuracy == pytest.approx((32 / 40, 38 / 40))
    back = paired.compare(answers(second[None]), answers(first[None]))
    assert (back.difference, back.p) == (pytest.approx(-6 / 40), found.p)


def test_several_seeds_are_bootstrapped_over_images_and_seeds_together() -> None:
    draw = torch.Generator().manual_seed(0)
    worse, better = (torch.rand(5, 300, generator=draw) < share for share in (0.6, 0.75))
    found = paired.compare(answers(worse), answers(better))
    assert found.test == paired.BOOTSTRAP
    assert found.difference == pytest.approx((better.double() - worse.double()).mean().item())
    assert 0 < found.low < found.difference < found.high
    assert found.p == pytest.approx(2 / 2001)  # the least that 2,000 samples can tell
    assert found == paired.compare(answers(worse), answers(better))
    same = paired.compare(answers(worse), answers(worse))
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_the_interval_of_the_bootstrap_is_that_of_the_mean() -> None:
    difference = torch.randn(1, 500, generator=torch.Generator().manual_seed(0)).double()
    low, high, _ = paired.bootstrap(difference)
    half = 1.96 * difference.std().item() / 500**0.5
    assert (low, high) == pytest.approx((difference.mean().item() - half, difference.mean().item() + half), abs=0.02)


def test_one_lucky_seed_widens_the_interval() -> None:
    luck = torch.zeros(5, 200, dtype=torch.float64)
    luck[0] = 1
    low, high, p = paired.bootstrap(luck)
    assert low == 0
    assert high >= 0.6
    assert p > 0.2


def test_images_are_matched_by_hash_and_not_by_place() -> None:
    first = answers(wrong_at(30, 1, 2, 3))
    at = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    moved = replace(
        first, hashes=tuple(first.hashes[i] for i in at), y=first.y[at], probabilities=first.probabilities[:, at]
    )
    assert paired.compare(first, moved).p == 1
    assert paired.compare(first, moved).low == paired.compare(first, moved).high == 0


def test_what_cannot_be_paired_is_refused_with_the_reason() -> None:
    first = answers(wrong_at(10, 1))
    with pytest.raises(DataError, match="test images differ: 10 and 12, 0 only in the first, 2 only in the second"):
        paired.compare(first, answers(wrong_at(12, 1)))
    with pytest.raises(DataError, match="classes of 10 test images differ"):
        paired.compare(first, replace(first, y=1 - first.y))
    with pytest.raises(DataError, match=r"seeds differ: \(0,\) and \(5,\)"):
        paired.compare(first, replace(first, seeds=(5,)))


def test_runs_are_compared_under_the_protocols_they_share(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    write(a, [answers(wrong_at(30, 1, 2, 3)), answers(wrong_at(30, 1), protocol="linear")])
    write(a, [answers(wrong_at(30, 5, 6, 7, 8), encoder="random-init")])
    write(b, [answers(wrong_at(30, 1), weights="b"), answers(wrong_at(30, 1), "random-init", "linear")])
    (found,) = paired.compare_runs(a, b)
    assert (found.protocol, found.first, found.second) == ("knn", "a", "b")
    assert found.difference == pytest.approx(2 / 30)
    assert found.cells()[:4] == ("knn", "a: 90.0 %", "b: 96.7 %", "+6.7")
    with pytest.raises(DataError, match="do not both have answers of «pretrained» to linear") as caught:
        paired.compare_runs(a, b, ["linear"])
    assert "b has knn" in str(caught.value)
    write(tmp_path / "c", [answers(wrong_at(31, 1))])
    with pytest.raises(DataError, match="test images differ: 30 and 31"):
        paired.compare_runs(a, tmp_path / "c")
    with pytest.raises(DataError, match="answers of «pretrained» to any protocol"):
        paired.compare_runs(a, tmp_path / "none")


def test_two_checkpoints_scored_into_one_run_are_compared_by_naming_it_twice(tmp_path: Path) -> None:
    write(tmp_path, [answers(wrong_at(30, 1, 2, 3), weights="100 samples")])
    with pytest.raises(DataError, match="measured once under knn"):
        paired.compare_runs(tmp_path, tmp_path)
    write(tmp_path, [answers(wrong_at(30, 1), weights="200 samples")])
    (found,) = paired.compare_runs(tmp_path, tmp_path)
    assert {"100 samples" in found.first, "200 samples" in found.first} == {True, False}
    assert abs(found.difference) == pytest.approx(2 / 30)


def test_a_pair_that_was_measured_differently_says_how(tmp_path: Path, command: Callable[..., Any]) -> None:
    facts = "4,096 samples, averaged, corpus 0123abcd, train {}, crop {}, {} px"
    one, two = facts.format("aaaa1111", None, 128), facts.format("bbbb2222", 64, 96)
    assert paired.settings(one) == {"training images": "aaaa1111", "crop": "None", "image size": "128 px"}
    assert paired.settings(f"{one}, 20 epochs")["epochs"] == "20"
    assert paired.settings("") == {}
    write(tmp_path / "a", [answers(wrong_at(30, 1), weights=one), answers(wrong_at(30, 1), protocol="linear")])
    write(tmp_path / "b", [answers(wrong_at(30, 2), weights=two), answers(wrong_at(30, 1), protocol="linear")])
    found = paired.compare_runs(tmp_path / "a", tmp_path / "b")
    told = "training images aaaa1111 and bbbb2222, crop None and 64, image size 128 px and 96 px"
    assert [each.differing for each in found] == [told, ""]
    lines = command("paired", tmp_path / "a", tmp_path / "b").out.splitlines()
    assert [line for line in lines if "NOT ALIKE" in line] == [f"NOT ALIKE     knn, a and b: {told}"]
