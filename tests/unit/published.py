"""Models of this project under the published names, and reference files made with them, by formulas of their own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from foundation.models.heads import MaskedWindowModel
from foundation.models.vit import ViT
from kernels.gradient_ratio.reference import reference as gradient_ratio

_NAMES = (
    (r"^encoder\.", ""),
    (r"^decoder\.embed\.", "encoder_pred."),
    (r"^decoder\.(blocks|norm|pred)\.", r"decoder_\1."),
    (r"\.attn\.rpe\.table$", ".attn.rpe_k.lookup_table_weight"),
    (r"\.(fc[12])\.", r".mlp.\1."),
)


class Shape(NamedTuple):
    """The keys of `config` in a reference file of one step."""

    img_size: int = 48
    patch: int = 8
    dim: int = 24
    depth: int = 1
    heads: int = 3
    ddim: int = 16
    ddepth: int = 2
    dheads: int = 2
    n: int = 3
    nw: int = 2
    ws: int = 4
    mr: float = 0.6


def published_name(ours: str) -> str:
    """The published name of one of our tensors."""
    for pattern, theirs in _NAMES:
        ours = re.sub(pattern, theirs, ours)
    return ours


def published_state(model: nn.Module, tokens: int = 196) -> dict[str, Tensor]:
    """The state dict as a published checkpoint has it, with the sin-cos table that is never used."""
    state = {published_name(name): tensor for name, tensor in model.state_dict().items()}
    return {**state, "pos_embed": torch.zeros(1, tokens + 1, state["cls_token"].shape[-1])}


def random_model(s: Shape, attention: str = "reference") -> MaskedWindowModel:
    """A model of this shape with four target maps; its position tables are not zero, so that they count."""
    encoder = ViT(s.dim, s.depth, s.heads, s.patch, 1, attention)
    model = MaskedWindowModel(encoder, s.ddim, s.ddepth, s.dheads, 4 * s.patch**2, attention)
    for name, parameter in model.named_parameters():
        if name.endswith("table"):
            nn.init.normal_(parameter, std=0.5)
    return model


def write_reference(folder: Path, s: Shape, seed: int = 0) -> Path:
    """`sarjepa_pretrain_step.npz` and `classifier.npz` of a random model; rows are window-major, as published."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    model, grid, tokens = random_model(s), s.img_size // s.patch, s.ws**2
    images = rng.integers(0, 256, (s.n, 1, s.img_size, s.img_size), dtype=np.uint8)
    rows, places = s.n * s.nw, grid - s.ws + 1
    top, left = rng.integers(0, places, rows), rng.integers(0, places, rows)
    step = np.arange(s.ws)
    ids = (top[:, None, None] + step[:, None]) * grid + left[:, None, None] + step
    ids = ids.reshape(rows, tokens)
    hidden = np.sort(rng.permuted(np.tile(np.arange(tokens), (rows, 1)), axis=1)[:, : int(tokens * s.mr)], axis=1)
    mask = np.zeros((rows, tokens), dtype=bool)
    np.put_along_axis(mask, hidden, True, axis=1)

    x = torch.from_numpy(images).float() / 255
    image_of_row = torch.arange(rows) % s.n
    one_window = torch.from_numpy(ids)[:, None]
    pred = model(x[image_of_row], one_window, torch.from_numpy(hidden)[:, None], predict_all=True)[:, 0]
    maps = gradient_ratio(x, (5, 9, 13, 17), 0.01, "include")
    cut = maps.unfold(2, s.patch, s.patch).unfold(3, s.patch, s.patch)  # [N, 4, rows, columns, patch, patch]
    target = cut.permute(0, 2, 3, 1, 4, 5).reshape(s.n, grid * grid, -1)[image_of_row[:, None], torch.from_numpy(ids)]
    loss = ((pred - target) ** 2).mean(-1)[torch.from_numpy(mask)].mean()
    loss.backward()
    norms = {published_name(n): float(p.grad.norm()) for n, p in model.named_parameters() if p.grad is not None}
    arrays = {
        "images": images,
        "patch_ids": ids.astype(np.int16),
        "mask": mask,
        "pred": pred.detach().numpy(),
        "loss": np.float64(loss.item()),
        "config": np.array(json.dumps(s._asdict())),
        "grad_norms": np.array(json.dumps(norms)),
        **{f"state/{name}": tensor.numpy() for name, tensor in published_state(model, grid * grid).items()},
    }
    np.savez(folder / "sarjepa_pretrain_step.npz", **arrays)
    np.savez(folder / "classifier.npz", **_classifier(model.encoder, x, rng))
    return folder


@torch.no_grad()
def _classifier(encoder: ViT, x: Tensor, rng: np.random.Generator) -> dict[str, Any]:
    weight, bias = rng.normal(size=(5, encoder.dim)).astype(np.float32), rng.normal(size=5).astype(np.float32)
    features = encoder.forward_features(x)[:, 0].numpy()
    height, width = encoder.grid(x)
    at = np.stack(np.divmod(np.arange(height * width), width), 1) * encoder.patch
    distance = np.hypot(*(at[:, None] - at[None]).transpose(2, 0, 1))
    maps = np.stack([a.numpy() for a in encoder.attention_maps(x)])[..., 1:, 1:]
    return {
        "head_weight": weight,
        "head_bias": bias,
        "cls_features": features,
        "logits": features @ weight.T + bias,
        "mean_attention_distance": (maps * distance).sum(-1).mean(-1),
    }
