"""Encoders in: checkpoints of this trainer and published ones (SAR-JEPA, LoMaR, MAE, FG-MAE, I-JEPA), by names."""

from __future__ import annotations

import argparse
import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError  # what torch.load raises when weights_only refuses a file; nothing is unpickled here
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor
from torch.nn import functional as F

from foundation.config import Config, from_dict, to_dict
from foundation.errors import CheckpointError
from foundation.interchange.joint import is_joint, joint_from_published, joint_of, joint_parts
from foundation.interchange.saratrx import from_saratrx, is_hivit, write_hivit
from foundation.models.families import FAMILY, Row
from foundation.models.heads import Decoder, LinearHead, MaskedImageModel, MaskedWindowModel
from foundation.models.initialise import initialise
from foundation.models.position import sincos
from foundation.models.predictor import JointEmbedding, Predictor
from foundation.models.vit import ViT
from foundation.objectives.reconstruction import build_encoder
from foundation.objectives.registry import build
from foundation.training import checkpoint

log = logging.getLogger(__name__)
# (pattern of a published name, ours). No sin-cos table is kept: SAR-JEPA and LoMaR never add theirs, MAE's is fixed.
_PUBLISHED = (
    (r"^(encoder_pred|decoder_embed)\.", "decoder.embed."),
    (r"^decoder_blocks\.", "decoder.blocks."),
    (r"^decoder_norm\.", "decoder.norm."),
    (r"^decoder_pred\.", "decoder.pred."),
    (r"^(cls_token|patch_embed\.|blocks\.|norm\.)", r"encoder.\1"),
    (r"\.attn\.rpe_k\.lookup_table_weight$", ".attn.rpe.table"),
    (r"\.mlp\.(fc[12])\.", r".\1."),
)
_CHANNELS = "encoder.patch_embed.proj.weight"
_PIXELS = ("decoder.pred.weight", "decoder.pred.bias")
FIXED = ("pos_embed", "decoder_pos_embed")
UNUSED = frozenset(FIXED)
KNOWN = "SAR-JEPA, LoMaR, MAE and FG-MAE with decoder or head, MAE's encoder alone, I-JEPA, SARATR-X"
_DO = "save it again with torch.save({'model': state_dict}, path)"


Model = MaskedWindowModel | MaskedImageModel | JointEmbedding


def rename(published: str, linear: bool = False) -> str:
    """Our name of a published tensor; `linear` where `encoder_pred` is the head and not the way into a decoder."""
    if linear:
        published = re.sub(r"^encoder_pred\.", "decoder.pred.", published)
    for pattern, ours in _PUBLISHED:
        published = re.sub(pattern, ours, published)
    return published


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict under our names, without the tensors that the published code never uses."""
    if is_joint(state):
        return joint_from_published(state)
    linear = is_linear(state)
    ours = {rename(name, linear): tensor for name, tensor in state.items() if name not in UNUSED}
    channels = ours[_CHANNELS].shape[1] if _CHANNELS in ours and ours[_CHANNELS].ndim == 4 else 1
    if linear or is_pixels(ours):  # LoMaR and MAE predict pixels, FG-MAE does not
        divisible = {n: ours[n] for n in _PIXELS if n in ours and len(ours[n]) % channels == 0}
        ours |= {name: by_channel(tensor, channels, 0) for name, tensor in divisible.items()}
    return ours


def by_channel(values: Tensor, channels: int, dim: int) -> Tensor:
    """Values of patches channel after channel, as here, from those pixel after pixel, as published: along `dim`."""
    dim %= values.ndim
    return values.unflatten(dim, (-1, channels)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def is_linear(published: Iterable[str]) -> bool:
    """Whether published names are those of a model without a decoder: LoMaR's."""
    return not any(name.startswith("decoder_") for name in published)


def is_relative(ours: Iterable[str]) -> bool:
    """Whether our names are those of a model with tables of relative positions: all but MAE's."""
    return any(name.endswith(".attn.rpe.table") for name in ours)


def is_pixels(ours: Mapping[str, Tensor]) -> bool:
    """Whether a model without relative positions predicts all pixels of a patch, as MAE does and FG-MAE does not."""
    if is_relative(ours) or _CHANNELS not in ours or "decoder.pred.weight" not in ours:
        return False
    return len(ours["decoder.pred.weight"]) == ours[_CHANNELS].shape[1:].numel()


