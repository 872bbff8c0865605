"""Scores of a run or checkpoint: load it, evaluate beside its controls, keep the scores, redraw the report."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from foundation.config import Config
from foundation.errors import CheckpointError, ConfigError, DataError
from foundation.evaluation import fewshot, leakage
from foundation.evaluation.artifacts import figures, send
from foundation.evaluation.features import Progress
from foundation.evaluation.panels import SCORES, read_scores, write_run_report
from foundation.evaluation.scores import Score, to_json, to_markdown
from foundation.evaluation.suite import RANDOM, evaluate
from foundation.files import write_whole
from foundation.interchange import load_encoder, random_encoder
from foundation.training import checkpoint
from foundation.training.data import cache, ruled, training_catalog
from foundation.training.mlflow_sink import MlflowSink
from shards.catalog import Catalog
from shards.catalog import load as load_catalog


def evaluate_run(
    path: Path,
    data: str,
    protocol: str,
    *,
    test: str | None = None,
    mode: str = "linear",
    shots: Sequence[int] = fewshot.SHOTS,
    seeds: Sequence[int] = fewshot.SEEDS,
    crop: int | None = None,
    device: str = "cpu",
    averaged: bool = False,
    progress: Progress | None = None,
) -> list[Score]:
    """Evaluate the encoder at `path` (run folder or checkpoint) on the catalog `data`, train split against test split.

    `averaged` takes the running average of its weights. Every score records its weights (samples seen), data and
    whether the encoder was pretrained on test images. The scores join those in the run's `scores.json` and `.md`,
    replacing the same measurement, and the run's report and MLflow run are brought up to date. Returns all scores of
    the run.
    """
    encoder, config = load_encoder(path, device, averaged)
    state = checkpoint.load(path, None)
    catalog, tested = (
        ruled(load_catalog(root, cache=cache(config.data)), config.data, known=True) for root in (data, test or data)
    )
    pictures = training_data(config)
    origin = {
        "weights": f"{state['position']:,} samples" + ", averaged" * averaged,
        "data": f"{os.path.basename(os.path.abspath(data))} {tested.select('test').fingerprint[:8]}",
        "train_data": catalog.select("train").fingerprint,
        **leaked(run_folder(path), pictures, tested.select("test"), state.get("fingerprint")),
        "random_init": f"one initialisation, seed {config.seed}; the interval does not cover it",
    }
    found = evaluate(
        {"pretrained": encoder, RANDOM: random_encoder(config, config.seed, device)},
        catalog,
        protocol,
        image_size=config.data.image_size,
        mode=mode,
        shots=shots,
        seeds=seeds,
        crop=crop,
        test_catalog=tested,
        device=device,
        progress=progress,
    )
    found = [replace(score, settings={**score.settings, **origin}) for score in found]
    run, new = run_folder(path), {measurement(score) for score in found}
    scores = [*(s for s in read_scores(run) if measurement(s) not in new), *found]
    files = [write_whole(run / SCORES, to_json(scores)), write_whole(run / "scores.md", to_markdown(scores))]
    files += [write_run_report(run, pictures or catalog, tested), *figures(run)]
    if state.get("run_id") and config.tracking.mlflow:
        where = config.model_copy(update={"run_root": str(run.parent)})
        publish(where, state["run_id"], int(state["position"]), found, files)
    return scores


def training_data(config: Config) -> Catalog | None:
    """The catalog the encoder was trained on, if it is named and still there."""
    try:
        return training_catalog(config)
    except (ConfigError, DataError):
        return None


def leaked(run: Path, learnt: Catalog | None, tested: Catalog, fingerprint: str | None) -> dict[str, Any]:
    """Which test images were among the pretraining images; kept in the run's `leakage.json` and with its scores."""
    return leakage.record(run, leakage.find(learnt, tested, fingerprint), tested)


def measurement(score: Score) -> tuple[Any, ...]:
    """What makes two scores the same measurement."""
    keys = ("weights", "data", "train_data", "crop", "image_size")
    return score.encoder, score.protocol, score.metric, *(score.settings.get(key) for key in keys)


def publish(config: Config, run_id: str, position: int, scores: Sequence[Score], files: Sequence[Path]) -> None:
    """Add scores and files to the encoder's MLflow run; a store that is down costs a line, not the scores."""
    sink = MlflowSink.open(config, run_id, print, running=False)
    if sink is None:
        return
    names = {f"{s.protocol}/{s.encoder}/{s.metric}": s.mean for s in scores}
    sink.metrics(position, time.time(), names)
    send(sink, list(files))
    sink.close(None)


def run_folder(path: Path) -> Path:
    """The run that a run folder, its checkpoints folder or one checkpoint belongs to."""
    for folder in (path, *path.resolve().parents):
        if (folder / "checkpoints").is_dir() or (folder / "config.yaml").is_file():  # they may be elsewhere
            return folder
    raise CheckpointError("this checkpoint lies in no run folder", where=str(path), do="name RUN or its checkpoint")
