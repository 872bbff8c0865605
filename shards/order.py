"""Which sample stands at which position: pure functions of (shard sizes, seed, position), no I/O, no state.

Position p belongs to lane p mod L, its turn is p div L. A lane has an endless sequence of sources of its own (Mixture),
and its n-th turn of a source is position n·L + lane of that source's own order (Order), which knows nothing of other
sources: adding one reshuffles none. Permutations are looked up (`shards.addressed.shuffled`), so what is held in memory
grows with the number of shards, never with that of samples, and any position costs the same to reach.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shards.addressed import bits, shuffled, stream_key
from shards.errors import DataError

FEW = 64  # a source with fewer samples per lane is dealt out instead of cut into ranges
TURNS = 65_536  # period of the pattern of sources; a power of two, so that every odd step visits every turn
_STEP = 40_503  # the odd number next to TURNS / golden ratio: its multiples mod TURNS are spread most evenly
_EPOCH, _BLOCK, _BEGIN, _INDEX, _LENGTH = range(5)  # rows of what Order.locate returns


class _Epoch(NamedTuple):
    """The permuted shards of an epoch; where in its sequence shards and blocks begin, each with the end appended."""

    shards: np.ndarray
    starts: np.ndarray
    blocks: np.ndarray


def _groups(values: np.ndarray) -> Iterator[tuple[int, Any]]:
    """Each distinct value with the selector of its elements; one group, the usual case, costs no sort and no copy."""
    if values.size and (values == values[0]).all():
        yield int(values[0]), slice(None)
        return
    for value in np.unique(values).tolist():
        yield value, np.flatnonzero(values == value)


def _shuffle(seed: int, key: int | np.ndarray, found: np.ndarray) -> np.ndarray:
    """The place in its epoch's sequence of every located position, int64 [5, B] → int64 [B]."""
    address = key + (found[_EPOCH] << 32) + found[_BLOCK]
    return found[_BEGIN] + shuffled(seed, "order/block", address, found[_INDEX], found[_LENGTH])


