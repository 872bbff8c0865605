"""Runs as a training leaves them, made without one: weights with noise, their average, scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foundation.config import Config, from_dict, to_dict
from foundation.evaluation.scores import Score, to_json
from foundation.models.initialise import initialise
from foundation.objectives.registry import build
from foundation.training import checkpoint
from foundation.training.pins import Score as Probed

DECODER = {"width": 24, "depth": 1, "heads": 2}


def config_of(positions: str = "relative", side: int = 32, **model: Any) -> Config:
    """A nano encoder under SAR-JEPA, or under MAE with other positions."""
    objective: dict[str, Any] = {"name": "sar-jepa", "windows": 1, "window": 3}
    if positions != "relative":
        objective = {"name": "mae", "mask_ratio": 0.5}
    parts = {"size": "nano", "patch": 8, "decoder": DECODER, "positions": positions, **model}
    return from_dict(
        {"name": "made", "data": {"catalog": "x/corpus", "image_size": side}, "model": parts, "objective": objective}
    )


def make_run(root: Path, config: Config, position: int = 4096, pin: bool = False) -> Path:
    """A run folder with one more checkpoint, whose every weight counts; the average is half of the weights."""
    model: nn.Module = build(config).build_model()
    initialise(model, position)
    generator = torch.Generator().manual_seed(position)
    state: dict[str, Tensor] = model.state_dict()
    for value in state.values():
        value += 0.05 * torch.randn(value.shape, generator=generator)
    tensors = {f"model.{name}": value for name, value in state.items()}
    tensors |= {f"ema.{name}": value / 2 for name, value in state.items()}
    facts = {"position": position, "fingerprint": "f1a9" * 16, "config": to_dict(config), "run_id": None}
    where = config.train.checkpoints or root / "checkpoints"
    checkpoint.save(where, tensors, facts, position, score=Probed(0.5, "probe") if pin else None)
    return root


def write_scores(run: Path, weights: str) -> None:
    """Two scores of these weights, an encoder and its control."""
    settings = {"weights": weights, "pretrained_on_test_images": 0}
    rows = (("pretrained", 0.731), ("random-init", 0.223))
    scores = [Score(n, "knn", "accuracy", m, m - 0.01, m + 0.01, (0,), (m,), 50, settings) for n, m in rows]
    (run / "scores.json").write_text(to_json(scores))
