"""Masked prediction of a fixed target in local windows (SAR-JEPA, arXiv 2311.15153)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foundation.config import Config
from foundation.models.families import FAMILY
from foundation.models.heads import MaskedWindowModel
from foundation.models.vit import ViT
from foundation.objectives.masks import Masks, local_windows
from foundation.objectives.targets import GradientRatio, Target, patchify


class Inputs(NamedTuple):
    """What one micro-batch asks of the model: its arguments, and the target [B, W, m, out] of the masked slots."""

    model_args: tuple[Tensor, ...]
    target: Tensor


def build_encoder(config: Config) -> ViT:
    """The encoder of a configuration; `models.initialise` or a checkpoint gives it its weights."""
    size, model = FAMILY[config.model.size], config.model
    return ViT(size.dim, size.depth, size.heads, model.patch, model.channels, model.attention)


class MaskedReconstruction:
    """Predict `target` on the hidden patches of local windows; squared error, mean over masked tokens and values."""

    def __init__(self, config: Config, target: Target) -> None:
        self.config, self.target = config, target

    def build_model(self) -> MaskedWindowModel:
        """Encoder and decoder; the output width follows from patch² times the number of target maps."""
        model, out = self.config.model, self.config.model.patch**2 * len(self.target.names)
        decoder = model.decoder
        encoder = build_encoder(self.config)
        return MaskedWindowModel(encoder, decoder.width, decoder.depth, decoder.heads, out, model.attention)

    def masks(self, positions: Tensor, grid: tuple[int, int]) -> Masks:
        """The windows and masks of the samples at `positions` int64 [B]."""
        o = self.config.objective
        shared = self.config.train.global_batch if o.draw == "shared" else None
        return local_windows(self.config.seed, positions, grid, o.window, o.windows, o.mask_ratio, shared)

    @torch.no_grad()
    def prepare(self, images: Tensor, positions: Tensor) -> Inputs:
        """Masks and exact fp32 targets of a micro-batch: images fp32 [B, C, S, S], positions int64 [B]."""
        patch = self.config.model.patch
        masks = self.masks(positions, (images.shape[-2] // patch, images.shape[-1] // patch))
        target = gather_masked(patchify(self.target.maps(images), patch), masks)
        return Inputs((images, *masks), target)

    def loss(self, prediction: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error in fp32, and the same per target map."""
        error = (prediction.float() - inputs.target).square()
        per_map = error.flatten(0, -2).mean(0).view(len(self.target.names), -1).mean(1)
        parts = {f"loss_{name}": value for name, value in zip(self.target.names, per_map.detach(), strict=True)}
        return per_map.mean(), parts


def gather_masked(tokens: Tensor, masks: Masks) -> Tensor:
    """Rows of the masked patches: tokens [B, N, D] → [B, W, m, D]."""
    ids = masks.patch_ids.gather(2, masks.masked)
    flat = ids.flatten(1)[:, :, None].expand(-1, -1, tokens.shape[-1])
    return tokens.gather(1, flat).view(*ids.shape, -1)


def sar_jepa(config: Config) -> MaskedReconstruction:
    """Four-scale gradient ratio, four local windows, 80 % masked."""
    o = config.objective
    return MaskedReconstruction(config, GradientRatio(o.radii, o.offset, o.centre, config.model.channels))
