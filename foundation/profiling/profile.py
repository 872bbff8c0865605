"""`foundation profile`: a few updates of a run three times, plain, part by part, and under torch's profiler.

Updates are those of training, on the samples at the beginning of the run, with whatever engine it was started with. The
weights change in memory only. Files are written by rank 0.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity

from foundation.config import Config
from foundation.errors import StorageError
from foundation.files import write_whole
from foundation.profiling.parts import Parts
from foundation.profiling.summary import Operator, Profile, page, ranked
from foundation.training import engines
from foundation.training.data import open_stream, training_catalog
from foundation.training.engine import Engine
from foundation.training.meters import environment, peak_memory
from foundation.training.run import whole_steps
from foundation.training.setup import build_learner
from foundation.training.step import Learner, train_step

FOLDER, TRACE, MEMORY, SUMMARY = "profile", "trace.json.gz", "memory.pickle", "summary.md"
REST = "copies to the device, rest"
EVENTS = 200_000  # allocations that a memory snapshot keeps


class Timed(NamedTuple):
    """Updates, their seconds, and those spent waiting for data."""

    steps: int
    seconds: float
    waited: float


class Updates:
    """A learner and the samples it goes through, update by update."""

    def __init__(self, config: Config, engine: Engine, updates: int) -> None:
        self.learner, self.batch, self.position = build_learner(config, engine), config.train.global_batch, 0
        length = {"train": config.train.model_copy(update={"samples": updates * self.batch})}
        stream = open_stream(config.model_copy(update=length), training_catalog(config), engine, 0)
        self._steps = whole_steps(stream, self.batch // engine.world_size)

    def run(self, steps: int, learner: Learner | None = None, after: Callable[[], None] = lambda: None) -> Timed:
        """So many updates more, by this learner or its own; `after` is called at the end of each."""
        wait_for(self.learner.engine.device)
        began, waited = perf_counter(), 0.0
        for _ in range(steps):
            asked = perf_counter()
            batches = next(self._steps)
            waited += perf_counter() - asked
            train_step(learner or self.learner, batches, self.position)
            self.position += self.batch
            after()
        wait_for(self.learner.engine.device)
        return Timed(steps, perf_counter() - began, waited)


def wait_for(device: torch.device) -> None:
    """Until it has done all it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profile(config: Config, steps: int, warmup: int) -> Profile | None:
    """Measure `steps` updates of each kind after `warmup` ones and write RUN/profile; nothing on ranks but the first.

    Raises ConfigError, DataError, LaunchError as training does, and StorageError when nothing can be written.
    """
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    with engines.running(config) as engine:
        updates = Updates(config, engine, warmup + 3 * steps)
        updates.run(warmup)
        plain = updates.run(steps)
        memory = peak_memory()
        parts = Parts(engine.device, timed=True)
        with parts.watch(updates.learner) as watched:
            named = updates.run(steps, watched)
        folder = config.run_folder / FOLDER
        operators, collective, files = traced(updates, steps, folder, engine)
        if engine.rank:
            return None
        facts = {**environment(), "engine": engine.name, "world_size": engine.world_size, "name": config.name}
        facts |= {"model": f"{config.objective.name}, {config.model.size}", "global_batch": config.train.global_batch}
        rest = named.seconds - named.waited - sum(parts.seconds.values())
        each = {name: seconds / steps for name, seconds in {**parts.seconds, REST: rest}.items()}
        found = Profile(steps, plain.seconds / steps, plain.waited / steps, each, collective, operators, memory, facts,
                        (*files, folder / SUMMARY))  # fmt: skip
        write_whole(folder / SUMMARY, page(found))
        return found


def traced(updates: Updates, steps: int, folder: Path, engine: Engine) -> tuple[list[Operator], float, list[Path]]:
    """Updates under the profiler: operators by their own time, seconds of collectives in an update, files written."""
    cuda, files = engine.device.type == "cuda", [folder / TRACE]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    if cuda:
        torch.cuda.memory._record_memory_history(max_entries=EVENTS)
    try:
        with (
            Parts(engine.device, timed=False).watch(updates.learner) as watched,
            torch.profiler.profile(activities=activities, record_shapes=True) as profiler,
        ):
            updates.run(steps, watched, profiler.step)
        if engine.rank == 0:
            write_whole(folder / ".probe", b"").unlink()  # the profiler's own writer is silent about a full disk
            profiler.export_chrome_trace(str(folder / TRACE))
            if cuda:
                files.append(folder / MEMORY)
                torch.cuda.memory._dump_snapshot(str(folder / MEMORY))
    except OSError as error:
        what = f"the profile cannot be written: {error.strerror}"
        raise StorageError(what, where=str(folder), do="free space or choose another run_root") from error
    finally:
        if cuda:
            torch.cuda.memory._record_memory_history(enabled=None)
    averages: Any = profiler.key_averages()
    operators, collective = ranked(averages, steps, cuda)
    return operators, collective, files
