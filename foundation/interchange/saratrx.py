"""SARATR-X: published tensors of HiViT under our names, by their names alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from foundation.errors import CheckpointError
from foundation.files import check_new, write_whole
from foundation.models.hivit import UNITS, HiViT, Shape

_HEAD = 64
"""Width of a head in every published HiViT; no tensor shows it."""
_UNUSED = re.compile(r"^(decoder_|mask_token|head\.|fc_norm\.|sarfeature\d|hogs|relative_position_index)")
FORMAT = "sar-foundation encoder, version 1"
_STEM = "patch_embed.proj.weight"


def is_hivit(published: Mapping[str, Tensor]) -> bool:
    """Whether published names are those of a HiViT: it merges units and norms them behind the first projection."""
    return "patch_embed.norm.weight" in published and any(n.endswith(".reduction.weight") for n in published)


def from_saratrx(published: Mapping[str, Tensor], where: str = "") -> tuple[dict[str, Tensor], Shape]:
    """The encoder's tensors under the names of `HiViT`, and its shape.

    SARATR-X shows its network the one channel three times: here the weights of the three are summed, which is the same.
    The final norm of its pretraining is over three stages at once (3,584 values) and belongs to the decoder; where
    there is none of the encoder's width, the norm is that of a new layer, with which classifiers on SARATR-X begin.
    Raises CheckpointError for tables of relative positions, which SARATR-X does not have, and for missing tensors.
    """
    if any("relative_position_bias_table" in name for name in published):
        what = "this HiViT has tables of relative positions; SARATR-X has none"
        raise CheckpointError(what, where=where, do="import an encoder that was built with rpe=False, as SARATR-X is")
    try:
        stem = [int(n.split(".")[1]) for n in published if n.endswith(".reduction.weight")]
        first, last = sorted(stem)
        dim, hidden = published["absolute_pos_embed"].shape[2], published["blocks.0.mlp.fc1.weight"].shape[0]
        depth = len({n.split(".")[1] for n in published if n.endswith(".attn.qkv.weight") and n.startswith("blocks.")})
        unit = published[_STEM].shape[2] * UNITS
        side = math.isqrt(published["absolute_pos_embed"].shape[1])
    except (LookupError, ValueError) as error:
        what = f"this is not the HiViT of SARATR-X: {error} is missing or has another shape"
        raise CheckpointError(
            what, where=where, do="import a checkpoint whose tensors carry the published names"
        ) from error
    pairs = (first // 2, (last - first - 1) // 2)
    shape = Shape(dim, pairs, depth, max(dim // _HEAD, 1), 1, side, unit, hidden * UNITS // dim)
    ours = {_renamed(n, last + 1): t for n, t in published.items() if not _UNUSED.match(n)}
    ours[_STEM] = ours[_STEM].sum(1, keepdim=True)
    if len(ours.get("norm.weight", ())) != dim:
        fresh = HiViT(shape._replace(depth=0, stem=(0, 0))).norm.state_dict()
        ours |= {f"norm.{name}": value for name, value in fresh.items()}
    return ours, shape


def write_hivit(state: Mapping[str, Tensor], shape: Shape, out: Path, origin: str) -> Path:
    """A folder that `load_export` reads; every tensor must find its place.

    Raises CheckpointError, and StorageError for a folder that is not empty.
    """
    from safetensors.torch import save

    from foundation.training.checkpoint import check_tensors, shapes

    check_new(out, "an import")
    check_tensors(shapes(state), shapes(HiViT(shape).state_dict()), where=origin)
    facts = {"format": FORMAT, "hivit": shape._asdict(), "pool": "avg", "imported_from": origin}
    write_whole(out / "model.safetensors", save({n: t.contiguous() for n, t in state.items()}, {"format": "pt"}))
    write_whole(out / "config.json", json.dumps({"foundation": facts}, indent=2) + "\n")
    return out


def _renamed(published: str, stem: int) -> str:
    """Our name of a published tensor; the first `stem` blocks are the stem."""
    name = published.replace("absolute_pos_embed", "table").replace(".mlp.fc", ".fc")
    if match := re.match(r"^blocks\.(\d+)\.(.*)", name):
        number = int(match[1])
        return f"stem.{number}.{match[2]}" if number < stem else f"blocks.{number - stem}.{match[2]}"
    return name
