"""Our loader as a child process of `foundation bench loader`: the same tasks as bench_loader_peers, and ten passes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from foundation.bench_loader_peers import BATCH, answer, memory, tasks
from shards import catalog as catalogs
from shards.augment import Augment
from shards.catalog import Catalog
from shards.index import path_of
from shards.pack import SourceSpec, pack
from shards.schema import Record
from shards.stream import Batch, Stream


def stream(catalog: Catalog, workers: int, start: int = 0, passes: int = 1, batch: int = BATCH) -> Stream:
    """The stream of a run on one process; from the beginning it ends after whole passes."""
    return Stream(
        catalog,
        seed=0,
        lanes=BATCH,
        block_shards=4,
        global_batch=batch,
        micro_batch=batch,
        workers=workers,
        start=start,
        stop=None if start else passes * catalog.samples // batch * batch,
    )


def ours(root: Path, workers: int, size: int) -> Iterator[list[Tensor] | Tensor]:
    """One pass: the chips of each batch (views of one buffer), or augmented fp32 [B, 1, size, size]."""
    augment = Augment(size=size)
    for batch in stream(catalogs.load(root), workers):
        yield augment(batch, 0) if size else batch.pixels


def resume(root: Path, position: int) -> dict[str, Any]:
    """Seconds from nothing to the first batch at a position."""
    start = time.perf_counter()
    batch: Batch = next(iter(stream(catalogs.load(root), 0, start=position)))
    seconds = time.perf_counter() - start
    return {"how": "seeks" if int(batch.position[0]) == position else "wrong position", "seconds": seconds}


def write_large(root: Path, shards: int, per_shard: int) -> None:
    """A catalog of shards · per_shard tiny chips: one packed shard under many names, so that it costs seconds."""
    pixels = np.random.default_rng(0).integers(0, 255, (per_shard, 8, 8), np.uint8)
    records = [Record(chip, f"{i}.png") for i, chip in enumerate(pixels)]
    catalog = pack(root, [SourceSpec("large", records=records)], shard_bytes=1 << 40)
    (source,) = catalog.sources
    (shard,) = source.shards
    copies = [replace(shard, name=f"copy-{i:05d}.tar") for i in range(shards)]
    for copy in copies:
        os.link(root / shard.name, root / copy.name)
        os.link(path_of(root / shard.name), path_of(root / copy.name))
    catalogs.save(catalogs.of(root, [replace(source, shards=tuple(copies))]))


def memory_per_pass(root: Path, passes: int) -> dict[str, Any]:
    """Memory before the catalog is opened and at the end of each pass, and samples per second of all of them."""
    base, batch, found, number = memory(os.getpid()), 8 * BATCH, [], 0
    catalog = catalogs.load(root)
    start = time.perf_counter()
    for number, _ in enumerate(stream(catalog, 1, passes=passes, batch=batch), start=1):
        if number % (catalog.samples // batch) == 0:
            found.append(memory(os.getpid()))
    return {"base": base, "passes": found, "samples_per_second": number * batch / (time.perf_counter() - start)}


def do(task: dict[str, Any]) -> dict[str, Any]:
    """Do one task."""
    root = Path(task["root"])
    if task["do"] == "write":
        files = sorted(Path(task["source"]).rglob("*.png"))
        records = (Record(np.array(Image.open(file)), file.name, file.parent.name) for file in files)
        pack(root, [SourceSpec("chips", records=records)], shard_bytes=8 << 20)
    elif task["do"] == "write-large":
        write_large(root, task["shards"], task["per_shard"])
    elif task["do"] == "memory-per-pass":
        return memory_per_pass(root, task["passes"])
    elif task["do"] == "resume":
        return resume(root, task["position"])
    else:
        return answer(ours, task)
    return {}


if __name__ == "__main__":
    for task, reply in tasks():
        try:
            reply(do(task))
        except Exception as error:
            reply({"error": f"{type(error).__name__}: {error}"})
