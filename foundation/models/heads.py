"""Heads that turn encoder tokens into predictions of a target."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foundation.models.position import sincos
from foundation.models.vit import Block, ViT


class Decoder(nn.Module):
    """Narrow transformer and a linear layer: [B, prefix + n, dim] → predictions [B, m, out] of the chosen tokens.

    `prefix` is 1 with a class token and 0 without; an encoder's registers do not come here.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        depth: int,
        heads: int,
        out: int,
        attention: str = "auto",
        relative: bool = True,
        prefix: int = 1,
    ) -> None:
        super().__init__()
        self.heads, self.prefix = heads, prefix
        self.embed = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(Block(width, heads, attention, relative, prefix) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pred = nn.Linear(width, out)

    def forward(self, tokens: Tensor, grid: tuple[int, int], wanted: Tensor | None = None) -> Tensor:
        """`wanted` int64 [B, m] are the patch slots to predict (all of them when None); the class token has none."""
        return self.decode(self.embed(tokens), grid, wanted)

    def decode(self, x: Tensor, grid: tuple[int, int], wanted: Tensor | None = None) -> Tensor:
        """`forward` behind the projection: [B, prefix + n, width] → [B, m, out]."""
        for block in self.blocks:
            x = block(x, grid)
        return self.pred(self.norm(chosen(x, wanted, self.prefix)))


class LinearHead(nn.Module):
    """One linear layer: [B, prefix + n, dim] → predictions [B, m, out] of the chosen tokens."""

    def __init__(self, dim: int, out: int, prefix: int = 1) -> None:
        super().__init__()
        self.prefix = prefix
        self.pred = nn.Linear(dim, out)

    def forward(self, tokens: Tensor, grid: tuple[int, int], wanted: Tensor | None = None) -> Tensor:
        """As `Decoder`: `wanted` int64 [B, m] are the patch slots to predict, all of them when None."""
        return self.pred(chosen(tokens, wanted, self.prefix))


def chosen(tokens: Tensor, wanted: Tensor | None, prefix: int = 1) -> Tensor:
    """The tokens of the patch slots `wanted` int64 [B, m], of all when None: [B, prefix + n, dim] → [B, m, dim]."""
    patches = tokens[:, prefix:]
    if wanted is None:
        return patches
    return patches.gather(1, wanted[:, :, None].expand(-1, -1, patches.shape[-1]))


class MaskedWindowModel(nn.Module):
    """LoMaR's frame: mask tokens enter the encoder, every window is a small image of its own.

    `forward(images [B, C, H, W], patch_ids [B, W, n], masked [B, W, m])` → [B, W, m, out]. `patch_ids` are the raster
    ids of the patches of each square window, `masked` the slots among the n that are hidden; both int64. Where nothing
    is hidden (m = 0) all n slots are predicted. A decoder of `depth` 0 is a linear layer, LoMaR's head.
    """

    def __init__(self, encoder: ViT, width: int, depth: int, heads: int, out: int, attention: str = "auto") -> None:
        super().__init__()
        self.encoder = encoder
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.dim))
        self.decoder: Decoder | LinearHead = LinearHead(encoder.dim, out, encoder.class_tokens)
        if depth:
            same = attention, encoder.relative, encoder.class_tokens
            self.decoder = Decoder(encoder.dim, width, depth, heads, out, *same)

    def forward(self, images: Tensor, patch_ids: Tensor, masked: Tensor, predict_all: bool = False) -> Tensor:
        """Predictions of the masked slots in the order of `masked`, or of all n slots with `predict_all`."""
        batch, windows, n = patch_ids.shape
        tokens = self.encoder.embed(images)
        tokens = tokens.gather(1, patch_ids.view(batch, -1, 1).expand(-1, -1, tokens.shape[-1]))
        tokens = tokens.view(batch * windows, n, -1)
        hidden = masked.view(batch * windows, -1)
        mask = torch.zeros(batch * windows, n, 1, dtype=torch.bool, device=images.device)
        mask = mask.scatter(1, hidden[:, :, None], True)
        tokens = torch.where(mask, self.mask_token.to(tokens.dtype), tokens)
        side = round(n**0.5)
        encoded = self.encoder.without_registers(self.encoder.encode(tokens, (side, side)))
        predicted = self.decoder(encoded, (side, side), None if predict_all or not hidden.shape[1] else hidden)
        return predicted.view(batch, windows, -1, predicted.shape[-1])


class FusedWindowModel(MaskedWindowModel):
    """`MaskedWindowModel` of which the target's maps are fused by weights that are trained with it.

    `forward` returns predictions [B, W, m, out] and the weights of the maps, fp32 [maps]: a softmax, at first equal.
    """

    def __init__(self, encoder: ViT, width: int, depth: int, heads: int, out: int, attention: str, maps: int) -> None:
        super().__init__(encoder, width, depth, heads, out, attention)
        self.fusion = nn.Parameter(torch.zeros(maps))

    def forward(  # type: ignore[override]  # the weights have to come out of forward, where engines have them whole
        self, images: Tensor, patch_ids: Tensor, masked: Tensor, predict_all: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Predictions as in `MaskedWindowModel`, and the softmax of the weights."""
        return super().forward(images, patch_ids, masked, predict_all), self.fusion.float().softmax(0)


class MaskedImageModel(nn.Module):
    """MAE's frame: the encoder sees visible patches alone, mask tokens stand for the others in the decoder.

    `forward(images [B, C, H, W], patch_ids [B, 1, N], masked [B, 1, m])` → [B, 1, m, out], arguments as those of
    `MaskedWindowModel` for one window that is the image: `patch_ids` int64 are all N patches in raster order, `masked`
    int64 those that are hidden. Positions are fixed, in the encoder and in the decoder.
    """

    def __init__(self, encoder: ViT, width: int, depth: int, heads: int, out: int, attention: str = "auto") -> None:
        super().__init__()
        self.encoder = encoder
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder = Decoder(encoder.dim, width, depth, heads, out, attention, False, encoder.class_tokens)

    def forward(self, images: Tensor, patch_ids: Tensor, masked: Tensor, predict_all: bool = False) -> Tensor:
        """Predictions of the masked patches in the order of `masked`, or of all N with `predict_all`."""
        (batch, _, n), hidden = patch_ids.shape, masked[:, 0]
        mask = torch.zeros(batch, n, dtype=torch.int8, device=images.device).scatter(1, hidden, 1)
        # How many are visible is known from the shapes: nothing asks the device.
        visible = mask.argsort(dim=1, stable=True)[:, : n - hidden.shape[1], None]
        tokens = self.encoder.embed(images)
        tokens = tokens.gather(1, visible.expand(-1, -1, tokens.shape[-1]))
        encoded = self.encoder.without_registers(self.encoder.encode(tokens, (1, tokens.shape[1])))
        seen, classes = self.decoder.embed(encoded), self.encoder.class_tokens
        width, grid = seen.shape[-1], self.encoder.grid(images)
        patches = self.mask_token.to(seen.dtype).expand(batch, n, -1)
        patches = patches.scatter(1, visible.expand(-1, -1, width), seen[:, classes:])
        patches = patches + sincos(grid, width, seen.device, seen.dtype)
        x = torch.cat([seen[:, :classes], patches], dim=1)
        return self.decoder.decode(x, grid, None if predict_all else hidden)[:, None]
