"""Addressed randomness: a random number is looked up, never drawn.

A value is a pure function of (seed, purpose, position, slot). Every device, world size and worker count finds the
same one, and resuming needs no generator state. The mixer is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) in
wrapping 64-bit integer arithmetic, which torch gives identically on CPU and GPU.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The 64-bit two's-complement reading of `value`."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_GOLDEN, _MIX1, _MIX2 = _signed(0x9E3779B97F4A7C15), _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical (not arithmetic) right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
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
