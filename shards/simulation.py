"""What the order of a run costs at the size of the largest data sets, without any data: only shard counts exist."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np

from shards.order import Mixture

BATCHES, BLOCK_SHARDS = (64, 1024), 8


def simulate(
    shards: int = 128_000,
    samples_per_shard: int = 7_812,
    sources: int = 4,
    lanes: int = 960,
    repeats: int = 100,
) -> dict[str, float]:
    """Cost of looking up samples in `sources` equal sources; the default is 1e9 samples in shards of 512 MB.

    Returns samples; peak_mib, the largest memory of NumPy and Python while walking and seeking; build_s; seek_ms, the
    mean of batches of the first size at random positions of 100 epochs; us_per_sample_B, consecutive batches of B.
    """
    parts = [(f"source-{i}", np.full(shards // sources, samples_per_shard)) for i in range(sources)]
    samples = sum(int(sizes.sum()) for _, sizes in parts)
    far = np.random.default_rng(0).integers(0, 100 * samples, 10)

    tracemalloc.start()
    order = Mixture(parts, None, 0, lanes, BLOCK_SHARDS)
    for start in [0, *far.tolist()]:
        order.sample_ids(np.arange(start, start + max(BATCHES)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    found = {"samples": float(samples), "peak_mib": peak / 2**20}
    begin = time.perf_counter()
    order = Mixture(parts, None, 0, lanes, BLOCK_SHARDS)
    found["build_s"] = time.perf_counter() - begin
    begin = time.perf_counter()
    for start in far.tolist():
        order.sample_ids(np.arange(start, start + BATCHES[0]))
    found["seek_ms"] = (time.perf_counter() - begin) / len(far) * 1e3
    order.sample_ids(np.arange(BATCHES[0]))  # walking starts warm: an epoch is computed once in samples/batch batches
    for batch in BATCHES:
        begin = time.perf_counter()
        for number in range(repeats):
            order.sample_ids(np.arange(number * batch, (number + 1) * batch))
        found[f"us_per_sample_{batch}"] = (time.perf_counter() - begin) / repeats / batch * 1e6
    return found
