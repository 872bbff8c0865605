"""Which sample stands at which position: pure functions of (shard sizes, seed, position), no I/O, no state.

Position p belongs to lane p mod L. In each epoch the shards are permuted, `block_shards` consecutive ones form a block,
the samples of a block are permuted, and the resulting sequence is cut into L contiguous ranges, one per lane. A lane
that has used up its range goes on with the next epoch, so no lane ever waits for, or reads, what another one reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from shards.addressed import permutation
from shards.errors import DataError


def _permutation(seed: int, purpose: str, address: int, length: int) -> np.ndarray:
    return permutation(seed, purpose, torch.tensor([address]), length)[0].numpy()


class Order:
    """The order of a run. Picklable; computes only the blocks that are asked for.

    `shard_sizes`: samples per shard; `lanes`: contiguous readers; `block_shards`: shards shuffled together.
    Raises DataError for fewer samples than lanes.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, lanes: int, block_shards: int) -> None:
        self.seed, self.lanes, self.block_shards = seed, lanes, block_shards
        self._sizes = np.asarray(shard_sizes, np.int64)
        self.samples = int(self._sizes.sum())
        if lanes < 1 or block_shards < 1:
            raise DataError(f"lanes = {lanes} and block_shards = {block_shards} must be at least 1")
        if self.samples < lanes:
            raise DataError(
                f"{self.samples} samples cannot fill {lanes} lanes",
                do=f"set data.lanes to at most {self.samples}, or pack more data",
            )
        self._shard_starts = np.concatenate([[0], np.cumsum(self._sizes)])
        self._cuts = np.arange(lanes + 1, dtype=np.int64) * self.samples // lanes
        self._make_caches()

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_epoch", "_block")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._make_caches()

    def _make_caches(self) -> None:
        # Lanes stand in different blocks and may be one epoch apart: two blocks per lane never thrash.
        self._epoch = lru_cache(maxsize=4)(self._compute_epoch)
        self._block = lru_cache(maxsize=2 * self.lanes + 2)(self._compute_block)

    def _compute_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The permuted shards of an epoch, and where in its sequence each block begins (with the end appended)."""
        shards = _permutation(self.seed, "order/shards", epoch, len(self._sizes))
        ends = np.concatenate([[0], np.cumsum(self._sizes[shards])])
        return shards, np.append(ends[: -1 : self.block_shards], ends[-1])

    def _compute_block(self, epoch: int, block: int) -> np.ndarray:
        """The sample ids of one block in their order, int64."""
        shards = self._epoch(epoch)[0][block * self.block_shards : (block + 1) * self.block_shards]
        ids = np.concatenate([np.arange(self._shard_starts[s], self._shard_starts[s + 1]) for s in shards])
        return ids[_permutation(self.seed, f"order/block/{block}", epoch, len(ids))]

    def sample_ids(self, positions: np.ndarray | Tensor) -> np.ndarray:
        """The sample at each position: int64 [B] → int64 [B]."""
        p = np.asarray(positions, np.int64)
        turn, lane = np.divmod(p, self.lanes)
        epoch, step = np.divmod(turn, self._cuts[lane + 1] - self._cuts[lane])
        place = self._cuts[lane] + step  # in the sequence of that epoch
        ids = np.empty_like(p)
        for e in np.unique(epoch).tolist():
            begins = self._epoch(e)[1]
            block = np.searchsorted(begins, place, side="right") - 1
            for b in np.unique(block[epoch == e]).tolist():
                here = (epoch == e) & (block == b)
                ids[here] = self._block(e, b)[place[here] - begins[b]]
        return ids


def check_division(global_batch: int, lanes: int, rank: int, world_size: int, micro_batch: int = 1) -> None:
    """Raise DataError unless lanes | global_batch, world_size | lanes, and micro_batch | the share of a rank."""
    if min(global_batch, lanes, world_size, micro_batch) < 1 or not 0 <= rank < world_size:
        raise DataError(
            f"global_batch {global_batch}, lanes {lanes}, micro_batch {micro_batch}, world_size {world_size} must be "
            f"positive and rank {rank} below world_size"
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
