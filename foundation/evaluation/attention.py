"""Attention distance: how far, in pixels, each head looks."""

from __future__ import annotations

import torch
from torch import Tensor

from foundation.models.vit import ViT


def token_distances(grid: tuple[int, int], patch: int) -> Tensor:
    """Euclidean distance in pixels between the tokens of a `grid` (rows, columns): fp32 [N, N], raster order."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    at = torch.stack([rows.flatten(), columns.flatten()], 1).float() * patch
    return torch.cdist(at, at, compute_mode="donot_use_mm_for_euclid_dist")


def attention_distance(attention: Tensor, grid: tuple[int, int], patch: int, cls_tokens: int = 1) -> Tensor:
    """Distance of each head in pixels: attention [B, H, T, T] with T = cls_tokens + N → fp32 [B, H].

    Rows and columns of the `cls_tokens` in front are dropped and the rest is not renormalised (as published), so what a
    head gives to them counts as distance 0. Sum over keys of attention · distance, mean over queries.
    """
    rest = attention[..., cls_tokens:, cls_tokens:].float()
    return (rest * token_distances(grid, patch).to(rest.device)).sum(-1).mean(-1)


@torch.no_grad()
def attention_distances(encoder: ViT, images: Tensor) -> Tensor:
    """Distances of every head of an encoder with `attention_maps`: images [B, C, H, W] → fp32 [blocks, B, heads], CPU.

    One block's attention is held at a time; the encoder is used in evaluation mode and its mode restored.
    """
    grid = (images.shape[-2] // encoder.patch, images.shape[-1] // encoder.patch)
    was_training = encoder.training
    encoder.eval()
    try:
        maps, where = encoder.attention_maps(images), (grid, encoder.patch, encoder.prefix)
        return torch.stack([attention_distance(attention, *where).cpu() for attention in maps])
    finally:
        encoder.train(was_training)
