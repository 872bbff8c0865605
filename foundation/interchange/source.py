"""What an export is made from: the encoder of a run, where it comes from, and images to compare it on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foundation.config import Config, config_hash, from_dict, to_dict
from foundation.errors import CheckpointError
from foundation.evaluation.scores import Score, from_rows
from foundation.files import read_json
from foundation.interchange.published import load_encoder
from foundation.interchange.saratrx import FORMAT
from foundation.models.attention import Attention
from foundation.models.vit import ViT
from foundation.training import checkpoint
from shards.addressed import uniform


@dataclass(frozen=True)
class Source:
    """An encoder in evaluation mode on the CPU, and the facts that stand in its card.

    `pool` makes one vector of its tokens: `token` or `avg`. `state` holds the plain values of the checkpoint, `leakage`
    the run's leakage report as it was written, or nothing.
    """

    encoder: ViT
    config: Config
    state: dict[str, Any]
    averaged: bool
    pool: str
    scores: tuple[Score, ...] = ()
    leakage: dict[str, Any] | None = None

    @property
    def image_size(self) -> int:
        """Side of the images it was trained on, pixels."""
        return self.config.data.image_size

    @property
    def parts(self) -> dict[str, Any]:
        """What builds the same encoder again, for `rebuilt`; nothing of the machine it was trained on."""
        tree = to_dict(self.config)
        model = tree["model"] | {"attention": "auto", "init": None}
        return {"model": model, "objective": tree["objective"], "data": {"image_size": self.image_size}}

    def facts(self) -> dict[str, Any]:
        """What every exported configuration says about its weights, as JSON values."""
        return {
            "format": FORMAT,
            "parts": self.parts,
            "pool": self.pool,
            "config_hash": config_hash(self.config),
            "fingerprint": self.state.get("fingerprint"),
            "samples": self.state["position"],
            "averaged": self.averaged,
        }


def open_source(run: Path, averaged: bool = False, best: bool = False, pool: str | None = None) -> Source:
    """The encoder of a run or checkpoint: the newest weights, their running average, or the best by its probe.

    `pool` None takes the class token, or the mean of the patch tokens where there is none. Raises CheckpointError where
    there is no such checkpoint or average, or no class token for `token`.
    """
    from foundation.evaluation.runs import run_folder

    place = checkpoint.resolve(run, best)
    encoder, config = load_encoder(place, averaged=averaged)
    with_backend(encoder, "auto")
    if pool == "token" and not encoder.class_tokens:
        raise CheckpointError(
            "this encoder has no class token, so it cannot be pooled by one",
            where=str(run),
            do="export with --pool avg",
        )
    home = run_folder(run)
    scores, leakage = (home / name for name in ("scores.json", "leakage.json"))
    return Source(
        encoder,
        config,
        checkpoint.load(place, None),
        averaged,
        pool or ("token" if encoder.class_tokens else "avg"),
        tuple(from_rows(read_json(scores))) if scores.exists() else (),
        read_json(leakage) if leakage.exists() else None,
    )


def with_backend(encoder: nn.Module, backend: str) -> None:
    """Have every attention of a model computed by this backend."""
    for module in encoder.modules():
        if isinstance(module, Attention):
            module.backend = backend


def rebuilt(parts: dict[str, Any], where: str) -> ViT:
    """An encoder without weights, from `Source.parts`. Raises ConfigError for keys that this version does not know."""
    from foundation.objectives.reconstruction import build_encoder

    config = from_dict(parts, where)
    with torch.device("meta"):
        return build_encoder(config).to_empty(device="cpu").eval()


def images(source: Source, count: int, first: int = 0) -> Tensor:
    """Addressed random images in [0, 1], fp32 [count, C, S, S] of the size of the training."""
    channels, side = source.encoder.channels, source.image_size
    at = torch.arange(first, first + count)
    return uniform(0, "export/images", at, channels * side * side).view(count, channels, side, side)


@torch.no_grad()
def features(source: Source, x: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled features [B, dim] and patch tokens [B, N, dim]: what an export has to give back."""
    return pooled(source.encoder, source.encoder.forward_features(x), source.pool)


def pooled(encoder: ViT, tokens: Tensor, pool: str) -> tuple[Tensor, Tensor]:
    """Encoder tokens [B, prefix + N, dim] → (features [B, dim], patch tokens [B, N, dim])."""
    patches = tokens[:, encoder.prefix :]
    return (tokens[:, 0] if pool == "token" else patches.mean(1)), patches


def gap(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> float:
    """Largest absolute difference; infinite where shapes differ or a value is not finite."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        error = (a - b).abs().max().item() if a.shape == b.shape else float("inf")
        worst = max(worst, error if error < float("inf") else float("inf"))
    return worst
