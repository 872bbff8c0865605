"""A mixture of sources gives the same global batches on any number of processes and workers, whatever is killed."""

from __future__ import annotations

import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
from groups import FORKS
from stream_rank import COMMON, main

from shards.order import Mixture, rank_positions
from shards.pack import Record, SourceSpec, pack
from shards.reader import Reader

STEPS = 40
STOP = STEPS * COMMON["global_batch"]
WEIGHTS = {"ground": 3.0, "ships": 1.0, "tiny": 0.2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three sources of different sizes and dtypes in many small shards; one has fewer samples than there are lanes."""
    rng = np.random.default_rng(0)

    def chips(count: int, dtype: str) -> list[Record]:
        return [Record(rng.integers(1, 250, (6 + i % 3, 7)).astype(dtype), str(i)) for i in range(count)]

    counts = {"ground": (700, "uint8"), "ships": (150, "uint16"), "tiny": (5, "float32")}
    specs = [SourceSpec(name, records=chips(*what)) for name, what in counts.items()]
    return pack(tmp_path_factory.mktemp("corpus"), specs, shard_bytes=20_000)


@pytest.fixture(scope="module")
def expected(corpus):
    """Position → (sample id, crc of its pixels), from the order functions and the reader alone."""
    import zlib

    order, reader = mixture(corpus), Reader(corpus)
    ids = order.sample_ids(np.arange(STOP)).tolist()
    return {p: (i, zlib.crc32(reader[i].pixels.tobytes())) for p, i in enumerate(ids)}


def mixture(catalog) -> Mixture:
    parts = [(s.name, s.kept) for s in catalog.sources]
    return Mixture(parts, WEIGHTS, COMMON["seed"], COMMON["lanes"], COMMON["block_shards"])


def start_ranks(
    root: str, out: Path, world: int, workers: tuple[int, ...], start: int, hold: int | None = None
) -> list[BaseProcess]:
    ranks = range(world)
    processes = [
        FORKS.Process(target=main, args=(root, out, rank, world, workers, start, STOP, WEIGHTS, hold)) for rank in ranks
    ]
    for process in processes:
        process.start()
    return processes


def ended(process: BaseProcess) -> int | None:
    process.join(120)
    return process.exitcode


def finished(out: Path, pattern: str, world: int) -> dict[int, tuple[int, int]]:
    """Position → (sample id, crc) of every global step that all ranks of a launch have finished."""
    ranks = []
    for file in sorted(out.glob(pattern)):
        lines = [line.split() for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        ranks.append([(int(step), int(p), int(i), int(crc)) for step, p, i, crc in lines])
    share = COMMON["global_batch"] // world
    assert len(ranks) == world
    steps = min(len(rows) // share for rows in ranks)
    return {p: (i, crc) for rows in ranks for _, p, i, crc in rows[: steps * share]}


def test_the_global_batches_of_1_2_4_and_8_processes_hold_the_same_samples(corpus):
    order = mixture(corpus)
    for step in range(STEPS):
        place = (step, COMMON["global_batch"], COMMON["lanes"])
        whole = sorted(order.sample_ids(rank_positions(*place, 0, 1)).tolist())
        for world in (2, 4, 8):
            parts = [order.sample_ids(rank_positions(*place, rank, world)) for rank in range(world)]
            assert sorted(np.concatenate(parts).tolist()) == whole


@pytest.mark.parametrize("world", [1, 2, 4])
def test_real_processes_with_0_1_and_3_workers_read_what_the_order_says(corpus, expected, tmp_path, world):
    for process in start_ranks(corpus.root, tmp_path, world, (0, 1, 3), 0):
        assert ended(process) == 0
    for workers in (0, 1, 3):
        assert finished(tmp_path, f"w{workers}-*", world) == expected


def test_world_size_changed_twice_after_kills_in_the_middle_changes_nothing(corpus, expected, tmp_path):
    seen: dict[int, tuple[int, int]] = {}
    for world, workers, kill in ((2, 1, 12), (4, 0, 25), (1, 3, None)):
        start = len(seen)
        processes = start_ranks(corpus.root, tmp_path, world, (workers,), start, kill)
        files = [tmp_path / f"w{workers}-from{start}-rank{r}of{world}" for r in range(world)]
        if kill is None:
            assert [ended(process) for process in processes] == [0]
        else:
            deadline = time.monotonic() + 120
            while not all(f.exists() and f.stat().st_size for f in files) or reached(files[-1]) < kill:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            for process in processes:
                process.kill()
                assert ended(process) == -signal.SIGKILL
        new = finished(tmp_path, f"w{workers}-from{start}-*", world)
        assert min(new) == start
        seen |= new
        assert sorted(seen) == list(range(len(seen)))
    assert seen == expected


def reached(file: Path) -> int:
    return int(file.read_text().splitlines()[-1].split()[0])
