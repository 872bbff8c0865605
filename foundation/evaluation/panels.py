"""The report of a run from what lies in its folder: the model of its newest checkpoint, metrics, scores, answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foundation.config import Config, from_dict, resolved_yaml
from foundation.errors import DataError
from foundation.evaluation import report
from foundation.evaluation.figures.operations import speed_figure, time_figure
from foundation.evaluation.figures.pictures import block_panels, reconstruction_panels, target_panels
from foundation.evaluation.leaks import read_verdict
from foundation.evaluation.predictions import read as read_predictions
from foundation.evaluation.scores import Score, from_rows
from foundation.evaluation.views import Figures, attention_views, chip_views, patch_views, pick_images
from foundation.files import read_json
from foundation.inspecting.inspection import Inspection, inspect
from foundation.inspecting.text import sections
from foundation.interchange import random_encoder
from foundation.objectives.reconstruction import MaskedReconstruction, build_encoder
from foundation.objectives.registry import build
from foundation.objectives.targets import unpatchify
from foundation.training import checkpoint
from foundation.training.meters import environment
from foundation.training.setup import ENVIRONMENT
from shards.catalog import Catalog

SCORES = "scores.json"
MAPS = 9  # of a figure: a row of more is too small to see
IMAGES = 16  # that attention and patch features are computed on
ROBUSTNESS = "robustness.png"
OPERATIONS = ("throughput", "time", "restarts", "events", "checkpoints", "coverage", "stragglers", "standstill")


def write_run_report(run: Path, catalog: Catalog, labelled: Catalog | None = None) -> Path:
    """Draw the figures of a run from its newest checkpoint and images of `catalog`, and write its `report.html`.

    Chips of known class come from `labelled`; without it, figures that need classes are left out. Raises
    CheckpointError without a checkpoint, StorageError when a file of the run cannot be read or written.
    """
    state = checkpoint.load(run, "model.")
    config = from_dict(state["config"])
    weights, folder, record = state["tensors"], run / report.FIGURES, run / ENVIRONMENT
    encoders = {"pretrained": trained_encoder(config, weights), "random-init": random_encoder(config, config.seed)}
    images = pick_images(catalog, config.data.image_size, IMAGES)
    robustness, found = folder / ROBUSTNESS, inspect(run)
    return report.write_report(
        run,
        metrics=[{**row, "samples": row["position"]} for row in read_metrics(run)],
        panels={
            **operations(found, folder),
            "targets": model_panels(config, weights, catalog, folder),
            "features": patch_views(encoders, images, folder)
            | (chip_views(encoders, labelled, config, folder) if labelled else {}),
            "attention": attention_views(encoders, images, folder),
            "robustness": {"Scores of changed test images": robustness} if robustness.exists() else {},
        },
        scores=read_scores(run),
        predictions=read_predictions(run),
        verdict=read_verdict(run),
        config_yaml=resolved_yaml(config),
        environment=read_json(record) if record.exists() else environment(),
        listings={section.anchor: section for section in sections(found) if section.anchor in OPERATIONS},
        title=f"{config.name}: {config.objective.name}, {config.model.size}/{config.model.patch}",
    )


def operations(found: Inspection, folder: Path) -> dict[str, Figures]:
    """Speed and time of a run that logged them."""
    if not found.windows:
        return {}
    return {
        "throughput": {"Images per second": speed_figure(found.windows, found.attempts, folder / "speed.png")},
        "time": {"Share of the time": time_figure(found.windows, folder / "time.png")},
    }


def trained_encoder(config: Config, weights: dict[str, Tensor]) -> Any:
    """The encoder among the weights of a whole model, in evaluation mode."""
    encoder, prefix = build_encoder(config), f"{build(config).evaluated}."
    encoder.load_state_dict({n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)})
    return encoder.eval()


def read_scores(run: Path) -> list[Score]:
    """The scores kept with a run."""
    file = run / SCORES
    return from_rows(read_json(file)) if file.exists() else []


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`; an imported model has none. Raises DataError for a line that is not JSON."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError("a line of the metrics is not JSON", where=f"{path}:{number}", do="delete it") from error
    return rows


@torch.no_grad()
def model_panels(config: Config, weights: dict[str, Tensor], catalog: Catalog, folder: Path, count: int = 3) -> Figures:
    """Caption → PNG: the targets of `count` images of the catalog, and what the model predicts of them."""
    objective = build(config)
    model = objective.build_model()
    model.load_state_dict(weights)
    model.eval()
    images = pick_images(catalog, config.data.image_size, count)
    shown = f"images of {', '.join(source.name for source in catalog.sources)}"
    if not isinstance(objective, MaskedReconstruction):  # what is predicted are features, not maps
        pixels, context, blocks = objective.prepare(images, torch.arange(count) % config.train.global_batch).model_args
        drawn = block_panels(pixels, context, blocks, config.model.patch, folder / "blocks.png")
        return {f"Context and target blocks ({shown})": drawn}
    masks, targets, predictions = reconstruct(objective, model, images)
    names, targets, predictions = objective.names[:MAPS], targets[:, :MAPS], predictions[:, :MAPS]
    if len(objective.names) > MAPS:
        shown += f", {MAPS} of {len(objective.names)} maps"
    what = "Reconstruction of masked patches" if bool((masks == 1).any()) else "Prediction of all patches"
    return {
        f"Target per map ({shown})": target_panels(images, targets, names, folder / "targets.png"),
        what: reconstruction_panels(images, masks, targets, predictions, folder / "reconstructions.png", names),
    }


def reconstruct(objective: MaskedReconstruction, model: Any, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mask state [n, gh, gw] (1 masked, 0 visible, NaN outside), targets and predictions [n, M, h, w] of `images`.

    Where windows overlap, a patch shows the window that was drawn last; patches never asked for have no prediction
    (NaN).
    """
    patch = objective.config.model.patch
    grid = (images.shape[-2] // patch, images.shape[-1] // patch)
    masks = objective.masks(torch.arange(len(images)), grid)
    targets, tokens = objective.predict(model, images, masks)
    size, asked = tokens.shape[-1], masks.asked
    state = torch.full((len(images), grid[0] * grid[1]), float("nan"))
    drawn = torch.full((len(images), grid[0] * grid[1], size), float("nan"))
    for index in range(len(images)):
        for window in range(masks.patch_ids.shape[1]):
            ids = masks.patch_ids[index, window]
            state[index, ids] = 0.0
            state[index, ids[masks.masked[index, window]]] = 1.0
            drawn[index, ids] = float("nan")
            drawn[index, ids[asked[index, window]]] = tokens[index, window].float()
    return state.view(-1, *grid), targets, unpatchify(drawn, patch // objective.fixed.cell, grid)
