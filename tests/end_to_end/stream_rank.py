"""One rank of a run that only reads: appends `step position sample_id crc` for every sample of every finished step.

Arguments: catalog, output folder, rank, world size, workers, start, stop, weights as JSON, seconds that a step takes;
several worker counts, joined by commas, run one after another into outputs of their own.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from pathlib import Path

from shards.catalog import load
from shards.stream import Stream

COMMON = {"seed": 11, "lanes": 8, "block_shards": 2, "global_batch": 16, "micro_batch": 2}


def main() -> None:
    root, out, rank, world, workers, start, stop, weights, seconds = sys.argv[1:]
    for count in workers.split(","):
        place = {"rank": int(rank), "world_size": int(world), "workers": int(count), "weights": json.loads(weights)}
        stream = Stream(load(root), **COMMON, **place, start=int(start), stop=int(stop))
        with open(Path(out) / f"w{count}-from{start}-rank{rank}of{world}", "w", buffering=1) as file:
            lines: list[str] = []
            for batch in stream:
                for position, number, pixels in zip(batch.position, batch.sample_id, batch.pixels, strict=True):
                    crc = zlib.crc32(pixels.numpy().tobytes())
                    lines.append(f"{int(position) // COMMON['global_batch']} {int(position)} {int(number)} {crc}\n")
                if len(lines) * int(world) == COMMON["global_batch"]:
                    file.write("".join(lines))
                    lines = []
                    time.sleep(float(seconds))


if __name__ == "__main__":
    main()