def is_alone(ours: Iterable[str]) -> bool:
    """Whether our names are those of MAE's encoder without the decoder, as it is often published."""
    names = list(ours)
    return bool(names) and not is_relative(names) and all(name.startswith("encoder.") for name in names)


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.split(".")[prefix.count(".")] for name in state if name.startswith(prefix)})


def _blocks(state: Mapping[str, Tensor], prefix: str, dim: int) -> tuple[int, int]:
    """Depth and heads of a stack of blocks, the heads from the head size of its position table."""
    return _depth(state, prefix), dim // state[f"{prefix}0.attn.rpe.table"].shape[1]


def model_of(
    state: Mapping[str, Tensor], attention: str = "auto", where: str = "", heads: tuple[int, int] | None = None
) -> Model:
    """An empty model with the widths, depths and heads that the tensors of `state` (our names) show.

    Heads show in position tables. A model without them, MAE's, has the `heads` of encoder and decoder that are given,
    or those of the size of its width and depth and the published decoder's 16.
    """
    if is_joint(state):
        return joint_of(state, attention, where, heads)
    try:
        dim, channels, patch, _ = state[_CHANNELS].shape
        if not is_relative(state):
            depth, decoder_depth = (_depth(state, f"{part}.blocks.") for part in ("encoder", "decoder"))
            width, out = len(state["decoder.embed.weight"]), len(state["decoder.pred.weight"])
            if heads is None:
                heads = next(row.heads for row in FAMILY.values() if (row.dim, row.depth) == (dim, depth)), 16
            fixed = ViT(dim, depth, heads[0], patch, channels, attention, "sincos")
            return MaskedImageModel(fixed, width, decoder_depth, heads[1], out, attention)
        depth, encoder_heads = _blocks(state, "encoder.blocks.", dim)
        encoder = ViT(dim, depth, encoder_heads, patch, channels, attention)
        if all(name in _PIXELS for name in state if name.startswith("decoder.")):
            return MaskedWindowModel(encoder, 0, 0, 0, len(state["decoder.pred.weight"]), attention)
        width, out = state["decoder.embed.weight"].shape[0], state["decoder.pred.weight"].shape[0]
        decoder_depth, decoder_heads = _blocks(state, "decoder.blocks.", width)
    except StopIteration:
        raise CheckpointError(
            f"no size of the family has width {dim} and {depth} blocks, and no tensor shows the heads",
            where=where,
            do="add a row to foundation/models/families.py",
        ) from None
    except (LookupError, ValueError) as error:
        raise CheckpointError(
            f"this is not a SAR-JEPA, LoMaR or MAE model: {error} is missing or has another shape",
            where=where,
            do=f"import checkpoints whose tensors carry the published names: {KNOWN}",
        ) from error
    return MaskedWindowModel(encoder, width, decoder_depth, decoder_heads, out, attention)


def fixed_gap(table: Tensor) -> float:
    """Largest difference of a published table [1, N, dim] from the fixed one, or [1, 1 + N, dim], class token zero."""
    if table.ndim != 3 or table.shape[2] % 4 or table.shape[1] < 1:
        return math.inf
    side = math.isqrt(table.shape[1])
    first = table.shape[1] - side**2
    if first > 1:
        return math.inf
    ours = sincos((side, side), table.shape[2], table.device, torch.float32)
    gap = (table.float() - F.pad(ours, (0, 0, first, 0))).abs().max().item()
    return gap if gap < math.inf else math.inf


