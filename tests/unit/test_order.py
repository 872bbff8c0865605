"""The order of a run is a pure function: every sample once per epoch, the same for any number of processes."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import DataError
from shards.order import Order, check_division, rank_positions

SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 9), lanes=st.integers(1, 6), block=st.integers(1, 4), epoch=st.integers(0, 3))
def test_every_sample_comes_exactly_once_per_epoch_of_the_lanes(sizes, seed, lanes, block, epoch):
    total = sum(sizes)
    lanes = min(lanes, total)
    order = Order(sizes, seed, lanes, block)
    length = np.diff(np.arange(lanes + 1) * total // lanes)  # lanes differ by one sample at most
    assert length.max() - length.min() <= 1
    turns = [np.arange(epoch * n, (epoch + 1) * n) * lanes + lane for lane, n in enumerate(length)]
    ids = order.sample_ids(np.concatenate(turns))
    assert sorted(ids.tolist()) == list(range(total))


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 9), start=st.integers(0, 500), block=st.integers(1, 4))
def test_a_seek_gives_what_a_replay_gives(sizes, seed, start, block):
    lanes = min(3, sum(sizes))
    replay = Order(sizes, seed, lanes, block).sample_ids(np.arange(start + 20))[start:]
    seek = Order(sizes, seed, lanes, block).sample_ids(np.arange(start, start + 20))
    assert replay.tolist() == seek.tolist()


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
    order = Order([100] * 16, seed=3, lanes=4, block_shards=1)
    ids = order.sample_ids(np.arange(100) * 4 + 2)  # the first hundred samples of lane 2
    assert len(set((ids // 100).tolist())) == 1


def test_epochs_and_seeds_differ():
    def epoch(order: Order, number: int) -> list[int]:
        return order.sample_ids(np.arange(number * 60, (number + 1) * 60)).tolist()

    order = Order([20, 20, 20], seed=0, lanes=1, block_shards=2)
    assert epoch(order, 0) != epoch(order, 1)
    assert epoch(order, 0) != epoch(Order([20, 20, 20], seed=1, lanes=1, block_shards=2), 0)


def test_an_order_takes_tensors_keeps_the_sequence_of_positions_and_survives_pickling():
    order = Order([7, 9], seed=5, lanes=2, block_shards=2)
    positions = torch.tensor([40, 3, 3, 17])
    expected = order.sample_ids(np.arange(41))[[40, 3, 3, 17]].tolist()
    assert order.sample_ids(positions).dtype == np.int64
    assert pickle.loads(pickle.dumps(order)).sample_ids(positions).tolist() == expected


def test_fewer_samples_than_lanes_is_an_error_that_names_the_fix():
    with pytest.raises(DataError, match=r"5 samples cannot fill 8 lanes[\s\S]*at most 5"):
        Order([2, 3], seed=0, lanes=8, block_shards=1)
    with pytest.raises(DataError, match="must be at least 1"):
        Order([2, 3], seed=0, lanes=0, block_shards=1)


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
