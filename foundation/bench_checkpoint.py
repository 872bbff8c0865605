"""What a checkpoint costs a training: how long it stands still, saved beside it and not, and how long a restart takes.

The whole state of ViT-B (weights and both moments in fp32) with small images, so that an update is cheap and a save
is not; real updates, real files, and for the restart a real process.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch

from foundation.config import Config, load
from foundation.training import engines
from foundation.training.data import open_data, open_stream
from foundation.training.places import home
from foundation.training.ranks import ALONE
from foundation.training.run import whole_steps
from foundation.training.saving import Saver
from foundation.training.setup import build_learner, save
from foundation.training.step import Learner, train_step
from shards import synthetic
from shards.pack import SourceSpec, pack

Row = tuple[str, str, str]
BATCH = 4
YAML = """
name: vit-b
run_root: {root}
data: {{catalog: {root}/catalog, image_size: 64, lanes: 4, block_shards: 2, workers: 0}}
model: {{size: {size}, patch: 16}}
objective: {{windows: 1, window: 3, radii: [3, 5]}}
optim: {{warmup_samples: 0}}
train: {{samples: 400000, global_batch: {batch}, log_every: {batch}, checkpoint_every: 400000, keep: 1}}
tracking: {{mlflow: false}}
"""
READY = 600.0  # seconds that a process may take to its first update


class Training(NamedTuple):
    """Updates of a learner, one a call, and what a save of it needs."""

    learner: Learner
    catalog: Any
    update: Callable[[], int]
    """Returns the position after the update."""


def rows(repeats: int, size: str = "base") -> Iterator[Row]:
    """Rows (what, median seconds, as a ratio)."""
    with tempfile.TemporaryDirectory(prefix="foundation-bench-") as place:
        root = Path(place)
        (root / "vit-b.yaml").write_text(YAML.format(root=root, size=size, batch=BATCH), encoding="utf-8")
        chips = synthetic.generate("pretrain", synthetic.CLASSES, 8, 64, 0, labelled=False)
        pack(root / "catalog", [SourceSpec("free", records=chips)], shard_bytes=64_000)
        config = load(root / "vit-b.yaml")
        yield from saves(open_training(config), repeats)
        yield from restarts(root / "vit-b.yaml", config, repeats)


def open_training(config: Config) -> Training:
    """The learner of a configuration in this process, with its data."""
    engine, catalog = engines.start(config), open_data(config)
    learner = build_learner(config, engine)
    steps = whole_steps(open_stream(config, catalog, engine, 0), config.train.global_batch)
    positions = count(0, config.train.global_batch)

    def update() -> int:
        position = next(positions)
        train_step(learner, next(steps), position)
        return position + config.train.global_batch

    return Training(learner, catalog, update)


def saves(training: Training, repeats: int) -> Iterator[Row]:
    """Both kinds in turn, so that a slow moment of the machine hits each of them."""
    learner, where = training.learner, home(training.learner.config)
    tensors = learner.engine.tensors(learner.model, learner.optimizer, learner.average)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    seen: dict[str, list[float]] = {name: [] for name in ("update", "beside", "stall", "total", "foreground")}
    foreground, background = (Saver(where, ALONE, 1, None, beside) for beside in (False, True))
    for number in range(repeats + 1):
        for _ in range(3):
            seen["update"].append(timed(training.update))
        position = training.update()
        seen["foreground"].append(save(learner, foreground, training.catalog, None, position))
        position, began = training.update(), time.perf_counter()
        seen["stall"].append(save(learner, background, training.catalog, None, position))
        while background.busy():
            seen["beside"].append(timed(training.update))
        background.wait()
        seen["total"].append(time.perf_counter() - began)
        if number == 0:  # warms up
            seen = {name: [] for name in seen}
    median = {name: statistics.median(values) for name, values in seen.items()}
    yield f"state: {nbytes / 1e9:.2f} GB; an update without a save", f"{median['update']:.3f}", "1.0 update"
    for name, what in (
        ("foreground", "save in the foreground: the training stands still"),
        ("stall", "save beside the training: the training stands still"),
    ):
        yield what, f"{median[name]:.3f}", f"{median[name] / median['update']:.1f} updates"
    ratio = median["foreground"] / median["stall"]
    yield "stall, foreground against beside", "", f"{ratio:.1f} times shorter"
    until = median["total"]
    yield (
        "save beside the training: until an update finds it committed",
        f"{until:.3f}",
        f"{until / median['foreground']:.2f} x",
    )
    slower = median["beside"] / median["update"]
    yield "an update while a save is written", f"{median['beside']:.3f}", f"{slower:.2f} updates"
    rate = nbytes / 1e9 / median["foreground"]
    yield "bytes to the disk, with sha256 and fsync", "", f"{rate:.2f} GB/s"


def restarts(yaml: Path, config: Config, repeats: int) -> Iterator[Row]:
    """From the start of a process to the end of its first update, with a checkpoint and without; taken in turn."""
    seen: dict[str, list[float]] = {"resumed": [], "fresh": []}
    for number in range(repeats):
        seen["resumed"].append(first_update(yaml, config.name))
        seen["fresh"].append(first_update(yaml, f"fresh-{number}"))
    median = {name: statistics.median(values) for name, values in seen.items()}
    yield "start of a process to its first update, without a checkpoint", f"{median['fresh']:.2f}", "1.0"
    ratio = median["resumed"] / median["fresh"]
    yield "restart to the first update: checked (sha256) and restored", f"{median['resumed']:.2f}", f"{ratio:.2f} x"


def first_update(yaml: Path, name: str) -> float:
    """Seconds until the run `name` has written a line after its start; it is killed then."""
    record = yaml.parent / name / "metrics.jsonl"
    record.unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "foundation", "train", str(yaml), f"name={name}"]
    began = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        while not (record.exists() and b"\n" in record.read_bytes()):
            if process.poll() is not None or time.perf_counter() > began + READY:
                process.kill()
                raise RuntimeError(f"no update came: {process.communicate()[1].decode(errors='replace')}")
            time.sleep(0.005)
        return time.perf_counter() - began
    finally:
        process.kill()
        process.communicate()


def timed(action: Callable[[], object]) -> float:
    """Seconds that `action` takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began
