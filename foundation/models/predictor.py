"""Prediction in latent space: what a teacher sees at hidden places, from what an encoder sees elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foundation.models.position import sincos
from foundation.models.vit import Block, ViT


class Predictor(nn.Module):
    """I-JEPA's predictor (arXiv 2301.08243): a narrow transformer over context tokens and mask tokens of one block.

    `forward(context [B, n, dim], at int64 [B, n], wanted int64 [B, T, m], grid)` → [B, T, m, dim]: each of T target
    blocks is predicted in a pass of its own. `at` and `wanted` are raster ids of patches in `grid`.
    """

    def __init__(self, dim: int, width: int, depth: int, heads: int, attention: str = "auto") -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, heads, attention, False, 0) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pred = nn.Linear(width, dim)

    def forward(self, context: Tensor, at: Tensor, wanted: Tensor, grid: tuple[int, int]) -> Tensor:
        """Predictions of the wanted patches."""
        batch, count, m = wanted.shape
        seen = self.embed(context)
        places = sincos(grid, seen.shape[-1], seen.device, seen.dtype)[0]
        seen = seen + places[at]
        hidden = self.mask_token.to(seen.dtype) + places[wanted]
        x = torch.cat([seen[:, None].expand(-1, count, -1, -1), hidden], dim=2).flatten(0, 1)
        for block in self.blocks:
            x = block(x, (1, x.shape[1]))
        return self.pred(self.norm(x[:, -m:])).view(batch, count, m, -1)


class JointEmbedding(nn.Module):
    """I-JEPA's frame: an encoder of the context, a predictor, and a teacher of the whole image that nobody trains.

    `teacher` is an encoder of the same shape; it follows `encoder` as a running average (`engine.follow`). It is part
    of the model so that engines spread it like the rest.
    """

    judged = "teacher"
    """Whose features stand for the model, as published."""

    def __init__(self, encoder: ViT, teacher: ViT, width: int, depth: int, heads: int, attention: str = "auto") -> None:
        super().__init__()
        self.encoder, self.teacher = encoder, teacher.requires_grad_(False)
        self.predictor = Predictor(encoder.dim, width, depth, heads, attention)

    def forward(self, images: Tensor, context: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """images [B, C, H, W], ids int64 [B, n] and [B, T, m] → predictions and fp32 targets, [B, T, m, dim] each.

        A target is the teacher's token after a LayerNorm without weights, in fp32.
        """
        grid, dim = self.encoder.grid(images), self.encoder.dim
        with torch.no_grad():
            whole = self.teacher.forward_features(images)[:, self.teacher.prefix :]
            whole = F.layer_norm(whole.float(), (dim,))
            wanted = gathered(whole, targets.flatten(1)).view(*targets.shape, dim)
        tokens = gathered(self.encoder.embed(images), context)
        seen = self.encoder.encode(tokens, (1, tokens.shape[1]))[:, self.encoder.prefix :]
        return self.predictor(seen, context, targets, grid), wanted


def gathered(tokens: Tensor, ids: Tensor) -> Tensor:
    """The tokens of these patches: [B, N, dim], int64 [B, n] → [B, n, dim]."""
    return tokens.gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[-1]))
