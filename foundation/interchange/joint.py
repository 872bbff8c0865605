"""Published I-JEPA state dicts (arXiv 2301.08243) under our names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from foundation.errors import CheckpointError
from foundation.models.families import FAMILY
from foundation.models.predictor import JointEmbedding
from foundation.models.vit import ViT

_PARTS = {"encoder": "encoder", "target_encoder": "teacher", "predictor": "predictor"}
_NAMES = ((r"^predictor_", ""), (r"^proj\.", "pred."), (r"\.mlp\.(fc[12])\.", r".\1."))


def joint_parts(loaded: Any) -> dict[str, Tensor] | None:
    """`PART.NAME` → tensor of a published file, which holds a state dict for each part; None for any other file.

    Files written by several processes have `module.` before every name.
    """
    if not isinstance(loaded, dict) or not all(isinstance(loaded.get(part), dict) for part in _PARTS):
        return None
    named = ((part, name, tensor) for part in _PARTS for name, tensor in loaded[part].items())
    return {f"{part}.{str(name).removeprefix('module.')}": tensor for part, name, tensor in named}


def is_joint(names: Iterable[str]) -> bool:
    """Whether names, published or ours, are those of an encoder, a teacher and a predictor."""
    return {"target_encoder", "teacher"} & {name.split(".")[0] for name in names} != set()


def joint_from_published(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `joint_parts` gives under our names, without the fixed tables of positions."""
    return {joint_name(name): tensor for name, tensor in parts.items() if not name.endswith("pos_embed")}


def joint_name(published: str) -> str:
    """Our name of a published `PART.NAME`."""
    part, _, name = published.partition(".")
    for pattern, ours in _NAMES if part == "predictor" else _NAMES[2:]:
        name = re.sub(pattern, ours, name)
    return f"{_PARTS.get(part, part)}.{name}"


def joint_of(
    state: Mapping[str, Tensor], attention: str = "auto", where: str = "", heads: tuple[int, int] | None = None
) -> JointEmbedding:
    """An empty model with the widths and depths of `state` (our names).

    No tensor shows the heads: those of encoder and predictor are given, or those of the size, in both, as published.
    Raises CheckpointError.
    """

    def depth(part: str) -> int:
        return len({name.split(".")[2] for name in state if name.startswith(f"{part}.blocks.")})

    try:
        dim, channels, patch, _ = state["encoder.patch_embed.proj.weight"].shape
        width, blocks = len(state["predictor.embed.weight"]), depth("encoder")
        known = next((row.heads for row in FAMILY.values() if (row.dim, row.depth) == (dim, blocks)), None)
        if heads is None and known is None:
            raise CheckpointError(
                f"no size of the family has width {dim} and {blocks} blocks, and no tensor shows the heads",
                where=where,
                do="add a row to foundation/models/families.py",
            )
        first, second = heads or (known or 0, known or 0)
        encoder, teacher = (ViT(dim, blocks, first, patch, channels, attention, "sincos", False) for _ in range(2))
        return JointEmbedding(encoder, teacher, width, depth("predictor"), second, attention)
    except (LookupError, ValueError) as error:
        raise CheckpointError(
            f"this is not an I-JEPA model: {error} is missing or has another shape",
            where=where,
            do="import checkpoints with encoder, target_encoder and predictor whose tensors carry the published names",
        ) from error