def read_file(path: Path) -> Any:
    """What `torch.save` wrote, tensors mapped from the file where it allows that. Nothing in it is executed."""
    try:
        # The published files carry their command line as an argparse.Namespace, which is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except (OSError, RuntimeError, ValueError, EOFError, LookupError) as error:
        what = f"cannot read this file as a checkpoint: {type(error).__name__} {error}"
        raise CheckpointError(what, where=str(path), do=_DO) from error
    except UnpicklingError as error:
        raise CheckpointError(
            "this file is no checkpoint, or holds more than tensors and plain values: it is not loaded",
            where=str(path),
            do=_DO,
        ) from error


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a published `.pth` under their own names."""
    loaded = read_file(path)
    state = joint_parts(loaded) or (loaded.get("model", loaded) if isinstance(loaded, dict) else loaded)
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise CheckpointError("no state dict found", where=str(path), do=_DO)
    return state


def checked(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """A published state dict under our names. Raises CheckpointError for positions that are not those added here."""
    ours = from_published(state)
    tables = [n for n in state if n.split(".")[-1] in (*FIXED, "predictor_pos_embed")]
    learnt = [] if is_relative(ours) else [n for n in tables if fixed_gap(state[n]) > 1e-4]
    if learnt:
        what = f"{learnt[0]} is not the fixed table of sines and cosines that MAE and I-JEPA add"
        raise CheckpointError(what, where=where, do="learnt positions are not supported; import an MAE checkpoint")
    return ours


def with_fresh_decoder(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """MAE's encoder with the published decoder's sizes and initial weights, so that it is a whole model."""
    if not {_CHANNELS, "encoder.cls_token"} <= set(state):
        return dict(state)
    values = state[_CHANNELS].shape[1:].numel()
    shapes = {"decoder.embed.weight": torch.empty(512, 0), "decoder.pred.weight": torch.empty(values, 0)}
    blocks = {f"decoder.blocks.{i}.": torch.empty(0) for i in range(8)}
    model = model_of({**state, **shapes, **blocks}, where=where)
    initialise(model, 0)
    return {n: t for n, t in model.state_dict().items() if not n.startswith("encoder.")} | dict(state)


def check_predictions(state: Mapping[str, Tensor], where: str) -> None:
    """Raise CheckpointError where a model of MAE's frame predicts neither pixels nor FG-MAE's histograms."""
    _, channels, patch, _ = state[_CHANNELS].shape
    values, histograms = len(state["decoder.pred.weight"]), 9 * (patch // 8) ** 2 * channels
    if not is_pixels(state) and values != histograms:
        what = f"the decoder predicts {values} values of a patch: MAE {channels * patch**2}, FG-MAE {histograms}"
        raise CheckpointError(what, where=where, do="take out decoder_* and mask_token, and import the encoder alone")


def import_published(path: Path, out: Path) -> Path:
    """Turn a published `.pth` into a checkpoint that `evaluate` and `report` read. Returns its folder.

    MAE's encoder alone gets a decoder with initial weights. The encoder of SARATR-X is no ViT: `out` becomes a folder
    for `load_export`.
    """
    published = read_state(path)
    if is_hivit(published):
        return write_hivit(*from_saratrx(published, str(path)), out, path.name)
    state = checked(published, str(path))
    if alone := is_alone(state):
        log.warning("%s holds no decoder: it gets one with initial weights", path)
        state = with_fresh_decoder(state, str(path))
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
    joint = isinstance(model, JointEmbedding)
    decoder = model.predictor if isinstance(model, JointEmbedding) else model.decoder
    head: dict[str, int] = {"depth": 0}
    if isinstance(decoder, Decoder | Predictor):
        head = {"width": decoder.embed.out_features, "depth": len(decoder.blocks), "heads": decoder.heads}
    fixed, linear = isinstance(model, MaskedImageModel), isinstance(decoder, LinearHead)
    objective = "i-jepa" if joint else "lomar" if linear else "sar-jepa"
    if fixed:
        objective = "mae" if is_pixels(state) else "fg-mae"
        check_predictions(state, str(path))
    config = from_dict(
        {
            "name": path.stem,
            "model": {
                "size": size,
                "patch": encoder.patch,
                "channels": encoder.channels,
                "positions": "sincos" if fixed or joint else "relative",
                "decoder": head,
            },
            "objective": {"name": objective},
        }
    )
    facts = {"position": 0, "config": to_dict(config), "imported_from": path.name, "fresh_decoder": alone}
    tensors = {f"model.{name}": tensor for name, tensor in state.items()}
    return Path(checkpoint.save(out / "checkpoints", tensors, facts, position=0))


def load_encoder(path: Path | str, device: str = "cpu", averaged: bool = False) -> tuple[ViT, Config]:
    """The encoder of a run folder or checkpoint, with its configuration; evaluation mode.

    Of I-JEPA it is the teacher, as published. `averaged` takes the running average of the weights. Raises
    CheckpointError where the run kept none.
    """
    path = checkpoint.resolve(path)
    config = from_dict(checkpoint.load(path, None)["config"])
    state = checkpoint.load(path, "ema.encoder." if averaged else f"model.{build(config).evaluated}.")
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
