"""What a run learns from: the catalogs it names, filtered and checked, and the stream of its samples."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from foundation.config import Config, DataConfig
from foundation.errors import ConfigError, DataError, StorageError
from foundation.training.engine import Engine
from foundation.training.tracking import Tracker
from shards.audit import refuse_overlap
from shards.cache import Cache
from shards.catalog import Amplitude, Catalog, load
from shards.stream import Batch, Stream

REPLACED = "replaced.jsonl"
# Keys that a resumed run may change; the fingerprint still holds the samples of the catalog and its splits fixed.
FREE = ("catalog", "splits", "held_out", "overlap", "corrupt", "cache", "cache_gb", "workers")


def cache(data: DataConfig) -> Cache:
    """The cache of this node for shards of a URL."""
    return Cache(Path(data.cache).expanduser(), int(data.cache_gb * 1e9))


def training_catalog(config: Config) -> Catalog:
    """The training splits under the run's filter and amplitude rules.

    Raises ConfigError when no catalog is named, DataError when one cannot be used.
    """
    data = config.data
    if not data.catalog:
        raise ConfigError(
            "no data: data.catalog is not set",
            where="data.catalog",
            do="data.catalog=PATH; make one with `foundation shards pack` or `foundation shards synth`",
        )
    learnt = load(*data.catalog, cache=cache(data)).select(data.splits)
    learnt = learnt.with_amplitudes({n: Amplitude("run", a.scale, a.decibels) for n, a in data.amplitude.items()})
    return learnt.filter(data.filter) if data.filter else learnt


def open_data(config: Config) -> Catalog:
    """The training data, after a check that no test split holds any of its images or scenes.

    Test splits are those of its own catalogs and of `data.held_out`. Raises ConfigError, and DataError for a catalog
    that cannot be used or leaks.
    """
    data, learnt = config.data, training_catalog(config)
    if data.overlap == "refuse":
        for root in (*data.catalog, *data.held_out):
            whole = load(root, cache=cache(data))
            if any(source.split == "test" for source in whole.sources):
                refuse_overlap(learnt, whole.select("test"))
    return learnt


def micro_batch(config: Config, world_size: int) -> int:
    """Samples per forward pass and process; the largest by default. Raises ConfigError when nothing divides."""
    share, rest = divmod(config.train.global_batch, world_size)
    size = config.train.micro_batch or share
    if rest or share % size:
        raise ConfigError(
            f"train.global_batch={config.train.global_batch} is not a whole number of micro-batches of {size} on "
            f"{world_size} processes",
            where="train.micro_batch",
            do=f"choose a divisor of {share if not rest else 'a global batch that the processes divide'}",
        )
    return size


def last_position(config: Config) -> int:
    """`train.samples` rounded up to whole global batches."""
    return -(-config.train.samples // config.train.global_batch) * config.train.global_batch


def open_stream(config: Config, catalog: Catalog, engine: Engine, position: int) -> Stream:
    """The micro-batches of this rank from `position` to the end of the run."""
    data = config.data
    return Stream(
        catalog,
        seed=config.seed,
        lanes=data.lanes,
        block_shards=data.block_shards,
        global_batch=config.train.global_batch,
        micro_batch=micro_batch(config, engine.world_size),
        weights=data.weights or None,
        rank=engine.rank,
        world_size=engine.world_size,
        workers=data.workers,
        start=position,
        stop=last_position(config),
    )


def coverage(config: Config, catalog: Catalog) -> list[str]:
    """How often the run will see its data, in all and, for a mixture, by source."""
    data, end = config.data, last_position(config)
    lines = [
        f"data: {catalog.samples:,} samples in {len(catalog.sources)} sources, fingerprint {catalog.fingerprint[:12]}, "
        f"{end / catalog.samples:.1f} passes"
    ]
    if data.weights:
        total = sum(data.weights.values())
        for source in catalog.sources:
            share = data.weights.get(source.name, 0.0) / total
            passes = end * share / source.samples
            lines.append(
                f"data: {source.name}: {share:.1%} of the stream, {source.samples:,} samples, {passes:.1f} passes"
            )
    return lines


def report_replaced(config: Config, batches: Sequence[Batch], rank: int, tracker: Tracker) -> None:
    """List the damaged samples of these batches in the run folder; raises DataError under data.corrupt=stop.

    Every process appends whole lines to one file, so none of its own is needed.
    """
    found = [r for batch in batches for r in batch.replaced]
    if not found:
        return
    if config.data.corrupt == "stop":
        raise DataError(found[0].reason, do="restore the shard and resume, or go on with data.corrupt=replace")
    path = config.run_folder / REPLACED
    try:
        with open(path, "ab", buffering=0) as file:
            before = os.fstat(file.fileno()).st_size
            file.write("".join(json.dumps({"rank": rank, **r._asdict()}) + "\n" for r in found).encode())
    except OSError as error:
        raise StorageError(
            f"cannot be written: {error.strerror}", where=str(path), do="free space, then resume"
        ) from error
    if before == 0:
        tracker.note(f"a damaged sample was replaced: {found[0].reason}; it and any more are listed in {path}")
