"""The size table of the ViT family: one row per size."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """Width, number of blocks and attention heads of an encoder (MLP ratio 4 throughout)."""

    dim: int
    depth: int
    heads: int


FAMILY = {
    "nano": Row(96, 4, 3),  # for the demo and the tests
    "tiny": Row(192, 12, 3),
    "small": Row(384, 12, 6),
    "base": Row(768, 12, 12),
    "large": Row(1024, 24, 16),
    "huge": Row(1280, 32, 16),
}
