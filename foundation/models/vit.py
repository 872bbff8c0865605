"""The ViT encoder: full images of any size and local windows run through the same blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foundation.models.attention import Attention
from foundation.models.layers import PLAIN, LayerScale, Options
from foundation.models.position import LearnedPositions, sincos


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)), by default with GELU and ratio 4."""

    shard_unit = True  # recomputed, compiled and sharded as one

    def __init__(
        self,
        dim: int,
        heads: int,
        backend: str = "auto",
        relative: bool = True,
        prefix: int = 1,
        options: Options = PLAIN,
    ) -> None:
        super().__init__()
        self.gated, hidden, scale = options.mlp == "swiglu", options.hidden(dim), options.layer_scale
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, backend, relative, prefix, options.qk_norm)
        self.ls1 = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.fc1 = nn.Linear(dim, hidden * (1 + self.gated))
        self.fc2 = nn.Linear(hidden, dim)
        self.ls2 = nn.Identity() if scale is None else LayerScale(dim, scale)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, L, dim] → [B, L, dim]."""
        x = x + self.ls1(self.attn(self.norm1(x), grid))
        return x + self.ls2(self.fc2(self.activation(self.fc1(self.norm2(x)))))

    def activation(self, x: Tensor) -> Tensor:
        """Between the products of the MLP: [..., hidden], of swiglu [..., 2 hidden], → [..., hidden]."""
        if not self.gated:
            return F.gelu(x)
        gate, value = x.chunk(2, -1)
        return F.silu(gate) * value


class Projection(nn.Conv2d):
    """A convolution whose initial weights are multiplied by `gain`."""

    gain = 1.0


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens: [B, C, H, W] → [B, H/p · W/p, dim] in raster order."""

    def __init__(self, patch: int, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = Projection(channels, dim, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        """Tokens in the images' raster order."""
        return self.proj(images).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """Vision transformer. `positions`: relative (iRPE in every block), sincos (fixed) or learned, both added once.

    Learned positions are those of `grid`, and resized for images of another. `options` are those of the blocks.

    In front of the patches stand `prefix` tokens: the class token, if there is one, and `registers`, learnt tokens that
    carry no patch and are read by nobody (Darcet et al., arXiv 2309.16588). Prefix tokens have no fixed position.
    Images are fp32 [B, C, H, W] in [0, 1] with sides divisible by `patch`.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        patch: int = 16,
        channels: int = 1,
        attention: str = "auto",
        positions: str = "relative",
        class_token: bool = True,
        registers: int = 0,
        options: Options = PLAIN,
        grid: tuple[int, int] = (14, 14),
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} is not divisible by {heads} heads")
        self.dim, self.depth, self.heads, self.patch, self.channels = dim, depth, heads, patch, channels
        self.relative = positions == "relative"
        self.patch_embed = PatchEmbed(patch, channels, dim)
        self.class_tokens, self.prefix = int(class_token), int(class_token) + registers
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.register_token = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        self.pos_embed = LearnedPositions(grid, dim) if positions == "learned" else None
        same = dim, heads, attention, self.relative, self.prefix, options
        self.blocks = nn.ModuleList(Block(*same) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Patches per column and row. Raises ValueError when a side is not divisible by the patch."""
        height, width = images.shape[-2:]
        if height % self.patch or width % self.patch:
            raise ValueError(f"image of {height}x{width} px is not divisible into {self.patch}-px patches")
        return height // self.patch, width // self.patch

    def embed(self, images: Tensor) -> Tensor:
        """Patch tokens [B, N, dim] of whole images, with their positions where these are added."""
        tokens = self.patch_embed(images)
        if self.relative:
            return tokens
        if self.pos_embed is not None:
            return tokens + self.pos_embed(self.grid(images)).to(tokens.dtype)
        return tokens + sincos(self.grid(images), self.dim, tokens.device, tokens.dtype)

    def prefixed(self, tokens: Tensor) -> Tensor:
        """Patch tokens [B, n, dim] → [B, prefix + n, dim]: class token, registers, patches."""
        first = [token.to(tokens.dtype) for token in (self.cls_token, self.register_token) if token is not None]
        return torch.cat([*(token.expand(tokens.shape[0], -1, -1) for token in first), tokens], dim=1)

    def encode(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patch tokens [B, h·w, dim] → [B, prefix + h·w, dim] after all blocks and the final norm."""
        x = self.prefixed(tokens)
        for block in self.blocks:
            x = block(x, grid)
        return self.norm(x)

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, C, H, W] → [B, prefix + N, dim], class token first."""
        return self.encode(self.embed(images), self.grid(images))

    def without_registers(self, tokens: Tensor) -> Tensor:
        """Encoder tokens [B, prefix + n, dim] → [B, classes + n, dim], what decoders take: `classes` is 1 or 0."""
        if self.prefix == self.class_tokens:
            return tokens
        return torch.cat([tokens[:, : self.class_tokens], tokens[:, self.prefix :]], dim=1)

    def pooled(self, tokens: Tensor) -> Tensor:
        """One vector per image: the class token of [B, prefix + n, dim], or without one the mean of the patches."""
        return tokens[:, 0] if self.class_tokens else tokens[:, self.prefix :].mean(1)

    def forward(self, images: Tensor) -> Tensor:
        """`pooled` features of full images: [B, C, H, W] → [B, dim]."""
        return self.pooled(self.forward_features(images))

    @torch.no_grad()
    def attention_maps(self, images: Tensor) -> Iterator[Tensor]:
        """Attention of each block in turn: [B, heads, prefix + N, prefix + N]."""
        grid = self.grid(images)
        x = self.prefixed(self.embed(images))
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block.attn.probabilities(block.norm1(x), grid)
            x = block(x, grid)