class Order:
    """The endless order of one source. Picklable.

    In each epoch the shards are permuted, `block_shards` consecutive ones form a block, and the samples of a block are
    permuted. The epoch's sequence is cut into L contiguous ranges, one per lane; a lane at its end goes on with the
    next epoch, so no lane waits for, or reads, what another one reads. A source with fewer than 64 samples per lane is
    one block and dealt out: position q has place q mod N of epoch q div N. `shard_sizes`: samples per shard, 0 allowed.
    Raises DataError for lanes or block_shards below 1 and for a source without samples.
    """

    def __init__(
        self, name: str, shard_sizes: Sequence[int] | np.ndarray, seed: int, lanes: int, block_shards: int
    ) -> None:
        if lanes < 1 or block_shards < 1:
            what = f"lanes = {lanes} and block_shards = {block_shards} must be at least 1"
            raise DataError(what, do="set data.lanes and data.block_shards to 1 or more")
        self.name, self.seed, self.lanes, self.block_shards = name, seed, lanes, block_shards
        self.key = stream_key(seed, f"order/{name}")
        self._sizes = np.asarray(shard_sizes, np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)])
        self.samples = int(self._starts[-1])
        if not self.samples:
            raise DataError(f"source {name} has no samples", do="leave it out (weight 0), or loosen the filter")
        self._dealt = self.samples < FEW * lanes
        self._make_cache()

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_epoch"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._make_cache()

    def _make_cache(self) -> None:
        # Lanes reach their ends within a few turns of each other: two epochs are in use at most, four never thrash.
        self._epoch = lru_cache(maxsize=4)(self._compute_epoch)

    def _compute_epoch(self, epoch: int) -> _Epoch:
        count = len(self._sizes)
        address, length = np.full(count, epoch), np.full(count, count)
        shards = shuffled(self.seed, f"order/shards/{self.name}", address, np.arange(count), length)
        starts = np.concatenate([[0], np.cumsum(self._sizes[shards])])
        return _Epoch(shards, starts, np.append(starts[: -1 : self.block_shards], starts[-1]))

    def _range(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Turn, and begin and end of the lane's range of every epoch, int64 [B] each."""
        turn, lane = np.divmod(position, self.lanes)
        return turn, lane * self.samples // self.lanes, (lane + 1) * self.samples // self.lanes

    def locate(self, position: np.ndarray) -> np.ndarray:
        """Epoch, block, where the block begins in the epoch, index inside it and its length: int64 [B] → [5, B]."""
        if self._dealt:
            found = np.zeros((5, len(position)), np.int64)
            found[_EPOCH], found[_INDEX] = np.divmod(position, self.samples)
            found[_LENGTH] = self.samples
            return found
        turn, begin, end = self._range(position)
        epoch, step = np.divmod(turn, end - begin)
        return self._in_blocks(epoch, begin + step)

    def _in_blocks(self, epoch: np.ndarray, place: np.ndarray) -> np.ndarray:
        found = np.empty((5, len(place)), np.int64)
        found[_EPOCH] = epoch
        for e, here in _groups(epoch):
            blocks, at = self._epoch(e).blocks, place[here]
            block = blocks.searchsorted(at, side="right") - 1
            begin = blocks[block]
            found[_BLOCK:, here] = block, begin, at - begin, blocks[block + 1] - begin
        return found

    def resolve(self, epoch: np.ndarray, place: np.ndarray) -> np.ndarray:
        """The sample at each place of an epoch's sequence of shards: int64 [B] twice → int64 [B]."""
        if self._dealt:
            return place
        ids = np.empty_like(place)
        for e, here in _groups(epoch):
            (shards, starts, _), at = self._epoch(e), place[here]
            rank = starts.searchsorted(at, side="right") - 1
            ids[here] = self._starts[shards[rank]] + at - starts[rank]
        return ids

    def _ids(self, found: np.ndarray) -> np.ndarray:
        return self.resolve(found[_EPOCH], _shuffle(self.seed, self.key, found))

    def sample_ids(self, positions: np.ndarray | Tensor) -> np.ndarray:
        """The sample at each position: int64 [B] → int64 [B]."""
        return self._ids(self.locate(np.asarray(positions, np.int64)))

    def neighbours(self, position: int, count: int | None = None) -> np.ndarray:
        """The samples that follow that of `position` in its block, cyclic, without itself: int64 [at most count]."""
        found = self.locate(np.array([position], np.int64))
        others = int(found[_LENGTH, 0]) - 1
        found = np.repeat(found, others if count is None else min(count, others), axis=1)
        found[_INDEX] = (found[_INDEX] + 1 + np.arange(found.shape[1])) % found[_LENGTH]
        return self._ids(found)

    def shards_at(self, positions: np.ndarray | Tensor) -> list[int]:
        """Ids of the shards, none of them empty, of the blocks that these positions read."""
        return self._shards(self.locate(np.asarray(positions, np.int64)))

    def shards_ahead(self, positions: np.ndarray | Tensor) -> list[int]:
        """Ids of the shards, none of them empty, of the block that each of these positions' lanes enters next."""
        p = np.asarray(positions, np.int64)
        found = self.locate(p)
        if not self._dealt:
            _, begin, end = self._range(p)
            after = found[_BEGIN] + found[_LENGTH]
            found = self._in_blocks(found[_EPOCH] + (after >= end), np.where(after < end, after, begin))
        return self._shards(found)

    def _shards(self, found: np.ndarray) -> list[int]:
        if self._dealt:
            return np.flatnonzero(self._sizes).tolist() if found.size else []
        shards: dict[int, None] = {}
        for epoch, block in dict.fromkeys(zip(found[_EPOCH].tolist(), found[_BLOCK].tolist(), strict=True)):
            inside = self._epoch(epoch).shards[block * self.block_shards : (block + 1) * self.block_shards]
            shards.update(dict.fromkeys(inside[self._sizes[inside] > 0].tolist()))
        return list(shards)


def _turns(samples: Mapping[str, int], weights: Mapping[str, float] | None) -> np.ndarray:
    """Turns of the pattern that each source gets, by largest remainder and at least one per positive weight: int64 [S].

    The pattern of a single source has one turn.
    """
    chosen: Mapping[str, float] = samples if weights is None else weights
    for name, value in chosen.items():
        if name not in samples:
            near = difflib.get_close_matches(name, samples, n=1)
            raise DataError(
                f"a weight is given for {name}, which is no source of this data",
                do=f"did you mean {near[0]}?" if near else f"the sources: {', '.join(samples)}",
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise DataError(f"the weight of {name} is {value!r}", do="use a finite number from 0 upwards")
        if value and not samples[name]:
            raise DataError(f"source {name} has a weight but no samples", do="use weight 0, or loosen the filter")
    if missing := [name for name in samples if name not in chosen]:
        raise DataError(f"no weight is given for {', '.join(missing)}", do="name every source; weight 0 leaves one out")
    wanted = np.array([chosen[name] for name in samples], np.float64)
    if not wanted.any():
        raise DataError("no source has samples and a weight above 0", do="give at least one source a positive weight")
    active = wanted > 0
    total = TURNS if active.sum() > 1 else 1
    ideal = wanted / wanted.max()  # first, so that no sum overflows
    ideal *= total / ideal.sum()
    turns = np.maximum(ideal.astype(np.int64), active)
    turns[np.argsort(turns - ideal, kind="stable")[: max(total - turns.sum(), 0)]] += 1
    while turns.sum() > total:
        turns[turns.argmax()] -= 1
    return turns


class Mixture:
    """The order of a run: several sources in fixed proportions, endless. Picklable.

    `sources`: (name, samples per shard) of each; sample ids and shard ids count through them in this order.
    `weights`: share of the positions by name of source, 0 leaves it out; None: in proportion to the samples.

    Every lane repeats one pattern of 65,536 turns, in which turn i belongs to the source whose interval of [0, 1)
    holds frac(i·g), g the golden ratio: among all such sequences the evenest (Niederreiter, 1992, section 3.1). The
    phases of the lanes put them, jittered and in random order, at even distances along [0, 1). So both the turns of a
    lane and the lanes of a turn draw every source within a few turns of its share, and no stretch strays.
    Raises DataError for weights that name no source, leave one unnamed, or are negative, not finite or all zero.
    """

    def __init__(
        self,
        sources: Sequence[tuple[str, Sequence[int] | np.ndarray]],
        weights: Mapping[str, float] | None,
        seed: int,
        lanes: int,
        block_shards: int,
    ) -> None:
        self.seed, self.lanes = seed, lanes
        sizes = {name: np.asarray(shards, np.int64) for name, shards in sources}
        if len(sizes) < len(sources):
            raise DataError("two sources have the same name", do="pack one of them under another name")
        turns = _turns({name: int(each.sum()) for name, each in sizes.items()}, weights)
        ids, shards = 0, 0
        self._orders, self._first_id, self._first_shard = [], [], []
        for (name, each), count in zip(sizes.items(), turns, strict=True):
            if count:
                self._orders.append(Order(name, each, seed, lanes, block_shards))
                self._first_id.append(ids)
                self._first_shard.append(shards)
            ids, shards = ids + int(each.sum()), shards + len(each)
        self.samples = ids
        self._keys = np.array([order.key for order in self._orders])
        self._make_pattern(turns[turns > 0])

    def _make_pattern(self, turns: np.ndarray) -> None:
        """Source and number of earlier turns of that source by turn of the pattern; phases; turns before each phase."""
        self._turns, period = turns, int(turns.sum())
        self._pattern = np.cumsum(turns).searchsorted(np.arange(period) * _STEP % period, side="right")
        draws = bits(self.seed, "order/phases", torch.arange(self.lanes), 2).numpy()
        stratum = draws[:, 0].argsort(kind="stable")
        point = ((stratum << 24) + (draws[:, 1] >> 39)) * period // (self.lanes << 24)
        self._phases = point * pow(_STEP, -1, period) % period
        self._earlier = np.empty(period, np.int64)
        self._before = np.empty((len(turns), self.lanes), np.int64)
        for source in range(len(turns)):
            mine = np.flatnonzero(self._pattern == source)
            self._earlier[mine] = np.arange(len(mine))
            self._before[source] = mine.searchsorted(self._phases)

    def _route(self, positions: np.ndarray | Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Source (among those with a weight) and position in its own order: int64 [B] → int64 [B] twice."""
        turn, lane = np.divmod(np.asarray(positions, np.int64), self.lanes)
        period, turn = np.divmod(turn + self._phases[lane], len(self._pattern))
        source = self._pattern[turn]
        number = period * self._turns[source] + self._earlier[turn] - self._before[source, lane]
        return source, number * self.lanes + lane

    def sample_ids(self, positions: np.ndarray | Tensor) -> np.ndarray:
        """The sample at each position: int64 [B] → int64 [B]."""
        source, own = self._route(positions)
        groups = list(_groups(source))
        found, ids = np.empty((5, len(own)), np.int64), np.empty(len(own), np.int64)
        for s, here in groups:
            found[:, here] = self._orders[s].locate(own[here])
        place = _shuffle(self.seed, self._keys[source], found)  # one look-up for all sources: it is what costs time
        for s, here in groups:
            ids[here] = self._orders[s].resolve(found[_EPOCH, here], place[here]) + self._first_id[s]
        return ids

    def taken(self, position: int) -> dict[str, int]:
        """Samples of each source with a weight at the positions below this one; counted by lanes, whatever position."""
        turns = -((np.arange(self.lanes) - position) // self.lanes)  # of each lane, rounded up
        period, turn = np.divmod(turns + self._phases, len(self._pattern))
        found = {}
        for source, order in enumerate(self._orders):
            earlier = np.flatnonzero(self._pattern == source).searchsorted(turn)
            found[order.name] = int((period * self._turns[source] + earlier - self._before[source]).sum())
        return found

    def neighbours(self, position: int, count: int | None = None) -> np.ndarray:
        """The samples that follow that of `position` in its block, cyclic, without itself: int64 [at most count]."""
        (source,), (own,) = self._route(np.array([position]))
        return self._orders[source].neighbours(int(own), count) + self._first_id[source]

    def shards_at(self, positions: np.ndarray | Tensor) -> list[int]:
        """Ids of the shards, none of them empty, of the blocks that these positions read."""
        source, own = self._route(positions)
        groups = _groups(source)
        return [self._first_shard[s] + n for s, here in groups for n in self._orders[s].shards_at(own[here])]

    def shards_ahead(self, positions: np.ndarray | Tensor) -> list[int]:
        """The shards of the blocks that the lanes of these positions enter next in the sources drawn there."""
        source, own = self._route(positions)
        groups = _groups(source)
        return [self._first_shard[s] + n for s, here in groups for n in self._orders[s].shards_ahead(own[here])]


def check_division(global_batch: int, lanes: int, rank: int, world_size: int, micro_batch: int = 1) -> None:
    """Raise DataError unless lanes | global_batch, world_size | lanes, and micro_batch | the share of a rank."""
    if min(global_batch, lanes, world_size, micro_batch) < 1 or not 0 <= rank < world_size:
        raise DataError(
            f"global_batch {global_batch}, lanes {lanes}, micro_batch {micro_batch}, world_size {world_size} must be "
            f"positive and rank {rank} below world_size",
            do="set data.lanes, train.global_batch and train.micro_batch to 1 or more; the launcher gives the rest",
        )
    if global_batch % lanes:
        below = global_batch // lanes * lanes
        raise DataError(
            f"global batch {global_batch} is not a multiple of {lanes} lanes",
            do=f"use a global batch of {below or lanes} or {below + lanes}, or lanes that divide {global_batch}",
        )
    if lanes % world_size:
        raise DataError(
            f"{lanes} lanes cannot be shared evenly by {world_size} processes",
            do=f"start a number of processes that divides {lanes}; changing lanes changes the order of the run",
        )
    share = global_batch // world_size
    if share % micro_batch:
        fits = max(m for m in range(1, min(micro_batch, share) + 1) if share % m == 0)
        raise DataError(
            f"micro batch {micro_batch} does not divide the {share} samples a rank has of each global batch",
            do=f"use a micro batch of {fits}, or another that divides {share}",
        )


def rank_positions(step: int, global_batch: int, lanes: int, rank: int, world_size: int) -> np.ndarray:
    """The positions of a global step in the lanes l ≡ rank (mod world_size): int64 [global_batch/world], sorted."""
    check_division(global_batch, lanes, rank, world_size)
    # world_size divides lanes and lanes divides global_batch, so p mod lanes mod world_size is p mod world_size.
    return np.arange(step * global_batch + rank, (step + 1) * global_batch, world_size, dtype=np.int64)
