"""Addressed randomness: what is promised of a looked-up number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.addressed import bits, permutation, stream_key, uniform

POSITIONS = torch.arange(20_000)
KEY = 4329691999854832094
BITS = [
    [3542446728209910253, 8149800999350822549],
    [3016341663261092900, 6547434726841244237],
    [1929332413310668020, 7936647212389565301],
]
ORDER = [3, 1, 8, 9, 2, 7, 0, 6, 4, 5]
seeds = st.integers(-(2**63), 2**63 - 1)


def test_golden_values_never_change_silently() -> None:
    assert stream_key(7, "crop") == KEY
    assert bits(7, "crop", torch.tensor([0, 1, 10**12]), 2).tolist() == BITS
    assert permutation(7, "mask", torch.tensor([5]), 10).tolist() == [ORDER]
    assert uniform(7, "crop", torch.tensor([0]), 1).item() == BITS[0][0] // 2**39 / 2**24


@given(seeds, st.text(max_size=20), st.integers(0, 2**62), st.integers(1, 9))
def test_values_are_in_range_and_equal_for_equal_addresses(seed: int, purpose: str, position: int, count: int) -> None:
    at = torch.tensor([position])
    draws, raw = uniform(seed, purpose, at, count), bits(seed, purpose, at, count)
    assert draws.shape == raw.shape == (1, count)
    assert draws.dtype == torch.float32
    assert raw.dtype == torch.int64
    assert (draws >= 0).all()
    assert (draws < 1).all()
    assert (raw >= 0).all()
    assert torch.equal(raw, bits(seed, purpose, at, count))


@given(seeds, st.lists(st.integers(0, 2**62), min_size=1, max_size=8))
def test_a_value_does_not_depend_on_its_neighbours_or_on_the_count(seed: int, positions: list[int]) -> None:
    together = bits(seed, "x", torch.tensor(positions), 5)
    for row, position in zip(together, positions, strict=True):
        assert torch.equal(row[:3], bits(seed, "x", torch.tensor([position]), 3)[0])


@settings(max_examples=10)
@given(seeds)
def test_values_are_uniform(seed: int) -> None:
    draws = uniform(seed, "uniform", POSITIONS, 2).double()
    shares = torch.histc(draws, bins=10, min=0, max=1) / draws.numel()
    assert (shares - 0.1).abs().max() < 0.01
    assert abs(draws.mean() - 0.5) < 0.01
    assert abs(draws.var() - 1 / 12) < 0.005


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("seed", uniform(1, "a", POSITIONS, 1)),
        ("purpose", uniform(0, "b", POSITIONS, 1)),
        ("position", uniform(0, "a", POSITIONS + 1, 1)),
        ("slot", uniform(0, "a", POSITIONS, 2)[:, 1:]),
    ],
)
def test_each_part_of_the_address_gives_independent_values(name: str, other: torch.Tensor) -> None:
    both = torch.cat([uniform(0, "a", POSITIONS, 1), other], dim=1)
    assert abs(torch.corrcoef(both.T)[0, 1]) < 0.03, name
    assert (both[:, 0] == both[:, 1]).float().mean() < 1e-3, name


@given(seeds, st.integers(1, 60))
def test_a_permutation_holds_every_index_once(seed: int, length: int) -> None:
    rows = permutation(seed, "mask", torch.arange(4), length)
    assert torch.equal(rows.sort(dim=1).values, torch.arange(length).expand(4, length))


def test_every_index_is_equally_likely_to_come_first() -> None:
    first = permutation(3, "mask", POSITIONS, 8)[:, 0]
    shares = torch.bincount(first, minlength=8) / len(POSITIONS)
    assert (shares - 1 / 8).abs().max() < 0.01
