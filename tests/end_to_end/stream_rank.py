"""One rank of a run that only reads."""

from __future__ import annotations

import signal
import zlib
from collections.abc import Mapping
from pathlib import Path

from shards.catalog import load
from shards.stream import Stream

COMMON = {"seed": 11, "lanes": 8, "block_shards": 2, "global_batch": 16, "micro_batch": 2}


def main(
    root: str,
    out: Path,
    rank: int,
    world: int,
    workers: tuple[int, ...],
    start: int,
    stop: int,
    weights: Mapping[str, float],
    hold: int | None,
) -> None:
    """Append `step position sample_id crc` for every sample of every finished step.

    Several worker counts run one after another into outputs of their own. A rank with `hold` waits for its death once
    it has written that many steps, and one more for each rank before it: ranks need not be at the same step.
    """
    for count in workers:
        place = {"rank": rank, "world_size": world, "workers": count, "weights": weights}
        stream = Stream(load(root), **COMMON, **place, start=start, stop=stop)
        with open(out / f"w{count}-from{start}-rank{rank}of{world}", "w", buffering=1) as file:
            lines: list[str] = []
            steps = start // COMMON["global_batch"]
            for batch in stream:
                for position, number, pixels in zip(batch.position, batch.sample_id, batch.pixels, strict=True):
                    crc = zlib.crc32(pixels.numpy().tobytes())
                    lines.append(f"{int(position) // COMMON['global_batch']} {int(position)} {int(number)} {crc}\n")
                if len(lines) * world == COMMON["global_batch"]:
                    file.write("".join(lines))
                    lines = []
                    steps += 1
                    if hold is not None and steps > hold + rank:
                        signal.pause()
