"""Our encoders as timm models: `timm.create_model("sar_vit_base_patch16_224")` after `import foundation`.

Images are amplitudes in [0, 1] of one channel, of any size that the patch divides: mean 0 and standard deviation 1 in
`pretrained_cfg`. Tensors have the names of `foundation.models.vit.ViT`, and `head.weight`, `head.bias` with classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from foundation.models.families import FAMILY
from foundation.models.initialise import initialise
from foundation.models.vit import ViT
from foundation.timm_registry import PATCHES, name

__all__: list[str] = []  # timm adds the names of the family
POOLS = ("", "token", "avg")
_PROJ = "patch_embed.proj.weight"


class SarViT(ViT):
    """Our encoder with the methods that timm and frameworks above it call, and a linear classifier if asked for.

    `global_pool` is `token` (class token), `avg` (mean of the patch tokens, after the norm as everywhere here) or
    nothing. `seed` gives the initial weights; `options` go to `ViT`. Raises ValueError for what no such encoder has.
    """

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        patch_size: int,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 1,
        num_classes: int = 0,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(embed_dim, depth, num_heads, patch_size, in_chans, **options)
        sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if sides[0] % patch_size or sides[1] % patch_size:
            raise ValueError(f"img_size {sides[0]}x{sides[1]} is not divisible into patches of {patch_size} pixels")
        self.num_features = self.embed_dim = self.head_hidden_size = embed_dim
        self.in_chans, self.num_prefix_tokens, self.grad_checkpointing = in_chans, self.prefix, False
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": patch_size} for i in range(depth)
        ]
        self.global_pool = global_pool
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        if not self.patch_embed.proj.weight.is_meta:
            initialise(self, seed)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Another classifier, with 0 classes none: the model returns features then."""
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in POOLS:
            raise ValueError(f"global_pool {pool!r} is not possible; allowed: {', '.join(map(repr, POOLS))}")
        if pool == "token" and not self.class_tokens:
            raise ValueError("global_pool 'token' needs a class token, which this encoder does not have: use 'avg'")
        self.num_classes, self.global_pool = num_classes, pool
        like = self.patch_embed.proj.weight
        self.head: nn.Module = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.dim, num_classes, device=like.device, dtype=like.dtype)

    def get_classifier(self) -> nn.Module:
        """The layer behind the pooled features."""
        return self.head

    def no_weight_decay(self) -> set[str]:
        """Parameters that should not decay: tokens and tables of positions."""
        return {n for n, _ in self.named_parameters() if n.endswith(("token", "table"))}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of names for learning rates by depth: stem, blocks, norm."""
        return {
            "stem": r"^cls_token|^register|^patch_embed",
            "blocks": r"^blocks\.(\d+)" if coarse else [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks are computed again in backward."""
        self.grad_checkpointing = enable

    def states(self, tokens: Tensor, grid: tuple[int, int]) -> Iterator[Tensor]:
        """The sequence [B, prefix + N, dim] behind each block."""
        x = self.prefixed(tokens)
        for block in self.blocks:
            again = self.grad_checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x, grid, use_reentrant=False) if again else block(x, grid)
            yield x

    def encode(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """As `ViT.encode`."""
        x = tokens
        for x in self.states(tokens, grid):  # noqa: B007  # the last one counts
            pass
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, prefix + N, dim] → logits [B, classes], or pooled features [B, dim]; unpooled where asked for."""
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, self.prefix :].mean(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] → logits [B, classes], or pooled features [B, dim] without a classifier."""
        return self.forward_head(self.forward_features(images))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Patches behind the blocks `indices` (the last n, or these), [B, dim, h, w] each or NLC [B, h·w, dim].

        `norm` sends them through the final norm. With `return_prefix_tokens` each is a pair with the tokens in front.
        Returns them alone (`intermediates_only`) or (final tokens, list).
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt {output_fmt!r} is not possible; allowed: NCHW, NLC")
        chosen = indices if indices is None or isinstance(indices, int) else list(indices)
        wanted, last = feature_take_indices(len(self.blocks), chosen)
        grid, found, state = self.grid(x), [], x
        for i, state in enumerate(self.states(self.embed(x), grid)):
            if i in wanted:
                seen = self.norm(state) if norm else state
                patches = seen[:, self.prefix :]
                if output_fmt == "NCHW":
                    patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()
                found.append((patches, seen[:, : self.prefix]) if return_prefix_tokens else patches)
            if stop_early and intermediates_only and i == last:
                break
        return found if intermediates_only else (self.norm(state), found)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what features of the blocks `indices` do not need; returns the indices as counted from the first."""
        wanted, last = feature_take_indices(len(self.blocks), indices if isinstance(indices, int) else list(indices))
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()  # type: ignore[assignment]
        if prune_head:
            self.reset_classifier(0, "")
        return wanted


def adapted(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Pretrained tensors for a model with other channels, so that an image that is repeated has the same features.

    One channel to n: each gets an n-th of the weights; n to one: their sum. Raises ValueError for any other change.
    """
    ours, (have, want) = dict(state), (state[_PROJ].shape[1], model.get_parameter(_PROJ).shape[1])
    if have == want:
        return ours
    if 1 not in (have, want):
        raise ValueError(f"weights of {have} channels cannot be adapted to in_chans={want}: use {have} or 1")
    weight = state[_PROJ].sum(1, keepdim=True)
    ours[_PROJ] = weight.expand(-1, want, -1, -1) / want
    return ours


def _cfg(channels: int = 1) -> dict[str, Any]:
    """The input convention, and the parts that timm adapts; channels are adapted by `adapted`."""
    return {
        "input_size": (channels, 224, 224),
        "mean": (0.0,) * channels,
        "std": (1.0,) * channels,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "num_classes": 0,
        "first_conv": None,
        "classifier": "head",
    }


_NAMES = {name(size, patch): (row, patch) for size, row in FAMILY.items() for patch in PATCHES}
default_cfgs = generate_default_cfgs({architecture: _cfg() for architecture in _NAMES})


def _entry(architecture: str) -> Callable[..., nn.Module]:
    row, patch = _NAMES[architecture]

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        sizes: dict[str, Any] = {"embed_dim": row.dim, "depth": row.depth, "num_heads": row.heads, "patch_size": patch}
        return build_model_with_cfg(
            SarViT,
            architecture,
            pretrained,
            pretrained_filter_fn=adapted,
            feature_cfg={"out_indices": min(4, row.depth), "feature_cls": "getter"},
            **(sizes | kwargs),
        )

    create.__name__ = create.__qualname__ = architecture
    create.__doc__ = f"Width {row.dim}, {row.depth} blocks, {row.heads} heads, patches of {patch} pixels."
    return create


for _architecture in _NAMES:
    register_model(_entry(_architecture))
