"""Scores of a run or checkpoint: load it, evaluate beside its controls, keep the scores, redraw the report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from foundation.config import Config
from foundation.errors import CheckpointError
from foundation.evaluation import fewshot
from foundation.evaluation.features import Progress
from foundation.evaluation.panels import SCORES, write_run_report
from foundation.evaluation.scores import Score, from_json, to_json
from foundation.evaluation.suite import RANDOM, evaluate
from foundation.interchange import load_encoder, random_encoder
from foundation.training import checkpoint
from foundation.training.mlflow_sink import MlflowSink
from shards.catalog import load as load_catalog


def evaluate_run(
    path: Path,
    data: Path,
    protocol: str,
    *,
    test: Path | None = None,
    mode: str = "linear",
    shots: Sequence[int] = fewshot.SHOTS,
    seeds: Sequence[int] = fewshot.SEEDS,
    crop: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[Score]:
    """Evaluate the encoder at `path` (run folder or checkpoint) on the catalog `data`, train split against test split.

    The scores join those in the run's `scores.json`, replacing the same protocol, and the run's report and MLflow run
    are brought up to date. Returns all scores of the run.
    """
    encoder, config = load_encoder(path, device)
    catalog = load_catalog(data)
    found = evaluate(
        {"pretrained": encoder, RANDOM: random_encoder(config, config.seed, device)},
        catalog,
        protocol,
        image_size=config.data.image_size,
        mode=mode,
        shots=shots,
        seeds=seeds,
        crop=crop,
        test_catalog=load_catalog(test) if test else None,
        device=device,
        progress=progress,
    )
    run = run_folder(path)
    names = {score.protocol for score in found}
    scores = [*(s for s in read_scores(run) if s.protocol not in names), *found]
    (run / SCORES).write_text(to_json(scores))
    page = write_run_report(run, catalog)
    run_id = checkpoint.load(path).get("run_id")
    if run_id and config.tracking.mlflow:
        publish(config.model_copy(update={"run_root": str(run.parent)}), run_id, found, [page, run / SCORES])
    return scores


def publish(config: Config, run_id: str, scores: Sequence[Score], files: Sequence[Path]) -> None:
    """Add scores and files to the MLflow run of the encoder; a store that is down costs a line, not the scores."""
    sink = MlflowSink.open(config, run_id, print)
    if sink is None:
        return
    sink.metrics(config.train.samples, time.time(), {metric_name(score): score.mean for score in scores})
    for file in files:
        sink.artifact(file, "")
    sink.close("FINISHED")


def metric_name(score: Score) -> str:
    """A name that MLflow accepts: letters, digits, and `_-. /`."""
    return f"{score.protocol}/{score.encoder}/{score.metric}".replace("%", "")


def read_scores(run: Path) -> list[Score]:
    """The scores kept with a run."""
    file = run / SCORES
    return from_json(file.read_text()) if file.exists() else []


def run_folder(path: Path) -> Path:
    """The run that a run folder, its checkpoints folder or one checkpoint belongs to."""
    for folder in (path, *path.resolve().parents):
        if (folder / "checkpoints").is_dir():
            return folder
    raise CheckpointError(
        "this checkpoint does not lie in a run folder", where=str(path), do="name RUN or its checkpoint"
    )
