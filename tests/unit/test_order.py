"""The order of a source is a pure function: every sample once per epoch, the same for any number of processes."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shards.errors import DataError
from shards.order import FEW, Order, check_division, rank_positions

SIZES = st.lists(st.integers(0, 150), min_size=1, max_size=8).filter(any)
CUT, DEALT = [134, 24, 51, 80, 151], [4, 1, 5, 7, 3, 0, 6, 8, 2]
small = settings(max_examples=40, deadline=None)


def the_pass(order: Order, epoch: int) -> np.ndarray:
    """The positions of one epoch, lane by lane in the order of its sequence."""
    if order.samples < FEW * order.lanes:
        return np.arange(epoch * order.samples, (epoch + 1) * order.samples)
    turns = np.diff(np.arange(order.lanes + 1) * order.samples // order.lanes)
    assert turns.max() - turns.min() <= 1
    return np.concatenate([np.arange(epoch * n, (epoch + 1) * n) * order.lanes + i for i, n in enumerate(turns)])


@settings(max_examples=80, deadline=None)
@given(SIZES, st.integers(0, 9), st.integers(1, 6), st.integers(1, 4), st.integers(0, 3))
def test_every_sample_comes_exactly_once_per_epoch(sizes, seed, lanes, block, epoch):
    order = Order("s", sizes, seed, lanes, block)
    assert sorted(order.sample_ids(the_pass(order, epoch)).tolist()) == list(range(sum(sizes)))


@small
@given(SIZES, st.integers(0, 9), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2))
def test_an_epoch_goes_block_by_block_through_whole_shards(sizes, seed, lanes, block, epoch):
    assume(sum(sizes) >= FEW * lanes)
    order = Order("s", sizes, seed, lanes, block)
    sequence, starts = order.sample_ids(the_pass(order, epoch)), np.concatenate([[0], np.cumsum(sizes)])
    begin, blocks, seen = 0, 0, set()
    while begin < len(sequence):
        shards = order.shards_at(the_pass(order, epoch)[begin : begin + 1])
        assert 1 <= len(shards) <= block
        assert not seen & set(shards)
        seen |= set(shards)
        end = begin + sum(sizes[s] for s in shards)
        inside = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in shards])
        assert sorted(sequence[begin:end].tolist()) == sorted(inside.tolist())
        begin, blocks = end, blocks + 1
    assert seen == {s for s, size in enumerate(sizes) if size}
    assert blocks <= -(-len(sizes) // block)


@small
@given(SIZES, st.integers(0, 9), st.lists(st.integers(0, 3000), min_size=1, max_size=30), st.integers(1, 5))
def test_positions_looked_up_in_any_order_and_any_company_give_the_same(sizes, seed, positions, lanes):
    replay = Order("s", sizes, seed, lanes, 2).sample_ids(np.arange(max(positions) + 1))
    order = Order("s", sizes, seed, lanes, 2)
    assert order.sample_ids(np.array(positions)).tolist() == replay[positions].tolist()
    assert [int(order.sample_ids(np.array([p]))[0]) for p in positions] == replay[positions].tolist()


@pytest.mark.parametrize("samples", [1, 2, 7, 100])
def test_a_source_smaller_than_the_lanes_is_covered_exactly_and_evenly(samples):
    order = Order("tiny", [samples], seed=0, lanes=960, block_shards=8)
    ids = order.sample_ids(np.arange(samples * 50))
    assert np.bincount(ids, minlength=samples).tolist() == [50] * samples
    assert (np.sort(ids.reshape(50, samples), axis=1) == np.arange(samples)).all()
    assert order.sample_ids(np.array([10**15])).shape == (1,)


@small
@given(SIZES, st.integers(0, 5), st.integers(0, 4000), st.integers(1, 3), st.integers(1, 3))
def test_neighbours_are_the_rest_of_the_block_in_its_order(sizes, seed, position, lanes, block):
    order = Order("s", sizes, seed, lanes, block)
    here, shards = int(order.sample_ids(np.array([position]))[0]), order.shards_at(np.array([position]))
    starts = np.concatenate([[0], np.cumsum(sizes)])
    inside = {int(i) for s in shards for i in range(starts[s], starts[s + 1])}
    others = order.neighbours(position).tolist()
    assert len(others) == len(inside) - 1
    assert set(others) == inside - {here}
    assert order.neighbours(position, 3).tolist() == others[:3]


def test_the_first_neighbour_is_the_next_sample_of_the_lane():
    order = Order("s", [200] * 6, seed=1, lanes=3, block_shards=2)
    assert order.neighbours(0, 2).tolist() == order.sample_ids(np.array([3, 6])).tolist()


@small
@given(SIZES, st.integers(0, 5), st.integers(1, 3), st.integers(1, 3))
def test_every_block_a_lane_enters_was_announced_while_it_read_the_one_before(sizes, seed, lanes, block):
    assume(sum(sizes) > 2 * lanes)  # else the few positions below do not leave the first epoch
    order = Order("s", sizes, seed, lanes, block)
    for lane in range(lanes):
        positions = np.arange(lane, 3 * sum(sizes), lanes)
        changes = np.flatnonzero(np.diff(order.locate(positions)[:2]).any(axis=0))
        assert changes.size
        for last in changes[:20]:
            entered = order.shards_at(positions[last + 1 : last + 2])
            assert order.shards_ahead(positions[last : last + 1]) == entered
            assert all(sizes[shard] for shard in entered)


def test_several_positions_name_each_shard_once():
    order = Order("s", [100] * 16, seed=3, lanes=4, block_shards=2)
    shards = order.shards_at(np.arange(64))
    assert len(shards) == len(set(shards)) == 8  # four lanes, a block of two shards each
    assert len(set(order.shards_ahead(np.arange(64))) | set(shards)) == 16
    assert order.shards_at(np.array([], np.int64)) == order.shards_ahead(np.array([], np.int64)) == []
    assert len(order.sample_ids(np.array([], np.int64))) == 0


@settings(max_examples=40, deadline=None)
@given(step=st.integers(0, 1000), times=st.integers(1, 4), world=st.sampled_from([1, 2, 4, 8]))
def test_the_ranks_share_a_global_batch_without_overlap_and_each_keeps_to_its_lanes(step, times, world):
    lanes = 8
    size = lanes * times
    parts = [rank_positions(step, size, lanes, rank, world) for rank in range(world)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(step * size, (step + 1) * size))
    for rank, part in enumerate(parts):
        assert (np.diff(part) > 0).all()
        assert set((part % lanes % world).tolist()) == {rank}


def test_a_rank_never_touches_the_lanes_of_another_rank_in_any_step():
    lanes, world = 8, 4
    seen = [
        set(np.concatenate([rank_positions(s, 32, lanes, r, world) % lanes for s in range(20)])) for r in range(world)
    ]
    assert [len(lane) for lane in seen] == [2] * world
    assert len(set.union(*seen)) == lanes


def test_lanes_of_an_epoch_read_shard_by_shard_and_not_across_all_shards():
    order = Order("s", [100] * 16, seed=3, lanes=4, block_shards=1)
    ids = order.sample_ids(np.arange(100) * 4 + 2)  # the first hundred samples of lane 2
    assert len(set((ids // 100).tolist())) == 1


@pytest.mark.parametrize("sizes", [[20, 20, 20], [300, 300]])
def test_epochs_seeds_and_sources_differ(sizes):
    total = sum(sizes)

    def epoch(name: str, seed: int, number: int) -> list[int]:
        order = Order(name, sizes, seed, lanes=1, block_shards=2)
        return order.sample_ids(np.arange(number * total, (number + 1) * total)).tolist()

    found = [epoch("s", 0, 0), epoch("s", 0, 1), epoch("s", 1, 0), epoch("t", 0, 0)]
    assert len({tuple(ids) for ids in found}) == 4


@pytest.mark.parametrize("sizes", [[7, 9], [700, 900]])
def test_an_order_takes_tensors_keeps_the_sequence_of_positions_and_survives_pickling(sizes):
    order = Order("s", sizes, seed=5, lanes=2, block_shards=2)
    positions = torch.tensor([40, 3, 3, 17])
    expected = order.sample_ids(np.arange(41))[[40, 3, 3, 17]].tolist()
    assert order.sample_ids(positions).dtype == np.int64
    assert pickle.loads(pickle.dumps(order)).sample_ids(positions).tolist() == expected


def test_the_order_never_changes_silently():
    cut, dealt = Order("s", [100, 0, 60, 90], 7, 2, 2), Order("s", [9], 7, 2, 2)
    assert cut.sample_ids(np.array([0, 1, 2, 3, 10**12])).tolist() == CUT
    assert dealt.sample_ids(np.arange(9)).tolist() == DEALT


def test_a_source_without_samples_and_numbers_below_one_are_errors_that_name_the_fix():
    with pytest.raises(DataError, match=r"source s has no samples[\s\S]*weight 0"):
        Order("s", [0, 0], seed=0, lanes=8, block_shards=1)
    with pytest.raises(DataError, match="lanes = 0 and block_shards = 1 must be at least 1"):
        Order("s", [2, 3], seed=0, lanes=0, block_shards=1)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((30, 8, 0, 1, 1), r"global batch 30 is not a multiple of 8 lanes[\s\S]*24 or 32"),
        ((4, 8, 0, 1, 1), r"global batch 4 is not a multiple of 8 lanes[\s\S]*use a global batch of 8"),
        ((32, 8, 0, 3, 1), r"8 lanes cannot be shared evenly by 3 processes[\s\S]*divides 8"),
        ((32, 8, 0, 2, 5), r"micro batch 5 does not divide the 16 samples[\s\S]*micro batch of 4"),
        ((32, 8, 2, 2, 4), "rank 2 below world_size"),
        ((0, 8, 0, 1, 1), "must be positive"),
    ],
)
def test_numbers_that_do_not_divide_are_errors_that_name_the_fix(numbers, message):
    with pytest.raises(DataError, match=message):
        check_division(*numbers)
