"""Prediction of a teacher's features in masked blocks: I-JEPA (Assran et al., arXiv 2301.08243)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from foundation.config import Config
from foundation.config_text import Problem
from foundation.models.families import FAMILY, Tokens
from foundation.models.predictor import JointEmbedding
from foundation.objectives.masks import Blocks, batch_blocks, block_sizes, multi_block
from foundation.objectives.reconstruction import build_encoder, decoder_conflicts, position_conflicts

TYPICAL = 8  # global batches over which the planner's token counts are means


class LatentInputs(NamedTuple):
    """What one micro-batch asks of the model: images, ids of context [B, n] and of targets [B, T, m]."""

    model_args: tuple[Tensor, Tensor, Tensor]


class JointEmbeddingPrediction:
    """Predict, from one context block, what the teacher sees in several target blocks; smooth-L1 of beta 1.

    The teacher is a running average of the encoder: after an update of G samples it keeps m^(G / reference batch) of
    itself, m going linearly from the first to the last `objective.momentum` over the run. No class token. Sizes of
    blocks are drawn once per global batch and uniformly among all that lie in the ranges, places for each sample.
    """

    encodings, class_token = ("sincos",), False
    evaluated = JointEmbedding.judged
    names = ("latent",)

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of a column and of a row of an image."""
        side = self.config.data.image_size // self.config.model.patch
        return side, side

    @property
    def sizes(self) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
        """What targets and contexts can be."""
        o = self.config.objective
        targets = block_sizes(self.grid, o.block_scale, o.block_aspect)
        return tuple(targets), tuple(block_sizes(self.grid, o.context_scale, (1.0, 1.0)))

    def blocks(self, begin: int) -> Blocks:
        """Sizes of the blocks of the global batch that begins at sample `begin`."""
        c = self.config
        return batch_blocks(c.seed, begin, c.train.global_batch, self.grid, c.objective.blocks, *self.sizes)

    def tokens(self, blocks: Blocks | None = None) -> Tokens:
        """The sizes that formulas need: of these blocks, or means over the first global batches."""
        o, registers, patches = self.config.objective, self.config.model.registers, self.grid[0] * self.grid[1]
        dim = FAMILY[self.config.model.size].dim
        if blocks is None:
            m, kept = typical(self.config.train.global_batch, self.grid, o.blocks, *self.sizes)
        else:
            m, kept = blocks.target[0] * blocks.target[1], blocks.kept
        return Tokens(
            patches, 1, registers + patches, m, dim, dim, visible=registers + kept, class_token=False,
            registers=registers, blocks=o.blocks,
        )  # fmt: skip

    def conflicts(self) -> Iterator[Problem]:
        """What keys of the configuration cannot be together under this objective."""
        c, o = self.config, self.config.objective
        yield from position_conflicts(c, self.encodings)
        yield from decoder_conflicts(c, "predictor")
        if c.train.compile:  # a new length is compiled again, up to a limit; beyond it nothing is
            text = "false: blocks change their length with every batch"
            yield Problem("train.compile", True, text, others=("objective.name",))
        if o.momentum[0] > o.momentum[1]:
            yield Problem("objective.momentum", o.momentum, "[first, last] with first <= last")
        yield from self.block_conflicts()

    def block_conflicts(self) -> Iterator[Problem]:
        """Blocks must exist in this grid, and the targets, wherever they lie, leave something of the context."""
        c, o, sides = self.config, self.config.objective, ("data.image_size", "model.patch")
        ranges = {f"objective.{key}": getattr(o, key) for key in ("block_scale", "block_aspect", "context_scale")}
        if turned := {key: ends for key, ends in ranges.items() if ends[0] > ends[1]}:
            yield from (Problem(key, list(ends), "[low, high] with low <= high") for key, ends in turned.items())
            return
        if c.data.image_size % c.model.patch:
            return  # there is no grid
        targets, contexts = self.sizes
        for key, found in (("block_scale", targets), ("context_scale", contexts)):
            if not found:
                text = f"a range in which a block of the {self.grid[0]}x{self.grid[1]} patches lies"
                shape = ("objective.block_aspect",) if key == "block_scale" else ()
                yield Problem(f"objective.{key}", getattr(o, key), text, others=(*shape, *sides))
        if targets and contexts:
            largest, smallest = max(h * w for h, w in targets), min(h * w for h, w in contexts)
            if smallest <= o.blocks * largest:
                text = f"fewer or smaller ones: {o.blocks} of {largest} patches can cover a context of {smallest}"
                scales = ("objective.block_scale", "objective.context_scale")
                yield Problem("objective.blocks", o.blocks, text, others=(*scales, *sides))

    def build_model(self) -> JointEmbedding:
        """Encoder, teacher and predictor; the predictor's keys are those of the decoder."""
        model, d = self.config.model, self.config.model.decoder
        encoder, teacher = build_encoder(self.config), build_encoder(self.config)
        return JointEmbedding(encoder, teacher, d.width, d.depth, d.heads, model.attention)

    @torch.no_grad()
    def prepare(self, images: Tensor, positions: Tensor, begin: int = 0) -> LatentInputs:
        """Blocks of a micro-batch of the global batch that begins at `begin`: images [B, C, S, S], positions [B]."""
        c = self.config
        context, targets = multi_block(c.seed, positions, self.grid, c.objective.blocks, self.blocks(begin))
        return LatentInputs((images, context, targets))

    def loss(self, prediction: Any, inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Smooth-L1, mean over all values, in fp32."""
        predicted, target = prediction
        return F.smooth_l1_loss(predicted.float(), target), {}

    def compared(self, prediction: Any, inputs: Any) -> tuple[Tensor, Tensor]:
        """What the loss compares: predicted and target values, both [B, T, m, dim]."""
        predicted, target = prediction
        return predicted, target

    def momentum(self, position: int) -> float:
        """What the teacher keeps of itself in the update that follows `position` samples."""
        (first, last), train = self.config.objective.momentum, self.config.train
        kept = first + (last - first) * min(1.0, position / train.samples)
        return float(kept ** (train.global_batch / self.config.optim.reference_batch))


@lru_cache(maxsize=64)
def typical(
    batch: int,
    grid: tuple[int, int],
    count: int,
    targets: tuple[tuple[int, int], ...],
    contexts: tuple[tuple[int, int], ...],
) -> tuple[int, int]:
    """Patches of a target block and of a context, means over a few global batches, rounded."""
    drawn = [batch_blocks(0, n * batch, batch, grid, count, targets, contexts) for n in range(TYPICAL)]
    areas = [b.target[0] * b.target[1] for b in drawn]
    return round(sum(areas) / TYPICAL), round(sum(b.kept for b in drawn) / TYPICAL)
