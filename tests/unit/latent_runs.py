"""Small I-JEPA configurations and images, for several files of tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foundation.config import Config, from_dict
from foundation.objectives.latent import JointEmbeddingPrediction
from foundation.objectives.registry import build


def config(objective: dict[str, Any] | None = None, registers: int = 0, **rest: Any) -> Config:
    """An 8x8 grid of 8-pixel patches."""
    decoder = {"width": 48, "depth": 2, "heads": 3}
    model = {
        "size": "nano",
        "patch": 8,
        "positions": "sincos",
        "registers": registers,
        "input_gain": 5.0,
        "decoder": decoder,
    }
    tree: dict[str, Any] = {"data": {"image_size": 64, "lanes": 2}, "train": {"global_batch": 4}, **rest}
    return from_dict({**tree, "model": model, "objective": {"name": "i-jepa", **(objective or {})}})


def latent(run: Config) -> JointEmbeddingPrediction:
    found = build(run)
    assert isinstance(found, JointEmbeddingPrediction)
    return found


def images(count: int = 4, channels: int = 1) -> Tensor:
    noise = torch.randn(2, count, channels, 64, 64, generator=torch.Generator().manual_seed(1))
    return (0.2 * noise.square().sum(0).sqrt()).clamp(0, 1)
