"""The pictures of a run that need its model: targets map by map, reconstructions, attention distance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foundation.config import Config, from_dict, resolved_yaml
from foundation.errors import DataError
from foundation.evaluation import report
from foundation.evaluation.attention import attention_distances
from foundation.evaluation.scores import Score, from_rows
from foundation.files import read_json
from foundation.models.vit import ViT
from foundation.objectives.reconstruction import MaskedReconstruction
from foundation.objectives.registry import build
from foundation.objectives.targets import unpatchify
from foundation.training import checkpoint
from foundation.training.meters import environment
from foundation.training.setup import ENVIRONMENT
from shards.augment import resize_center
from shards.catalog import Catalog
from shards.stream import Batch, Reader

SCORES = "scores.json"
SHOWN = 9  # maps of a figure: a row of more is too small to see


def write_run_report(run: Path, catalog: Catalog) -> Path:
    """Draw the figures of a run from its newest checkpoint and images of `catalog`, and write its `report.html`.

    Raises CheckpointError without a checkpoint, StorageError when a file of the run cannot be read or written.
    """
    state = checkpoint.load(run, "model.")
    config = from_dict(state["config"])
    metrics = read_metrics(run)
    record = run / ENVIRONMENT
    return report.write_report(
        run,
        metrics=[{**row, "samples": row["position"]} for row in metrics],
        panels=model_panels(config, state["tensors"], catalog, run / "figures"),
        scores=read_scores(run),
        config_yaml=resolved_yaml(config),
        environment=read_json(record) if record.exists() else environment(),
        title=f"{config.name}: {config.objective.name}, {config.model.size}/{config.model.patch}",
    )


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
def model_panels(
    config: Config, weights: dict[str, Tensor], catalog: Catalog, folder: Path, count: int = 3
) -> dict[str, bytes | Path]:
    """Caption → PNG of `count` images of the catalog, and of the attention distance over 16."""
    objective = build(config)
    model = objective.build_model()
    model.load_state_dict(weights)
    model.eval()
    images = pick_images(catalog, config.data.image_size, 16)
    judged = model.get_submodule(objective.evaluated)
    assert isinstance(judged, ViT)
    distances = {
        "Attention distance": report.attention_figure(
            attention_distances(judged, images), folder / "attention-distance.png"
        )
    }
    shown = f"images of {', '.join(source.name for source in catalog.sources)}"
    if not isinstance(objective, MaskedReconstruction):  # what is predicted are features, not maps
        shown_images, context, blocks = objective.prepare(images[:count], torch.arange(count)).model_args
        drawn = report.block_panels(shown_images, context, blocks, config.model.patch, folder / "blocks.png")
        return {f"Context and target blocks ({shown})": drawn, **distances}
    masks, targets, predictions = reconstruct(objective, model, images[:count])
    names, targets, predictions = objective.names[:SHOWN], targets[:, :SHOWN], predictions[:, :SHOWN]
    if len(objective.names) > SHOWN:
        shown += f", {SHOWN} of {len(objective.names)} maps"
    what = "Reconstruction of masked patches" if bool((masks == 1).any()) else "Prediction of all patches"
    return {
        f"Target per map ({shown})": report.target_panels(images[:count], targets, names, folder / "targets.png"),
        what: report.reconstruction_panels(
            images[:count], masks, targets, predictions, folder / "reconstructions.png", names
        ),
        **distances,
    }


def pick_images(catalog: Catalog, size: int, count: int) -> Tensor:
    """Images spread over the catalog, resized without randomness: fp32 [count, C, size, size]."""
    reader = Reader(catalog)
    ids = torch.linspace(0, len(reader) - 1, count).long()
    return resize_center(Batch.of([reader.valid(i) for i in ids.tolist()]), size)


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
