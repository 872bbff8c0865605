"""What is hidden. Masks are addressed: a pure function of (seed, position of the sample in the run)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shards.addressed import permutation


class Masks(NamedTuple):
    """`patch_ids` int64 [B, W, n]: raster ids of each window; `masked` int64 [B, W, m]: hidden slots of the n."""

    patch_ids: Tensor
    masked: Tensor

    @property
    def asked(self) -> Tensor:
        """Slots that are predicted, int64 [B, W, m]: the hidden ones, or all n where nothing is hidden."""
        if self.masked.shape[-1]:
            return self.masked
        return torch.arange(self.patch_ids.shape[-1], device=self.patch_ids.device).expand_as(self.patch_ids)


def window_patch_ids(tops: Tensor, lefts: Tensor, window: int, grid_width: int) -> Tensor:
    """Raster ids of square windows in raster order: tops, lefts [B, W] → [B, W, window²]."""
    steps = torch.arange(window, device=tops.device)
    rows, cols = tops[..., None] + steps, lefts[..., None] + steps
    return (rows[..., :, None] * grid_width + cols[..., None, :]).flatten(-2)


def local_windows(
    seed: int,
    positions: Tensor,
    grid: tuple[int, int],
    window: int,
    count: int,
    mask_ratio: float,
    shared_by: int | None = None,
) -> Masks:
    """`count` windows per image with distinct rows and distinct columns, and a mask of its own in each window.

    positions int64 [B]. `shared_by=global_batch` gives all images of one global batch the same windows, as published
    (each image sees all of them; the published pairing slip is not repeated).
    """
    batch = positions.shape[0]
    where = positions if shared_by is None else positions // shared_by
    tops = permutation(seed, "window-top", where, grid[0] - window + 1)[:, :count]
    lefts = permutation(seed, "window-left", where, grid[1] - window + 1)[:, :count]
    tokens = window * window
    each = (positions[:, None] * count + torch.arange(count, device=positions.device)).flatten()
    order = permutation(seed, "mask", each, tokens).view(batch, count, tokens)
    masked = order[..., : int(tokens * mask_ratio)].sort(-1).values
    return Masks(window_patch_ids(tops, lefts, window, grid[1]), masked)


def random_patches(seed: int, positions: Tensor, grid: tuple[int, int], mask_ratio: float) -> Masks:
    """One window that is the whole grid, of which `visible_patches` stay and random others are hidden."""
    every, tokens = whole_image(positions, grid), grid[0] * grid[1]
    order = permutation(seed, "mask-image", positions, tokens)
    masked = order[:, visible_patches(tokens, mask_ratio) :].sort(-1).values
    return Masks(every.patch_ids, masked[:, None])


def visible_patches(tokens: int, mask_ratio: float) -> int:
    """How many patches of an image MAE leaves visible: the share rounded down."""
    return int(tokens * (1 - mask_ratio))


def whole_image(positions: Tensor, grid: tuple[int, int]) -> Masks:
    """Nothing is hidden: one window that is the whole grid, for each of the samples at `positions` int64 [B]."""
    every = torch.arange(grid[0] * grid[1], device=positions.device).repeat(positions.shape[0], 1, 1)
    return Masks(every, every[..., :0])
