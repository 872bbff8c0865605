"""Addressed randomness: what is promised of a looked-up number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.addressed import bits, permutation, shuffled, stream_key, uniform

POSITIONS = torch.arange(20_000)
KEY = 4329691999854832094
BITS = [
    [3542446728209910253, 8149800999350822549],
    [3016341663261092900, 6547434726841244237],
    [1929332413310668020, 7936647212389565301],
]
ORDER = [3, 1, 8, 9, 2, 7, 0, 6, 4, 5]
SHUFFLED = [5, 8, 3, 0, 4, 1, 7, 6, 9, 2]
seeds = st.integers(-(2**63), 2**63 - 1)


def look_up(seed: int, purpose: str, address: int | np.ndarray, index: int | np.ndarray, length: int) -> np.ndarray:
    address, index = np.broadcast_arrays(np.int64(address), np.atleast_1d(index).astype(np.int64))
    return shuffled(seed, purpose, address, index, np.full(index.shape, length))


def misfit(counts: np.ndarray) -> float:
    """Chi-square of equal expectations in standard deviations of its distribution."""
    freedom = len(counts) - 1
    return float((((counts - counts.mean()) ** 2 / counts.mean()).sum() - freedom) / (2 * freedom) ** 0.5)


def test_golden_values_never_change_silently() -> None:
    assert stream_key(7, "crop") == KEY
    assert bits(7, "crop", torch.tensor([0, 1, 10**12]), 2).tolist() == BITS
    assert permutation(7, "mask", torch.tensor([5]), 10).tolist() == [ORDER]
    assert look_up(7, "block", 5, np.arange(10), 10).tolist() == SHUFFLED
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


@settings(max_examples=60, deadline=None)
@given(seeds, st.text(max_size=9), st.integers(-(2**63), 2**63 - 1), st.integers(1, 3000))
def test_a_shuffled_range_holds_every_index_once(seed: int, purpose: str, address: int, length: int) -> None:
    assert np.sort(look_up(seed, purpose, address, np.arange(length), length)).tolist() == list(range(length))


@settings(max_examples=40, deadline=None)
@given(seeds, st.lists(st.tuples(st.integers(0, 2**62), st.integers(1, 2**62), st.floats(0, 1)), min_size=1))
def test_a_shuffled_index_does_not_depend_on_its_neighbours(seed: int, rows: list[tuple[int, int, float]]) -> None:
    address, length = (np.array(column, np.int64) for column in list(zip(*rows, strict=True))[:2])
    index = np.array([min(int(share * n), n - 1) for _, n, share in rows], np.int64)
    together = shuffled(seed, "x", address, index, length)
    alone = [look_up(seed, "x", a, i, n).item() for a, i, n in zip(address, index, length.tolist(), strict=True)]
    assert together.tolist() == alone
    assert ((together >= 0) & (together < length)).all()


@pytest.mark.parametrize("length", [2**40, 2**40 - 12_345, 2**62])
def test_ranges_far_beyond_memory_are_shuffled_evenly_and_without_collision(length: int) -> None:
    found = look_up(3, "far", 5, np.linspace(0, 0.99, 20_000) * length // 1, length)
    assert len(np.unique(found)) == 20_000
    assert misfit(np.bincount((found / length * 50).astype(int), minlength=50)) < 6


@pytest.mark.parametrize("length", [2, 3, 4, 5, 6, 7, 8, 9, 10, 63, 64, 65, 82, 150])
def test_every_index_goes_everywhere_and_neighbours_part_at_every_distance(length: int) -> None:
    address = np.arange(40_000)
    first, last = look_up(1, "t", address, 0, length), look_up(1, "t", address, length - 1, length)
    middle = look_up(1, "t", address, length // 2, length)
    for places in (first, middle, last):
        assert misfit(np.bincount(places, minlength=length)) < 6
    if length > 2:
        assert misfit(np.bincount((last - first) % length, minlength=length)[1:]) < 6


@pytest.mark.parametrize(("length", "count"), [(3, 6), (4, 24), (5, 120)])
def test_all_permutations_of_a_short_range_are_equally_likely(length: int, count: int) -> None:
    address = np.arange(40_000)
    places = [look_up(2, "t", address, index, length) for index in range(length)]
    codes = np.unique(sum(p * length**i for i, p in enumerate(places)), return_counts=True)[1]
    assert len(codes) == count
    assert misfit(codes) < 6


def test_a_shuffled_range_keeps_no_trace_of_its_order() -> None:
    length, index = 62_496, np.arange(62_496)
    rows = [look_up(seed, "t", address, index, length) for seed, address in ((0, 0), (0, 1), (1, 0))]
    for row in rows:
        assert abs(np.abs(row - index).mean() / length - 1 / 3) < 0.01  # of a random permutation
        assert abs(np.corrcoef(row[1:], row[:-1])[0, 1]) < 0.02
        assert (row == index).sum() < 10
    assert (rows[0] == rows[1]).sum() < 10
    assert (rows[0] == rows[2]).sum() < 10


@pytest.mark.parametrize("index", [-1, 5])
def test_an_index_outside_the_range_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match="outside range"):
        look_up(0, "t", 0, np.array([0, index]), 5)
