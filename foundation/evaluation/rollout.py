"""Attention roll-out: which patches the answer of an encoder comes from (Abnar and Zuidema, arXiv 2005.00928)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from foundation.models.vit import ViT


def rollout(attentions: Iterable[Tensor]) -> Tensor:
    """How much of each input token there is in each output token: maps [B, H, T, T] block by block → fp32 [B, T, T].

    The mean of the heads, half of it the token itself (the residual path: A/2 + I/2), rows made to sum to 1, and the
    product over the blocks, the last one leftmost. Rows of the result sum to 1. Raises ValueError without a block.
    """
    total: Tensor | None = None
    for attention in attentions:
        mixed = attention.float().mean(1)
        mixed = mixed + torch.eye(mixed.shape[-1], device=mixed.device)
        mixed = mixed / mixed.sum(-1, keepdim=True)
        total = mixed if total is None else mixed @ total
    if total is None:
        raise ValueError("a roll-out needs the attention of at least one block")
    return total


def patch_share(rolled: Tensor, grid: tuple[int, int], prefix: int, class_token: bool = True) -> Tensor:
    """Share of each patch in the answer: `rolled` [B, T, T] with T = prefix + h·w → fp32 [B, h, w], which sum to 1.

    The answer is the class token, which stands first of `prefix` tokens, or else the mean of all patches. What comes
    from tokens of the prefix is left out.
    """
    queries = rolled[:, :1] if class_token else rolled[:, prefix:]
    share = queries[..., prefix:].mean(1)
    return (share / share.sum(-1, keepdim=True)).unflatten(-1, grid)


@torch.no_grad()
def rollout_maps(encoder: ViT, images: Tensor) -> Tensor:
    """Share of each patch in the features of an encoder: images fp32 [B, C, H, W] → fp32 [B, h, w], CPU.

    One block's attention is held at a time; the encoder is used in evaluation mode and its mode restored.
    """
    was_training = encoder.training
    encoder.eval()
    try:
        rolled = rollout(encoder.attention_maps(images))
        return patch_share(rolled, encoder.grid(images), encoder.prefix, bool(encoder.class_tokens)).cpu()
    finally:
        encoder.train(was_training)
