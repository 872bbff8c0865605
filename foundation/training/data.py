"""What a run learns from: the catalogs it names, filtered and checked, and the stream of its samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from foundation.config import Config, DataConfig, config_hash
from foundation.errors import ConfigError, DataError, StorageError
from foundation.training.engine import Engine
from shards.audit import refuse_overlap
from shards.cache import Cache
from shards.catalog import Amplitude, Catalog, load
from shards.order import Mixture
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
    whole = ruled(load(*data.catalog, cache=cache(data)), data)
    learnt = whole.select(data.splits)
    learnt = learnt.filter(data.filter) if data.filter else learnt
    check_channels(learnt, config)
    return learnt


def check_channels(catalog: Catalog, config: Config, key: str = "data.catalog") -> None:
    """Raise DataError unless the images of the catalog, which `key` names, have the channels of the model."""
    for source in catalog.sources:
        if (found := source.statistics.get("channels", 1)) != config.model.channels:
            learnt = f"set model.channels={found}, or leave {source.name} out: "
            learnt += f"data.filter=\"source != '{source.name}'\""
            raise DataError(
                f"the images of {source.name} have {found} channels, the model takes {config.model.channels}",
                where="model.channels" if key == "data.catalog" else key,
                do=learnt
                if key == "data.catalog"
                else f"name a catalog of {config.model.channels} channels, or {key}=null",
            )


def ruled(catalog: Catalog, data: DataConfig, *, known: bool = False) -> Catalog:
    """A catalog under the run's amplitude rules; `known`: only those of sources it has. Raises DataError."""
    names = {source.name for source in catalog.sources}
    rules = {n: Amplitude("run", a.scale, a.decibels) for n, a in data.amplitude.items() if n in names or not known}
    return catalog.with_amplitudes(rules)


def open_data(config: Config, *, check: bool = True) -> Catalog:
    """The training data, after a check (if `check`) that no test split holds its images, copies of them or its scenes.

    Tested are the test splits of its own catalogs and of `data.held_out`, and all of a held-out catalog that has none.
    Raises ConfigError, and DataError for a catalog that cannot be used or leaks.
    """
    data, learnt = config.data, training_catalog(config)
    if check and data.overlap != "allow":
        for root in (*data.catalog, *data.held_out):
            tested = load(root, cache=cache(data))
            has_test = any(source.split == "test" for source in tested.sources)
            if has_test or root in data.held_out:
                refuse_overlap(learnt, tested.select("test") if has_test else tested, data.overlap == "refuse")
    return learnt


def check_agreement(engine: Engine, catalog: Catalog, config: Config, position: int) -> None:
    """Raise DataError unless all processes start from the same data, configuration and position.

    Copies on the disks of the nodes may differ; each process would then learn its own mixture.
    """
    facts = f"{catalog.fingerprint} {config_hash(config)} {position}"
    mine = int(hashlib.sha256(facts.encode()).hexdigest()[:8], 16)
    # The smallest of several different numbers is below their mean, so at least one process stops the run.
    if engine.sum_int(mine) != mine * engine.world_size:
        raise DataError(
            f"the processes do not agree: here data {catalog.fingerprint[:12]}, configuration {config_hash(config)}, "
            f"position {position}",
            where=f"rank {engine.rank} of {engine.world_size}",
            do="give all nodes the same catalog, configuration and run folder",
        )


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


def order_of(config: Config, catalog: Catalog, *, weighted: bool = True) -> Mixture:
    """The order in which the run reads a catalog; sources in proportion to their samples unless `weighted`."""
    data, sizes = config.data, [(source.name, source.kept) for source in catalog.sources]
    return Mixture(sizes, data.weights or None if weighted else None, config.seed, data.lanes, data.block_shards)


def coverage(config: Config, catalog: Catalog) -> list[str]:
    """How often the run will see its data, in all and, for a mixture, by source."""
    data, end = config.data, last_position(config)
    lines = [
        f"data: {catalog.samples:,} samples in {len(catalog.sources)} sources, fingerprint {catalog.fingerprint[:12]}, "
        f"{end / catalog.samples:.1f} passes"
    ]
    if data.overlap != "refuse":
        what = "near copies" if data.overlap == "identical" else "images, near copies and scenes"
        lines.append(f"data: {what} of test splits were not looked for (data.overlap={data.overlap})")
    if data.weights:
        total = sum(data.weights.values())
        for source in catalog.sources:
            share = data.weights.get(source.name, 0.0) / total
            passes = end * share / source.samples
            lines.append(
                f"data: {source.name}: {share:.1%} of the stream, {source.samples:,} samples, {passes:.1f} passes"
            )
    return lines


def report_replaced(config: Config, batches: Sequence[Batch], rank: int) -> int:
    """List the damaged samples of these batches in the run folder; returns how many.

    Every process appends whole lines to one file. Raises DataError under data.corrupt=stop.
    """
    found = [r for batch in batches for r in batch.replaced]
    if not found:
        return 0
    if config.data.corrupt == "stop":
        raise DataError(found[0].reason, do="restore the shard and resume, or go on with data.corrupt=replace")
    path = config.run_folder / REPLACED
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # rank 0 has made the folder, perhaps on a disk of its own
        with open(path, "ab", buffering=0) as file:
            file.write("".join(json.dumps({"rank": rank, **r._asdict()}) + "\n" for r in found).encode())
    except OSError as error:
        what = f"cannot be written: {error.strerror}"
        raise StorageError(what, where=str(path), do="free space, then resume") from error
    return len(found)
