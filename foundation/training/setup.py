"""What a run is made of before its first update: the learner, and the checkpoint it continues from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from foundation.config import Config, config_hash, resolved_yaml, to_dict
from foundation.errors import CheckpointError
from foundation.files import write_whole
from foundation.objectives.registry import build
from foundation.training import checkpoint
from foundation.training import engine as engines
from foundation.training.data import FREE, coverage, micro_batch
from foundation.training.meters import environment
from foundation.training.optim import build_optimizer, rule_table
from foundation.training.step import Learner
from kernels.rpe_attention import resolve
from shards.augment import Augment
from shards.catalog import Catalog

ENVIRONMENT = "environment.json"


def build_learner(config: Config, engine: engines.Engine) -> Learner:
    """Objective, model (same weights on every rank), optimiser and augmentation."""
    objective = build(config)
    torch.manual_seed(config.seed)
    model = objective.build_model().to(engine.device)
    # The optimiser sees the plain model, so that its parameter order never depends on the engine.
    optimizer = build_optimizer(model, config.optim)
    wrapped = engine.wrap(torch.compile(model) if config.train.compile else model)  # type: ignore[arg-type]
    d = config.data
    return Learner(
        config,
        engine,
        objective,
        wrapped,
        optimizer,
        Augment(d.image_size, d.crop_scale, d.crop_ratio, d.flip, d.contrast),
    )


def describe(learner: Learner, catalog: Catalog) -> list[str]:
    """What a reader of the log wants to know before the first number."""
    config, engine = learner.config, learner.engine
    count = sum(p.numel() for p in learner.model.parameters())
    micro = micro_batch(config, engine.world_size)
    accumulated = config.train.global_batch // engine.world_size // micro
    lines = [
        *coverage(config, catalog),
        f"model: {config.objective.name}, {config.model.size}/{config.model.patch}, {count:,} parameters, "
        f"attention {resolve(config.model.attention, engine.device.type)}, {config.train.precision}",
        f"engine: {engine.name}, {engine.world_size} process(es) on {engine.device.type}, global batch "
        f"{config.train.global_batch} = {engine.world_size} x {micro} x {accumulated} accumulated",
        f"config: {config_hash(config)}",
    ]
    rows = rule_table(engines.unwrap(learner.model), config.optim)
    return lines + [f"optimiser group: {name}: {n} tensors, {p} parameters, decay {wd}" for name, n, p, wd in rows]


def save(learner: Learner, catalog: Catalog, run_id: str | None, position: int) -> None:
    """A checkpoint of everything a resume needs: tensors, one integer and what that integer refers to."""
    config, engine = learner.config, learner.engine
    failure: CheckpointError | None = None
    if engine.rank == 0:
        state = {
            "model": engines.unwrap(learner.model).state_dict(),
            "optimizer": learner.optimizer.state_dict(),
            "position": position,
            "fingerprint": catalog.fingerprint,
            "config": to_dict(config),
            "run_id": run_id,
        }
        try:
            checkpoint.save(config.run_folder / "checkpoints", state, position, keep=config.train.keep)
        except CheckpointError as error:
            failure = error
    # Every rank learns of a failed save here; without it the others would wait for rank 0 at the next update.
    failures = engine.sum_int(int(failure is not None))
    if failure is not None:
        raise failure
    if failures:
        raise CheckpointError("rank 0 could not save the checkpoint", where=f"rank {engine.rank}", do="see its message")


def restore(learner: Learner, catalog: Catalog, folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """Load the newest valid checkpoint of this run, if any, and say what was skipped on the way.

    Raises CheckpointError when what decides samples, task or schedule differs from the checkpoint: a resume that
    silently sees other samples is not one. Processes, workers, precision and backends may change.
    """
    path, state, skipped = checkpoint.restore(folder)
    notes = [f"skipped checkpoint {reason}" for reason in skipped]
    if path is None:
        return None, notes
    if "optimizer" not in state:
        raise CheckpointError(
            "this run folder holds an imported encoder, not a run that can go on",
            where=str(folder),
            do="choose another `name` or run_root",
        )
    config = learner.config
    then, now = state["config"], to_dict(config)
    fixed = [("seed",), ("train", "global_batch"), ("train", "samples")]
    fixed += [("data", key) for key in now["data"] if key not in FREE]
    fixed += [("model", key) for key in now["model"] if key != "attention"]
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
    plain = engines.unwrap(learner.model)
    checkpoint.check_model(state["model"], plain.state_dict(), where=str(path))
    plain.load_state_dict(state["model"])
    learner.optimizer.load_state_dict(state["optimizer"])
    return state, [*notes, f"resumed from {path.name}"]


def dig(tree: Any, keys: tuple[str, ...]) -> Any:
    """The value at a path of a nested dictionary."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def refuse_overwrite(folder: Path) -> list[str]:
    """Nothing is lost: a fresh start in a folder that holds checkpoints is an error."""
    path, _ = checkpoint.latest(folder / "checkpoints")
    if path is not None:
        raise CheckpointError(
            f"the run folder already holds {path.name}",
            where=str(folder),
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
        "attention": resolve(config.model.attention, engine.device.type),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "data": f"{', '.join(config.data.catalog)}, fingerprint {catalog.fingerprint}",
        "config_hash": config_hash(config),
    }
    record = json.dumps({**environment(), **resolved}, indent=1)
    folder = config.run_folder
    return [write_whole(folder / "config.yaml", resolved_yaml(config)), write_whole(folder / ENVIRONMENT, record)]
