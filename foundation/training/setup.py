"""What a run is made of before its first update: the learner, and the checkpoint it continues from."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from foundation.config import Config, config_hash, from_dict, resolved_yaml, to_dict
from foundation.errors import CheckpointError
from foundation.files import write_whole
from foundation.initial import NOTHING, Initial, initial_weights
from foundation.models.families import attention_backends
from foundation.models.initialise import Given
from foundation.objectives.registry import build
from foundation.training import checkpoint
from foundation.training.blocks import on_meta
from foundation.training.data import FREE, coverage, micro_batch
from foundation.training.engine import Engine
from foundation.training.guard import Guard
from foundation.training.meters import environment, job
from foundation.training.optim import rule_table
from foundation.training.pins import Score
from foundation.training.places import Location, home
from foundation.training.ranks import Ranks, everywhere, together
from foundation.training.saving import Saver
from foundation.training.step import Learner
from shards.augment import Augment
from shards.catalog import Catalog

ENVIRONMENT = "environment.json"


def beginning(config: Config, ranks: Ranks, resume: bool) -> Initial:
    """The weights of `model.init`; nothing where the run has a checkpoint, which `restore` will take instead."""
    if config.model.init is None:
        return NOTHING
    first = resume and ranks.rank == 0
    started = together(ranks, lambda: first and checkpoint.latest(home(config))[0] is not None)[0]
    return NOTHING if started else everywhere(ranks, lambda: initial_weights(config, ranks))


def build_learner(config: Config, engine: Engine, given: Mapping[str, Given] | None = None) -> Learner:
    """Objective, model (same initial weights whatever the engine, `given` ones by name), optimiser and augmentation."""
    objective = build(config)
    model, optimizer = engine.setup(objective.build_model, given)
    d = config.data
    augment = Augment(d.image_size, d.crop_scale, d.crop_ratio, d.flip, d.contrast)
    return Learner(config, engine, objective, model, optimizer, augment, engine.average(model, optimizer))


def describe(learner: Learner, catalog: Catalog) -> list[str]:
    """What a reader of the log wants to know before the first number."""
    config, engine = learner.config, learner.engine
    plain = on_meta(learner.objective.build_model)  # engines may hide shapes
    count = sum(p.numel() for p in plain.parameters())
    micro = micro_batch(config, engine.world_size)
    accumulated = config.train.global_batch // engine.world_size // micro
    lines = [
        *coverage(config, catalog),
        f"model: {config.objective.name}, {config.model.size}/{config.model.patch}, {count:,} parameters, "
        f"attention {attention(config, engine)}, {config.train.precision}",
        f"engine: {engine.name}, {engine.world_size} process(es) on {engine.device.type}, global batch "
        f"{config.train.global_batch} = {engine.world_size} x {micro} x {accumulated} accumulated",
        f"config: {config_hash(config)}",
    ]
    rows = rule_table(plain, config.optim)
    return lines + [f"optimiser group: {name}: {n} tensors, {p} parameters, decay {wd}" for name, n, p, wd in rows]


def attention(config: Config, engine: Engine) -> str:
    """The backends of encoder and decoder, once where they are one."""
    return " and ".join(dict.fromkeys(attention_backends(config, engine.device.type)))


def save(
    learner: Learner,
    saver: Saver,
    catalog: Catalog,
    run_id: str | None,
    position: int,
    guard: Guard | None = None,
    score: Score | None = None,
) -> float:
    """Begin a checkpoint of all that a resume needs: tensors, one integer, and what that integer refers to.

    Returns the seconds for which the training stood still. Raises CheckpointError when the save before has failed.
    """
    began, engine = time.perf_counter(), learner.engine
    saver.wait()  # before the copy: two of them may not fit
    tensors = engine.copies(engine.tensors(learner.model, learner.optimizer, learner.average))
    state = {
        "position": position,
        "fingerprint": catalog.fingerprint,
        "config": to_dict(learner.config),
        "run_id": run_id,
        "engine": engine.name,
        "world_size": engine.world_size,
        "guard": guard.state() if guard else {},
    }
    saver.save(tensors, state, position, score)
    return time.perf_counter() - began


def restore(learner: Learner, catalog: Catalog, folder: Path, ranks: Ranks) -> tuple[dict[str, Any] | None, list[str]]:
    """Load the newest valid checkpoint of this run, if any, and say what was skipped on the way.

    Raises CheckpointError when what decides samples, task or schedule differs from the checkpoint: a resume that
    silently sees other samples is not one. Processes, workers, precision and backends may change.
    """
    path, state, skipped = checkpoint.restore(home(learner.config), ranks)
    notes = [f"skipped checkpoint {reason}" for reason in skipped]
    if path is None:
        return None, notes
    if "imported_from" in state:
        raise CheckpointError(
            "this run folder holds an imported encoder, not a run that can go on",
            where=str(folder),
            do="choose another `name` or run_root",
        )
    config = learner.config
    then, now = to_dict(from_dict(state["config"])), to_dict(config)  # keys that are newer than the run: their defaults
    fixed = [("seed",), ("train", "global_batch"), ("train", "samples")]
    fixed += [("name",)] if config.train.checkpoints else []  # a folder or URL that another run writes to
    fixed += [("data", key) for key in now["data"] if key not in FREE]
    fixed += [("model", key) for key in now["model"] if key not in ("attention", "init")]
    fixed += [(section, key) for section in ("objective", "optim") for key in now[section]]
    differing = [".".join(keys) for keys in fixed if dig(then, keys) != dig(now, keys)]
    if state["fingerprint"] != catalog.fingerprint:
        differing.append("data.catalog (fingerprint)")
    if differing:
        raise CheckpointError(
            f"this run was started with other values of: {', '.join(differing)}",
            where=str(path),
            do="resume with its config.yaml and the data as it was, or start a new run with another `name`",
        )
    fill(learner, path, state, ranks)
    before = f" of {state['engine']} on {state['world_size']} process(es)"
    return state, [*notes, f"resumed from {path.name}{before}"]


def fill(learner: Learner, path: Location, state: Mapping[str, Any], ranks: Ranks) -> None:
    """Model, optimiser and average as the checkpoint at `path` with these plain values has them."""
    engine, parts = learner.engine, (learner.model, learner.optimizer, learner.average)
    tensors = engine.tensors(*parts)
    checkpoint.read(path, tensors, ranks)
    updates = state["position"] // learner.config.train.global_batch - state.get("guard", {}).get("missing", 0)
    engine.loaded(*parts, tensors, updates)


def dig(tree: Any, keys: tuple[str, ...]) -> Any:
    """The value at a path of a nested dictionary."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def refuse_overwrite(config: Config) -> list[str]:
    """Nothing is lost: a fresh start where there are checkpoints is an error."""
    path, _ = checkpoint.latest(home(config))
    if path is not None:
        raise CheckpointError(
            f"the run folder already holds {path.name}",
            where=str(config.run_folder),
            do="resume it (drop --fresh), choose another `name`, or move the folder away",
        )
    return []


def write_record(learner: Learner, catalog: Catalog) -> list[Path]:
    """Save what the run is: the resolved configuration, and the environment with what `auto` and null stand for.

    Raises StorageError when the run folder cannot be written.
    """
    config, engine = learner.config, learner.engine
    resolved = {
        "engine": engine.name,
        "world_size": engine.world_size,
        "micro_batch": micro_batch(config, engine.world_size),
        "attention": attention(config, engine),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "data": f"{', '.join(config.data.catalog)}, fingerprint {catalog.fingerprint}",
        "fingerprint": catalog.fingerprint,
        "config_hash": config_hash(config),
    }
    record = json.dumps({**environment(), **job(), **resolved}, indent=1)
    folder = config.run_folder
    return [write_whole(folder / "config.yaml", resolved_yaml(config)), write_whole(folder / ENVIRONMENT, record)]
