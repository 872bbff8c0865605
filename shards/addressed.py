"""Addressed randomness: a random number is looked up, never drawn.

A value is a pure function of (seed, purpose, position, slot). Every device, world size and worker count finds the
same one, and resuming needs no generator state. The mixer is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) in
wrapping 64-bit integer arithmetic, which torch gives identically on CPU and GPU.
"""

from __future__ import annotations

import hashlib
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

_Ints = TypeVar("_Ints", Tensor, np.ndarray)


def _signed(value: int) -> int:
    """The 64-bit two's-complement reading of `value`."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_GOLDEN, _MIX1, _MIX2 = _signed(0x9E3779B97F4A7C15), _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shift(x: _Ints, bits: int) -> _Ints:
    """Logical (not arithmetic) right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: _Ints) -> _Ints:
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def stream_key(seed: int, purpose: str) -> int:
    """A 64-bit key for (seed, purpose), stable across processes and Python versions."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest(), "little", signed=True)


def bits(seed: int, purpose: str, positions: Tensor, count: int) -> Tensor:
    """`count` random 63-bit non-negative integers for each position: int64 [B] → int64 [B, count]."""
    key = stream_key(seed, purpose)
    base = _mix(positions.to(torch.int64) * _GOLDEN + key)
    slots = torch.arange(1, count + 1, device=positions.device, dtype=torch.int64) * _GOLDEN
    return _shift(_mix(base[:, None] + slots[None, :]), 1)


def uniform(seed: int, purpose: str, positions: Tensor, count: int) -> Tensor:
    """`count` uniform numbers in [0, 1) for each position: int64 [B] → float32 [B, count], equal on all devices."""
    return (_shift(bits(seed, purpose, positions, count), 39)).to(torch.float32) * (1.0 / (1 << 24))


def permutation(seed: int, purpose: str, positions: Tensor, length: int) -> Tensor:
    """A random permutation of range(length) for each position: int64 [B] → int64 [B, length]."""
    # A 63-bit key collides with probability ~length² / 2^64; the stable sort keeps even that case deterministic.
    return bits(seed, purpose, positions, length).argsort(dim=1, stable=True)


_HALF_ROUNDS, _SMALL = 8, 64


def shuffled(seed: int, purpose: str, address: np.ndarray, index: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Where `index` goes in the permutation of range(length) that belongs to each address, looked up alone.

    int64 [B] three times, 0 <= index < length <= 2**62 → int64 [B]. Time and memory do not depend on the lengths, and
    for every (seed, purpose, address) the map is a bijection of range(length). A generalised Feistel network (Black and
    Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002): the index is written as (left, right) in radix
    a·b >= length with a = ceil(sqrt(length)), halves are added in turn modulo a and b, and what lands at or beyond
    `length` walks on, which less than one in sqrt(length) does. Over addresses, every index goes everywhere equally
    often and neighbours separate as in random permutations (tests/unit/test_addressed.py), but of the length!
    permutations only a sample occurs. Raises ValueError for an index outside its range.
    """
    if index.size and (index.min() < 0 or (index >= length).any()):
        raise ValueError("an index lies outside range(length)")
    key = _mix(address * _GOLDEN + stream_key(seed, purpose))
    result = _feistel(index, key, length)
    small = np.flatnonzero(length < _SMALL)  # few values per half: the same number of rounds mixes them less
    for again in (1, 2) if small.size else ():
        result[small] = _feistel(result[small], key[small] + again * _HALF_ROUNDS, length[small])
    return result


def _feistel(index: np.ndarray, key: np.ndarray, length: np.ndarray) -> np.ndarray:
    """The network with its walk back into range: a bijection of range(length), int64 [B]."""
    result = _rounds(index, key, length)
    while (walking := np.flatnonzero(result >= length)).size:
        result[walking] = _rounds(result[walking], key[walking], length[walking])
    return result


def _rounds(index: np.ndarray, key: np.ndarray, length: np.ndarray) -> np.ndarray:
    """The rounds of the network: a bijection of range(a·b), int64 [B]."""
    a = np.ceil(np.sqrt(length)).astype(np.int64)
    b = -(-length // a)
    left, right = np.divmod(index, b)
    for number in range(_HALF_ROUNDS):
        # The upper 31 bits of a mixed half, scaled to the other half's range: no modulo, no overflow below 2**31.
        mixed = _shift(_mix(right * _GOLDEN + key + number), 33)
        left = left + ((mixed * a) >> 31)
        left -= a * (left >= a)
        left, right, a, b = right, left, b, a
    return left * b + right
