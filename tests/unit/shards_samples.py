"""Made-up chips and a small packed catalog for the tests of shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shards.catalog import Catalog
from shards.pack import Record, SourceSpec, pack


def records(count: int, dtype: str = "uint8", seed: int = 0, classes: str = "ab") -> list[Record]:
    rng = np.random.default_rng(seed)
    return [
        Record(
            rng.integers(1, 200, (8 + i % 3, 9)).astype(dtype), f"{i}.png", classes[i * len(classes) // count] or None
        )
        for i in range(count)
    ]


def small(out: Path, **options) -> Catalog:
    sources = [
        SourceSpec("one", split="train", records=records(24)),
        SourceSpec("two", records=records(9, "uint16", 1)),
    ]
    return pack(out, sources, shard_bytes=2000, **options)
