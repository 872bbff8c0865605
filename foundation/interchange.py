"""Encoders in and out: checkpoints of this trainer and published SAR-JEPA checkpoints, by their tensors' names."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError  # what torch.load raises when weights_only refuses a file; nothing is unpickled here
from typing import Any

import torch
from torch import Tensor

from foundation.config import Config, from_dict, to_dict
from foundation.errors import CheckpointError
from foundation.models.families import FAMILY, Row
from foundation.models.heads import Decoder, LinearHead, MaskedWindowModel
from foundation.models.initialise import initialise
from foundation.models.vit import ViT
from foundation.objectives.reconstruction import build_encoder
from foundation.training import checkpoint

# (pattern of a published name, ours). The published sin-cos table `pos_embed` is never added, so it is not kept.
_PUBLISHED = (
    (r"^encoder_pred\.", "decoder.embed."),
    (r"^decoder_blocks\.", "decoder.blocks."),
    (r"^decoder_norm\.", "decoder.norm."),
    (r"^decoder_pred\.", "decoder.pred."),
    (r"^(cls_token|patch_embed\.|blocks\.|norm\.)", r"encoder.\1"),
    (r"\.attn\.rpe_k\.lookup_table_weight$", ".attn.rpe.table"),
    (r"\.mlp\.(fc[12])\.", r".\1."),
)
_PIXELS = ("decoder.pred.weight", "decoder.pred.bias")
UNUSED = frozenset({"pos_embed"})
_DO = "save it again with torch.save({'model': state_dict}, path)"


def rename(published: str, linear: bool = False) -> str:
    """Our name of a published tensor; `linear` where `encoder_pred` is the head and not the way into a decoder."""
    if linear:
        published = re.sub(r"^encoder_pred\.", "decoder.pred.", published)
    for pattern, ours in _PUBLISHED:
        published = re.sub(pattern, ours, published)
    return published


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict under our names, without the tensors that the published code never uses."""
    linear = is_linear(state)
    ours = {rename(name, linear): tensor for name, tensor in state.items() if name not in UNUSED}
    if linear and "encoder.patch_embed.proj.weight" in ours:
        channels = ours["encoder.patch_embed.proj.weight"].shape[1]
        ours |= {name: by_channel(tensor, channels, 0) for name, tensor in ours.items() if name in _PIXELS}
    return ours


def by_channel(values: Tensor, channels: int, dim: int) -> Tensor:
    """Values of patches channel after channel, as here, from those pixel after pixel, as published: along `dim`."""
    dim %= values.ndim
    return values.unflatten(dim, (-1, channels)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def is_linear(published: Iterable[str]) -> bool:
    """Whether published names are those of a model without a decoder: LoMaR's."""
    return not any(name.startswith("decoder_") for name in published)


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.split(".")[prefix.count(".")] for name in state if name.startswith(prefix)})


def _blocks(state: Mapping[str, Tensor], prefix: str, dim: int) -> tuple[int, int]:
    """Depth and heads of a stack of blocks, the heads from the head size of its position table."""
    return _depth(state, prefix), dim // state[f"{prefix}0.attn.rpe.table"].shape[1]


def model_of(state: Mapping[str, Tensor], attention: str = "auto", where: str = "") -> MaskedWindowModel:
    """An empty model with the widths, depths and heads that the tensors of `state` (our names) show."""
    try:
        dim, channels, patch, _ = state["encoder.patch_embed.proj.weight"].shape
        depth, heads = _blocks(state, "encoder.blocks.", dim)
        if all(name in _PIXELS for name in state if name.startswith("decoder.")):
            return MaskedWindowModel(
                ViT(dim, depth, heads, patch, channels, attention),
                0,
                0,
                0,
                len(state["decoder.pred.weight"]),
                attention,
            )
        width, out = state["decoder.embed.weight"].shape[0], state["decoder.pred.weight"].shape[0]
        decoder_depth, decoder_heads = _blocks(state, "decoder.blocks.", width)
    except (LookupError, ValueError) as error:
        raise CheckpointError(
            f"this is not a SAR-JEPA model: {error} is missing or has another shape",
            where=where,
            do="import checkpoints whose tensors carry the published SAR-JEPA names",
        ) from error
    encoder = ViT(dim, depth, heads, patch, channels, attention)
    return MaskedWindowModel(encoder, width, decoder_depth, decoder_heads, out, attention)


