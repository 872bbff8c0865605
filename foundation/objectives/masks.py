"""What is hidden. Masks are addressed: a pure function of (seed, position of the sample in the run)."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from shards.addressed import bits, permutation


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


class Blocks(NamedTuple):
    """Sizes that all images of one global batch share: known on the host, so that shapes wait for no device."""

    target: tuple[int, int]
    """height, width of every target block, patches"""
    context: tuple[int, int]
    """of the block that targets are cut out of"""
    kept: int
    """patches of the context that are left to every image"""


def block_sizes(
    grid: tuple[int, int], scale: tuple[float, float], aspect: tuple[float, float]
) -> list[tuple[int, int]]:
    """Heights and widths of which area / patches and height / width lie in these ranges, ends included."""
    patches, slack = grid[0] * grid[1], 1e-9
    return [
        (h, w)
        for h in range(1, grid[0] + 1)
        for w in range(1, grid[1] + 1)
        if scale[0] - slack <= h * w / patches <= scale[1] + slack and aspect[0] - slack <= h / w <= aspect[1] + slack
    ]


def in_block(tops: Tensor, lefts: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Patches of blocks whose corners are tops, lefts [...]: bool [..., h·w of the grid]."""
    rows, columns = (torch.arange(side, device=tops.device) for side in grid)
    inside_rows = (rows >= tops[..., None]) & (rows < tops[..., None] + size[0])
    inside_columns = (columns >= lefts[..., None]) & (columns < lefts[..., None] + size[1])
    return (inside_rows[..., :, None] & inside_columns[..., None, :]).flatten(-2)


def placed_blocks(
    seed: int, positions: Tensor, grid: tuple[int, int], count: int, target: tuple[int, int], context: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Where blocks lie, every place being equally likely: `count` target blocks of each sample, and its context.

    positions int64 [B] → raster ids of targets int64 [B, count, m], and bool [B, N]: the context block without targets.
    """
    tops, lefts = (
        bits(seed, f"block-{axis}", positions, count + 1) for axis in ("top", "left")
    )  # the last one is the context's
    rows, columns = tops[:, :-1] % (grid[0] - target[0] + 1), lefts[:, :-1] % (grid[1] - target[1] + 1)
    down, across = (torch.arange(side, device=positions.device) for side in target)
    ids = (rows[..., None] + down)[..., :, None] * grid[1] + (columns[..., None] + across)[..., None, :]
    hidden = in_block(rows, columns, target, grid).any(1)
    place = tops[:, -1] % (grid[0] - context[0] + 1), lefts[:, -1] % (grid[1] - context[1] + 1)
    return ids.flatten(2), in_block(*place, context, grid) & ~hidden


@lru_cache(maxsize=256)
def batch_blocks(
    seed: int,
    begin: int,
    batch: int,
    grid: tuple[int, int],
    count: int,
    targets: tuple[tuple[int, int], ...],
    contexts: tuple[tuple[int, int], ...],
) -> Blocks:
    """The sizes of the global batch that begins at sample `begin`, chosen among `targets` and `contexts`.

    Every sample of the batch is placed, on the CPU: the smallest context among them is what all are cut to, so that it
    depends neither on processes nor on micro-batches. (I-JEPA's collator takes the smallest of a process.)
    """
    draw = bits(seed, "block-size", torch.tensor([begin // batch], device="cpu"), 2)[0].tolist()
    target, context = targets[draw[0] % len(targets)], contexts[draw[1] % len(contexts)]
    _, free = placed_blocks(seed, torch.arange(begin, begin + batch, device="cpu"), grid, count, target, context)
    return Blocks(target, context, int(free.sum(1).min()))


def multi_block(
    seed: int, positions: Tensor, grid: tuple[int, int], count: int, blocks: Blocks
) -> tuple[Tensor, Tensor]:
    """Context and targets of samples of one global batch: int64 [B, kept] and [B, count, m], raster ids.

    The context is the block without the targets, of which `kept` patches stay, chosen by address (the published code
    keeps those that come first, which leaves the lower part of the images out).
    """
    targets, free = placed_blocks(seed, positions, grid, count, blocks.target, blocks.context)
    rank = permutation(seed, "context", positions, free.shape[1])
    rank = torch.where(free, rank, rank + free.shape[1])
    return rank.argsort(1)[:, : blocks.kept].sort(1).values, targets
