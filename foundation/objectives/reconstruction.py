"""Masked prediction of a fixed target in local windows (SAR-JEPA, arXiv 2311.15153), and what differs by one class.

A class is a frame: where masks lie, what the encoder sees of them, what is predicted. Targets are given to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foundation.config import Config
from foundation.config_text import Problem
from foundation.models.families import FAMILY, Tokens, class_token, options
from foundation.models.heads import FusedWindowModel, MaskedImageModel, MaskedWindowModel
from foundation.models.vit import ViT
from foundation.objectives.masks import Masks, local_windows, random_patches, visible_patches, whole_image
from foundation.objectives.targets import FixedTarget, Target, patchify, standardise, unpatchify


class Inputs(NamedTuple):
    """What one micro-batch asks of the model: its arguments, and the target [B, W, m, out] of the slots asked for."""

    model_args: tuple[Tensor, ...]
    target: Tensor


def build_encoder(config: Config) -> ViT:
    """The encoder of a configuration; `models.initialise` or a checkpoint gives it its weights."""
    size, model = FAMILY[config.model.size], config.model
    side = config.data.image_size // model.patch
    where = model.positions, class_token(config), model.registers, options(config), (side, side)
    encoder = ViT(size.dim, size.depth, size.heads, model.patch, model.channels, model.attention, *where)
    encoder.patch_embed.proj.gain = model.input_gain
    return encoder


def position_conflicts(config: Config, known: tuple[str, ...]) -> Iterator[Problem]:
    """Positions that an objective does not build on."""
    if config.model.positions not in known:
        text = f"{' or '.join(known)}, which objective.name = {config.objective.name!r} builds on"
        text += ": its windows know nothing of their place" if known == ("relative",) else ""
        yield Problem("model.positions", config.model.positions, text, others=("objective.name",))


def decoder_conflicts(config: Config, part: str) -> Iterator[Problem]:
    """Of what the encoder does not see, a decoder (or predictor, `part`) with fixed positions must know the place."""
    decoder = config.model.decoder
    if not decoder.depth:
        text = f"at least 1: what is hidden enters in the {part}"
        yield Problem("model.decoder.depth", 0, text, others=("objective.name",))
    if decoder.width % 4:
        text = "a multiple of 4: sines and cosines of two axes"
        yield Problem("model.decoder.width", decoder.width, text, others=("objective.name",))


class MaskedReconstruction:
    """Predict `target` on the hidden patches of local windows; squared error, mean over masked tokens and values.

    `fixed` says how the predicted maps are laid out; `target`, which computes them, may be replaced by another way to
    the same maps.
    """

    encodings: tuple[str, ...] = ("relative",)
    evaluated, class_token = "encoder", True

    def __init__(self, config: Config, target: FixedTarget) -> None:
        self.config, self.fixed = config, target
        self.target: Target = target
        self.names = target.names
        """Of the predicted maps."""

    def tokens(self) -> Tokens:
        """The sizes that formulas of memory and time need; no tensor is made."""
        o, values, registers = self.config.objective, self.values, self.config.model.registers
        inside = o.window**2
        length, masked = 1 + registers + inside, int(inside * o.mask_ratio)
        return Tokens(self.patches, o.windows, length, masked, values, values, registers=registers)

    def conflicts(self) -> Iterator[Problem]:
        """What keys of the configuration cannot be together under this objective."""
        yield from position_conflicts(self.config, self.encodings)
        yield from self.fixed.conflicts(self.config)
        yield from self.mask_conflicts()

    def mask_conflicts(self) -> Iterator[Problem]:
        """Windows must fit into the grid, and some of their tokens be hidden."""
        o, model, side = self.config.objective, self.config.model, self.config.data.image_size
        masked, tokens = int(o.window**2 * o.mask_ratio), o.window**2
        if not 0 < masked < tokens:
            text = f"a share that masks at least one of {tokens} tokens and leaves one visible, not {masked}"
            yield Problem("objective.mask_ratio", o.mask_ratio, text, others=("objective.window",))
        if side % model.patch:
            return  # there is no grid
        grid, sides = side // model.patch, ("data.image_size", "model.patch")
        places = grid - o.window + 1
        if places < 1:
            yield Problem("objective.window", o.window, f"at most the token grid's side {grid}", others=sides)
        elif o.windows > places:
            text = f"at most {places}: a window of {o.window} has {places} distinct rows in a grid of {grid}"
            yield Problem("objective.windows", o.windows, text, others=("objective.window", *sides))

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.config.data.image_size // self.config.model.patch) ** 2

    @property
    def values(self) -> int:
        """Numbers predicted per patch."""
        return len(self.names) * (self.config.model.patch // self.fixed.cell) ** 2

    def build_model(self) -> MaskedWindowModel | MaskedImageModel:
        """Encoder and decoder; the output width follows from the target."""
        model, decoder = self.config.model, self.config.model.decoder
        encoder = build_encoder(self.config)
        return MaskedWindowModel(encoder, decoder.width, decoder.depth, decoder.heads, self.values, model.attention)

    def masks(self, positions: Tensor, grid: tuple[int, int]) -> Masks:
        """The windows and masks of the samples at `positions` int64 [B]."""
        o = self.config.objective
        shared = self.config.train.global_batch if o.draw == "shared" else None
        return local_windows(self.config.seed, positions, grid, o.window, o.windows, o.mask_ratio, shared)

    @torch.no_grad()
    def prepare(self, images: Tensor, positions: Tensor, begin: int = 0) -> Inputs:
        """Masks and exact fp32 targets of a micro-batch: images fp32 [B, C, S, S], positions int64 [B]."""
        patch = self.config.model.patch
        masks = self.masks(positions, (images.shape[-2] // patch, images.shape[-1] // patch))
        target = gather_masked(patchify(self.target.maps(images), patch // self.fixed.cell), masks)
        return Inputs((images, *masks), target)

    def loss(self, prediction: Any, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error in fp32, and the same per target map. `prediction` is what the model returned."""
        error = (prediction.float() - inputs.target).square()
        per_map = error.flatten(0, -2).mean(0).view(len(self.names), -1).mean(1)
        parts = {f"loss_{name}": value for name, value in zip(self.names, per_map.detach(), strict=True)}
        return per_map.mean(), parts

    def compared(self, prediction: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """What the loss compares: predicted and target values, both [..., out]."""
        return prediction, inputs.target

    def momentum(self, position: int) -> float | None:
        """There is no teacher."""
        return None

    def predict(self, model: Any, images: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
        """For figures: target maps [B, M, H / cell, W / cell], and the predictions [B, W, m, out] of what is asked."""
        return self.target.maps(images), model(images, *masks)


class UnmaskedReconstruction(MaskedReconstruction):
    """Predict the target of every patch of an image of which nothing is hidden.

    PGGA, the physics-guided features without masked modelling of SAR-JEPA's comparison (arXiv 2311.15153), was not
    released. Here all tokens pass the encoder and decoder of SAR-JEPA as one window, and the loss is a mean over all.
    The mask token stays in the model, unused, so that tensors are those of the other objectives.
    """

    encodings = ("relative", "sincos", "learned")

    def tokens(self) -> Tokens:
        """One window that is the image, all of it predicted."""
        n, values, registers = self.patches, self.values, self.config.model.registers
        return Tokens(n, 1, 1 + registers + n, n, values, values, registers=registers)

    def mask_conflicts(self) -> Iterator[Problem]:
        """There are no windows to place."""
        yield from ()

    def masks(self, positions: Tensor, grid: tuple[int, int]) -> Masks:
        """The same for all samples."""
        return whole_image(positions, grid)


class VisibleReconstruction(MaskedReconstruction):
    """Predict the target of random patches of which the encoder sees nothing: MAE (arXiv 2111.06377)."""

    encodings = ("sincos", "learned")

    @property
    def visible(self) -> int:
        """Patches that the encoder sees."""
        return visible_patches(self.patches, self.config.objective.mask_ratio)

    def tokens(self) -> Tokens:
        """One window that is the image, its visible part in the encoder."""
        n, values, registers = self.patches, self.values, self.config.model.registers
        seen, prefix = self.visible, 1 + registers
        return Tokens(n, 1, prefix + n, n - seen, values, values, visible=prefix + seen, registers=registers)

    def mask_conflicts(self) -> Iterator[Problem]:
        """Some patches must be visible and some hidden, and a decoder must bring both together."""
        yield from decoder_conflicts(self.config, "decoder")
        if not 0 < self.visible < self.patches:
            text = f"a share that hides at least one of {self.patches} patches and leaves one visible"
            sides = ("data.image_size", "model.patch")
            yield Problem("objective.mask_ratio", self.config.objective.mask_ratio, text, others=sides)

    def build_model(self) -> MaskedImageModel:
        """Encoder of visible patches and decoder of all."""
        model, decoder = self.config.model, self.config.model.decoder
        encoder = build_encoder(self.config)
        return MaskedImageModel(encoder, decoder.width, decoder.depth, decoder.heads, self.values, model.attention)

    def masks(self, positions: Tensor, grid: tuple[int, int]) -> Masks:
        """The hidden patches of the samples at `positions` int64 [B]."""
        return random_patches(self.config.seed, positions, grid, self.config.objective.mask_ratio)


class LearnedFusion(MaskedReconstruction):
    """Predict one map per channel, the target's maps of that channel weighted by a softmax that is learnt.

    SARATR-X v2 (arXiv 2607.23238); with `normalise_pixels`, as there, each patch of the fused map has mean 0 and
    variance 1. The weights are trained through the target: nothing but the other maps' share of the
    error keeps them from the map that is predicted most easily, so every weight is a metric.
    """

    def __init__(self, config: Config, target: FixedTarget) -> None:
        super().__init__(config, target)
        self.channels = config.model.channels
        self.fused = tuple(n.removeprefix("c0_") for n in target.names[: len(target.names) // self.channels])
        self.names = ("fused",) if self.channels == 1 else tuple(f"c{c}_fused" for c in range(self.channels))

    def tokens(self) -> Tokens:
        """The whole target is kept until it is fused."""
        maps = len(self.fused)
        return super().tokens()._replace(target=maps * self.values, fusion=maps)

    def build_model(self) -> FusedWindowModel:
        """The weights are parameters of the model, so that engines and checkpoints treat them as such."""
        model, d = self.config.model, self.config.model.decoder
        encoder, maps = build_encoder(self.config), len(self.fused)
        return FusedWindowModel(encoder, d.width, d.depth, d.heads, self.values, model.attention, maps)

    def fuse(self, maps: Tensor, weights: Tensor) -> Tensor:
        """Weighted sums over each channel's maps of patches: [..., C · maps · v] and fp32 [maps] → [..., C · v]."""
        fused = (maps.unflatten(-1, (self.channels, len(weights), -1)) * weights[:, None]).sum(-2)
        return (standardise(fused, (-1,)) if self.config.objective.normalise_pixels else fused).flatten(-2)

    def loss(self, prediction: Any, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error of the fused target, which passes a gradient to the weights; and the weights."""
        predicted, weights = prediction
        loss, parts = super().loss(predicted, inputs._replace(target=self.fuse(inputs.target, weights)))
        shares = zip(self.fused, weights.detach(), strict=True)
        return loss, parts | {f"fusion_{name}": share for name, share in shares}

    def compared(self, prediction: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The target as it is fused now."""
        predicted, weights = prediction
        return predicted, self.fuse(inputs.target, weights)

    def predict(self, model: Any, images: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
        """Target maps fused by the model's weights, and its predictions."""
        maps, (predicted, weights) = super().predict(model, images, masks)
        patch = self.config.model.patch
        fused = self.fuse(patchify(maps, patch), weights)
        return unpatchify(fused, patch, (maps.shape[-2] // patch, maps.shape[-1] // patch)), predicted


def gather_masked(tokens: Tensor, masks: Masks) -> Tensor:
    """Rows of the patches that are asked for: tokens [B, N, D] → [B, W, m, D]."""
    ids = masks.patch_ids.gather(2, masks.asked)
    flat = ids.flatten(1)[:, :, None].expand(-1, -1, tokens.shape[-1])
    return tokens.gather(1, flat).view(*ids.shape, -1)
