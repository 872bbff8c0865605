"""The whole run on one screen: build, restore, loop, log, save."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foundation.config import Config
from foundation.evaluation.panels import write_run_report
from foundation.training import engines
from foundation.training.data import (
    REPLACED,
    check_agreement,
    last_position,
    open_data,
    open_stream,
    report_replaced,
)
from foundation.training.engine import Engine
from foundation.training.events import began, ended
from foundation.training.evidence import Evidence
from foundation.training.guard import Guard, Rewind
from foundation.training.lock import owned
from foundation.training.meters import Throughput
from foundation.training.monitor import Monitor, crossed
from foundation.training.pace import Pace
from foundation.training.places import home
from foundation.training.ranks import Ranks, everywhere
from foundation.training.rewinding import JUMPS, go_back, jumps
from foundation.training.saving import Saver
from foundation.training.setup import (
    ENVIRONMENT,
    beginning,
    build_learner,
    describe,
    refuse_overwrite,
    restore,
    save,
    write_record,
)
from foundation.training.standstill import Patience
from foundation.training.step import Learner, train_step
from foundation.training.stopping import STOP_FILE, Stopped, Watch
from foundation.training.tracking import Status, Tracker, open_tracker
from shards.addressed import bits
from shards.catalog import Catalog
from shards.stream import Batch, Stream

COMMITTED = "committed"  # in the run folder: samples seen by the newest checkpoint, wherever it is
HASH_MASK = (1 << 48) - 1  # exact as a float64, which is what trackers keep


def train(config: Config, resume: bool = True) -> Path:
    """Train to `train.samples` and return the run folder; continues from the newest valid checkpoint if `resume`.

    Raises ConfigError, DataError, CheckpointError, LaunchError or NumericsError, each with what to do.
    """
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    with engines.running(config) as engine, ExitStack() as held:
        first, ranks = engine.rank == 0, engine.ranks()
        everywhere(ranks, lambda: [held.enter_context(owned(f)) for f in written(config)] if first else None)
        return _train(config, engine, ranks, resume)


def written(config: Config) -> list[Path]:
    """Folders that only one run may write to."""
    chosen = home(config)
    return [config.run_folder, *([chosen] if config.train.checkpoints and isinstance(chosen, Path) else [])]


def _train(config: Config, engine: Engine, ranks: Ranks, resume: bool) -> Path:
    catalog = everywhere(ranks, lambda: open_data(config, check=engine.rank == 0))
    initial = beginning(config, ranks, resume)
    learner = build_learner(config, engine, initial.values)
    folder = config.run_folder
    state, notes = restore(learner, catalog, folder, ranks) if resume else (None, refuse_overwrite(config))
    position = state["position"] if state else 0
    check_agreement(engine, catalog, config, position)
    record = write_record(learner, catalog) if engine.rank == 0 else []
    if engine.rank == 0:
        (folder / STOP_FILE).unlink(missing_ok=True)  # it was for the run before
        if state is None:
            (folder / JUMPS).unlink(missing_ok=True)
    stream = open_stream(config, catalog, engine, position)
    tracker = open_tracker(config, rank=engine.rank, position=position, run_id=state["run_id"] if state else None)
    status: Status = "FAILED"
    try:
        if engine.rank == 0:
            began(tracker, folder / ENVIRONMENT, position, resumed=state is not None)
        for file in record:
            tracker.artifact(file)
        advice = stream.reader.advice(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        for line in [*initial.notes, *notes, *describe(learner, catalog), *([advice] if advice else [])]:
            tracker.note(line)
        if position >= last_position(config):
            tracker.note(f"already complete: {position:,} samples")
        t = config.train
        monitor = Monitor(learner, catalog, engine.ranks(), tracker)
        place, newest = home(config), folder / COMMITTED
        patience = Patience(folder, engine.rank, t.patience, tracker.standstill)
        with patience, Saver(place, ranks, t.keep, t.keep_every, t.async_checkpoint, newest, tracker.event) as saver:
            keep = Evidence(learner, stream.reader, engine.rank).keep
            guard = Guard(config, tracker.event, keep, (state or {}).get("guard"), jumps(config, ranks))
            while True:
                try:
                    loop(learner, saver, monitor, guard, catalog, stream, tracker, position, patience.beat)
                    break
                except Rewind as rewind:
                    saver.wait()
                    position = go_back(learner, guard, tracker, ranks, rewind)
                    stream = open_stream(config, catalog, engine, position)
        if engine.rank == 0:
            publish(folder, catalog, tracker)
        status = "FINISHED"
    except Stopped as stopped:
        status = "KILLED"
        tracker.note(str(stopped))
        raise
    except KeyboardInterrupt:
        status = "KILLED"
        tracker.note("stopped; the same command continues from the last checkpoint")
        raise
    finally:
        ended(tracker, status)
        tracker.close(status)
    return folder


def publish(folder: Path, catalog: Catalog, tracker: Tracker) -> None:
    """Write the report of the run and hand it, with its figures, to the tracker."""
    page = write_run_report(folder, catalog)
    tracker.artifact(page)
    for figure in sorted((folder / "figures").glob("*.png")):
        tracker.artifact(figure, "figures")
    tracker.note(f"report: {page}")


def loop(
    learner: Learner,
    saver: Saver,
    monitor: Monitor,
    guard: Guard,
    catalog: Catalog,
    stream: Stream,
    tracker: Tracker,
    position: int,
    beat: Callable[[int], None],
) -> None:
    """Consume the stream; the position advances after each update, and with it everything that is due."""
    config, engine = learner.config, learner.engine
    train, end = config.train, last_position(config)
    meter, pace, replaced, told = Throughput(), Pace(learner), 0, 0
    stall: dict[str, float] = {}
    watch = Watch(config.run_folder, engine.agree)
    steps = whole_steps(stream, train.global_batch // engine.world_size)
    while position < end:
        with meter.waiting():
            batches = next(steps)
        replaced += report_replaced(config, batches, engine.rank)
        values: dict[str, Tensor] = {}  # of samples that are passed over nothing is said
        if not guard.passes_over(position):
            pace.begin()
            values = train_step(learner, batches, position, limit := guard.limit())
            guard.note(values, batches, position, limit)
            meter.update(train.global_batch)
        position += train.global_batch
        beat(position)
        finished = position >= end
        look, seen = monitor.due(position), dict[str, float]()
        if finished or look or crossed(position, train.log_every, train.global_batch):
            guard.check()
            seen = monitor.look(position) if look else seen
            if (total := engine.sum_int(replaced)) > told:
                tracker.note(f"{total} damaged samples were replaced so far; see {config.run_folder / REPLACED}")
                tracker.event("damaged", position, samples=total)
                told = total
            numbers = reduce_metrics(learner, values, position, batches) if values else {}
            numbers |= meter.read()
            tracker.log(position, numbers | pace.read(numbers) | stall | seen)
            stall = {}
        stop = not finished and watch.stop()
        if finished or stop or crossed(position, train.checkpoint_every, train.global_batch):
            guard.check()
            score = monitor.score(seen)
            stall = {"checkpoint_stall_s": save(learner, saver, catalog, tracker.run_id, position, guard, score)}
        if stop:
            saver.wait()
            raise Stopped(position, watch.reason() or "asked on another process")


def whole_steps(stream: Stream, share: int) -> Iterator[list[Batch]]:
    """The micro-batches of one update at a time: `share` samples of this rank."""
    batches: list[Batch] = []
    for batch in stream:
        batches.append(batch)
        if sum(map(len, batches)) == share:
            yield batches
            batches = []


def sample_hash(batches: Sequence[Batch]) -> int:
    """48 bits that two runs share only if they put the same samples at the same positions; the order does not enter."""
    each = (bits(0, "trace", batch.position * (1 << 31) + batch.sample_id, 1) for batch in batches)
    return sum(int((b >> 15).sum()) for b in each) & HASH_MASK


def reduce_metrics(
    learner: Learner, values: dict[str, Tensor], position: int, batches: Sequence[Batch]
) -> dict[str, Any]:
    """This update's scalars, averaged over all ranks, and the hash of its samples over all ranks."""
    names = sorted(values)
    means = learner.engine.mean(torch.stack([values[name].double() for name in names])).tolist()
    trace = learner.engine.sum_int(sample_hash(batches)) & HASH_MASK
    lr = learner.lr(position - learner.config.train.global_batch)
    return {**dict(zip(names, means, strict=True)), "lr": lr, "samples_hash": trace}
