"""A mixture keeps its proportions everywhere, reads each source in that source's own order, and costs what it says."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import DataError
from shards.order import FEW, TURNS, Mixture, Order, rank_positions
from shards.simulation import simulate

PARTS = [("a", [300, 200, 0, 400]), ("tiny", [1]), ("b", [150, 350]), ("c", [5, 20])]
WEIGHTS = {"a": 4.0, "tiny": 0.5, "b": 2, "c": 1}
weights = st.lists(st.floats(0.01, 1), min_size=2, max_size=12)


def bounds(parts: list[tuple[str, list[int]]]) -> np.ndarray:
    """The first id of every part, with the end appended."""
    return np.cumsum([0, *(sum(sizes) for _, sizes in parts)])


def source_of(ids: np.ndarray, parts: list[tuple[str, list[int]]]) -> np.ndarray:
    return bounds(parts).searchsorted(ids, side="right") - 1


@pytest.mark.parametrize("lanes", [1, 2, 8, 60, 240, 960])
@settings(max_examples=6, deadline=None)
@given(shares=weights, seed=st.integers(0, 99), start=st.integers(0, TURNS * 60))
def test_every_window_of_ten_thousand_positions_has_the_proportions(lanes, shares, seed, start):
    parts = [(f"s{i}", [1]) for i in range(len(shares))]  # one sample each: the id is the source
    mixture = Mixture(parts, {name: share for (name, _), share in zip(parts, shares, strict=True)}, seed, lanes, 1)
    drawn = mixture.sample_ids(np.arange(start, start + 40_000))
    for source, share in enumerate(np.array(shares) / sum(shares)):
        count = np.cumsum(np.concatenate([[0], drawn == source]))
        realised = (count[10_000:] - count[:-10_000]) / 10_000
        assert np.abs(realised - share).max() < 0.01


@pytest.mark.parametrize("lanes", [8, 240])
def test_every_lane_and_every_rank_draws_every_source_in_proportion(lanes):
    mixture = Mixture([(name, [1]) for name in "abcd"], {"a": 8, "b": 4, "c": 3, "d": 1}, 3, lanes, 1)
    drawn = mixture.sample_ids(np.arange(400 * lanes)).reshape(400, lanes)
    for source, share in enumerate([0.5, 0.25, 0.1875, 0.0625]):
        assert np.abs((drawn == source).mean(axis=0) - share).max() < 0.01  # of a lane
        for rank in range(8):
            assert abs((drawn[:40, rank::8] == source).mean() - share) < 0.05  # of a rank in forty turns
    assert len({tuple(lane) for lane in drawn.T.tolist()}) > 0.95 * lanes  # lanes are not in step


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9), st.sampled_from([1, 3, 8, 240]), st.integers(0, 3 * TURNS), st.booleans())
def test_what_was_taken_of_each_source_is_counted_as_a_replay_counts_it(seed, lanes, position, weighted):
    mixture = Mixture(PARTS, WEIGHTS if weighted else None, seed, lanes, 2)
    drawn = source_of(mixture.sample_ids(np.arange(position)), PARTS)
    assert mixture.taken(position) == {name: int((drawn == n).sum()) for n, (name, _) in enumerate(PARTS)}


def test_what_was_taken_of_a_source_without_weight_is_not_listed():
    mixture = Mixture(PARTS, {**WEIGHTS, "a": 0}, 0, lanes=8, block_shards=1)
    assert sum(mixture.taken(10**15).values()) == 10**15
    assert mixture.taken(0) == {"tiny": 0, "b": 0, "c": 0}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 9), st.sampled_from([1, 3, 8]), st.integers(1, 3))
def test_the_nth_turn_of_a_source_in_a_lane_is_that_lanes_nth_position_of_its_own_order(seed, lanes, block):
    ids = Mixture(PARTS, WEIGHTS, seed, lanes, block).sample_ids(np.arange(900 * lanes))
    source, lane, begin = source_of(ids, PARTS), np.arange(len(ids)) % lanes, bounds(PARTS)
    for number, (name, sizes) in enumerate(PARTS):
        own = Order(name, sizes, seed, lanes, block)
        for each in range(lanes):
            found = ids[(source == number) & (lane == each)] - begin[number]
            assert found.size
            assert found.tolist() == own.sample_ids(np.arange(len(found)) * lanes + each).tolist()


@pytest.mark.parametrize("at", [0, 2, 4])
def test_adding_a_source_leaves_the_sequences_of_the_others_unchanged_lane_by_lane(at):
    more = [*PARTS[:at], ("new", [70, 80]), *PARTS[at:]]
    lanes, p = 4, np.arange(6000)
    before, after = (
        Mixture(parts, {**WEIGHTS, "new": 3} if parts is more else WEIGHTS, 1, lanes, 2).sample_ids(p)
        for parts in (PARTS, more)
    )
    for number, (name, _) in enumerate(PARTS):
        new = [other for other, _ in more].index(name)
        for lane in range(lanes):
            one, two = (
                ids[lane::lanes][source_of(ids[lane::lanes], parts) == n] - bounds(parts)[n]
                for ids, parts, n in ((before, PARTS, number), (after, more, new))
            )
            assert two.size
            assert one[: len(two)].tolist() == two.tolist()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9), st.lists(st.integers(0, 9000), min_size=1, max_size=40), st.sampled_from([1, 2, 7]))
def test_positions_looked_up_in_any_order_and_any_company_give_the_same(seed, positions, lanes):
    replay = Mixture(PARTS, WEIGHTS, seed, lanes, 2).sample_ids(np.arange(max(positions) + 1))
    mixture = Mixture(PARTS, WEIGHTS, seed, lanes, 2)
    assert mixture.sample_ids(torch.tensor(positions)).tolist() == replay[positions].tolist()
    assert [mixture.sample_ids(np.array([p])).item() for p in positions] == replay[positions].tolist()
    assert pickle.loads(pickle.dumps(mixture)).sample_ids(np.array(positions)).tolist() == replay[positions].tolist()


def test_any_number_of_processes_reads_the_same_global_batches():
    mixture = Mixture(PARTS, WEIGHTS, 2, lanes=8, block_shards=2)
    for step in (0, 1, 500):
        whole = mixture.sample_ids(np.arange(step * 32, (step + 1) * 32)).tolist()
        for world in (1, 2, 4, 8):
            seen = {}
            for rank in range(world):
                positions = rank_positions(step, 32, 8, rank, world)
                seen |= dict(zip(positions.tolist(), mixture.sample_ids(positions).tolist(), strict=True))
            assert [seen[p] for p in sorted(seen)] == whole


@pytest.mark.parametrize("lanes", [60, 240])
def test_every_source_is_covered_exactly_once_per_pass(lanes):
    sizes = [78] * 320  # a scaled-down billion: four sources, many shards, blocks of eight
    mixture = Mixture([(name, sizes) for name in "abcd"], {"a": 3, "b": 2, "c": 2, "d": 1}, 0, lanes, 8)
    total = sum(sizes)
    ids = mixture.sample_ids(np.arange(lanes * (total // lanes + 1) * 9))
    assert total >= FEW * lanes
    for source in range(4):
        per_lane = [lane[lane // total == source] - source * total for lane in ids.reshape(-1, lanes).T]
        turns = np.diff(np.arange(lanes + 1) * total // lanes)
        passed = np.concatenate([lane[:n] for lane, n in zip(per_lane, turns, strict=True)])
        assert np.bincount(passed, minlength=total).tolist() == [1] * total


def test_neighbours_and_shards_count_through_all_parts():
    parts = [("none", [0, 0]), ("left out", [500]), ("a", [100, 0, 100]), ("b", [90, 90, 90])]
    mixture = Mixture(parts, {"none": 0, "left out": 0, "a": 1, "b": 1}, 0, lanes=2, block_shards=1)
    shard_ends = np.cumsum([size for _, sizes in parts for size in sizes])
    assert mixture.samples == shard_ends[-1]
    for position in range(400):
        here = mixture.sample_ids(np.array([position]))
        (shard,) = mixture.shards_at(np.array([position]))
        assert shard == shard_ends.searchsorted(here, side="right")
        others = mixture.neighbours(position)
        assert set(shard_ends.searchsorted(others, side="right")) == {shard}
        assert sorted([*others, *here]) == list(range(shard_ends[shard - 1], shard_ends[shard]))
        assert mixture.neighbours(position, 2).tolist() == others[:2].tolist()
    assert set(mixture.shards_at(np.arange(40))) | set(mixture.shards_ahead(np.arange(400))) == {3, 5, 6, 7, 8}


def test_without_weights_sources_come_in_proportion_to_their_samples():
    ids = Mixture(PARTS, None, 0, 1, 2).sample_ids(np.arange(TURNS))
    samples = np.diff(bounds(PARTS))
    exact = np.bincount(source_of(ids, PARTS)) - samples / samples.sum() * TURNS
    assert np.abs(exact).max() < 1


def test_the_smallest_weight_gets_a_turn_and_zero_gets_none():
    parts = [("a", [9]), ("b", [1]), ("c", [5]), ("d", [1])]
    ids = Mixture(parts, {"a": 1e300, "b": 1e-300, "c": 0, "d": 5e-324}, 0, 1, 1).sample_ids(np.arange(TURNS))
    assert np.bincount(source_of(ids, parts)).tolist() == [TURNS - 2, 1, 0, 1]


def test_a_single_source_is_read_in_its_own_order():
    alone = Mixture([("a", [300, 200])], None, 4, 3, 1).sample_ids(np.arange(2000))
    assert alone.tolist() == Order("a", [300, 200], 4, 3, 1).sample_ids(np.arange(2000)).tolist()


def test_seeds_give_other_phases():
    parts = [("a", [1]), ("b", [1])]
    assert len({tuple(Mixture(parts, None, seed, 8, 1).sample_ids(np.arange(64))) for seed in range(5)}) == 5


@pytest.mark.parametrize(
    ("given_weights", "message"),
    [
        ({**WEIGHTS, "tinny": 1}, r"tinny, which is no source[\s\S]*did you mean tiny\?"),
        ({**WEIGHTS, "zzz": 1}, r"zzz, which is no source[\s\S]*the sources: a, tiny, b, c"),
        ({**WEIGHTS, "a": -1}, r"weight of a is -1[\s\S]*finite number"),
        ({**WEIGHTS, "a": float("nan")}, "weight of a is nan"),
        ({**WEIGHTS, "a": float("inf")}, "weight of a is inf"),
        ({**WEIGHTS, "a": True}, "weight of a is True"),
        ({**WEIGHTS, "a": "2"}, "weight of a is '2'"),
        (dict.fromkeys(WEIGHTS, 0), r"weight above 0[\s\S]*positive weight"),
        ({"a": 1}, r"no weight is given for tiny, b, c[\s\S]*weight 0 leaves one out"),
    ],
)
def test_weights_that_mean_nothing_are_errors_that_name_the_fix(given_weights, message):
    with pytest.raises(DataError, match=message):
        Mixture(PARTS, given_weights, 0, 1, 1)


def test_parts_that_cannot_be_mixed_are_errors_that_name_the_fix():
    with pytest.raises(DataError, match=r"source b has a weight but no samples[\s\S]*weight 0"):
        Mixture([("a", [1]), ("b", [0])], {"a": 1, "b": 1}, 0, 1, 1)
    with pytest.raises(DataError, match="no source has samples"):
        Mixture([("a", [0])], None, 0, 1, 1)
    with pytest.raises(DataError, match="same name"):
        Mixture([("a", [1]), ("a", [2])], None, 0, 1, 1)


@pytest.mark.parametrize("lanes", [60, 960])
def test_a_billion_samples_need_little_memory(lanes):
    found = simulate(lanes=lanes, repeats=1)
    assert found["samples"] > 0.999e9
    assert found["peak_mib"] < 64  # tables of shards of four epochs; a list of the samples would be 7,600
    assert {"us_per_sample_64", "us_per_sample_1024", "seek_ms"} <= set(found)


def test_memory_does_not_grow_with_the_number_of_samples():
    few, many = (simulate(shards=8_000, samples_per_shard=each, repeats=1)["peak_mib"] for each in (100, 1_000_000))
    assert many < 1.2 * few


def test_blocks_and_lanes_of_a_billion_samples_are_covered_exactly():
    shards, each, lanes = 128_000, 7_812, 960
    order = Order("big", np.full(shards, each), 0, lanes, 8)
    for position in (0, 10**9 + 7, 10**12):
        block = np.append(order.neighbours(position), order.sample_ids(np.array([position])))
        wanted = [np.arange(s * each, (s + 1) * each) for s in order.shards_at(np.array([position]))]
        assert (np.sort(block) == np.sort(np.concatenate(wanted))).all()
        assert len(wanted) == 8
    turns = np.arange(0, order.samples // lanes, 3)  # every third sample of two neighbouring lanes' whole ranges
    ids = np.concatenate([order.sample_ids(turns * lanes + lane) for lane in (17, 18)])
    assert len(np.unique(ids)) == len(ids) == 2 * len(turns)
    assert len(np.unique(ids // each)) <= 2 * (order.samples // lanes // each + 16)  # of few shards, as lanes promise