def read_published(path: Path) -> dict[str, Tensor]:
    """The tensors of a published `.pth` under our names. Nothing in the file is executed."""
    try:
        # The published files carry their command line as an argparse.Namespace, which is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, LookupError) as error:
        what = f"cannot read this file as a checkpoint: {type(error).__name__} {error}"
        raise CheckpointError(what, where=str(path), do=_DO) from error
    except UnpicklingError as error:
        raise CheckpointError(
            "this file is no checkpoint, or holds more than tensors and plain values: it is not loaded",
            where=str(path),
            do=_DO,
        ) from error
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise CheckpointError("no state dict found", where=str(path), do=_DO)
    return from_published(state)


def import_published(path: Path, out: Path) -> Path:
    """Turn a published SAR-JEPA `.pth` into a checkpoint that `evaluate` and `report` read. Returns its folder."""
    state = read_published(path)
    model = model_of(state, where=str(path))
    checkpoint.check_tensors(checkpoint.shapes(state), checkpoint.shapes(model.state_dict()), where=str(path))
    encoder = model.encoder
    size = next((n for n, row in FAMILY.items() if row == Row(encoder.dim, encoder.depth, encoder.heads)), None)
    if size is None:
        raise CheckpointError(
            f"no size of the family has width {encoder.dim}, {encoder.depth} blocks and {encoder.heads} heads",
            where=str(path),
            do="add a row to foundation/models/families.py",
        )
    decoder = model.decoder
    head: dict[str, int] = {"depth": 0}
    if isinstance(decoder, Decoder):
        head = {"width": decoder.embed.out_features, "depth": len(decoder.blocks), "heads": decoder.heads}
    config = from_dict(
        {
            "name": path.stem,
            "model": {
                "size": size,
                "patch": encoder.patch,
                "channels": encoder.channels,
                "decoder": head,
            },
            "objective": {"name": "lomar" if isinstance(decoder, LinearHead) else "sar-jepa"},
        }
    )
    facts = {"position": 0, "config": to_dict(config), "imported_from": path.name}
    tensors = {f"model.{name}": tensor for name, tensor in state.items()}
    return Path(checkpoint.save(out / "checkpoints", tensors, facts, position=0))


def load_encoder(path: Path | str, device: str = "cpu", averaged: bool = False) -> tuple[ViT, Config]:
    """The encoder of a run folder or checkpoint, with its configuration; evaluation mode.

    `averaged` takes the running average of the weights. Raises CheckpointError where the run kept none.
    """
    state = checkpoint.load(path, "ema.encoder." if averaged else "model.encoder.")
    config = from_dict(state["config"])
    if averaged and not state["tensors"]:
        raise CheckpointError(
            "there is no average of the weights in this checkpoint",
            where=str(path),
            do="evaluate without --ema, or train with optim.ema_half_life",
        )
    encoder = build_encoder(config)
    weights = state["tensors"]
    checkpoint.check_tensors(checkpoint.shapes(weights), checkpoint.shapes(encoder.state_dict()), where=str(path))
    encoder.load_state_dict(weights)
    return encoder.to(device).eval(), config


def random_encoder(config: Config, seed: int, device: str = "cpu") -> ViT:
    """The same network with fresh weights: the control of every score."""
    with torch.device("meta"):  # layers draw weights of their own from the global generator, unless they have none
        encoder = build_encoder(config)
    encoder = encoder.to_empty(device=device)
    initialise(encoder, seed)
    return encoder.eval()
