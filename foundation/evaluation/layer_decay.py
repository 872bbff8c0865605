"""Layer-wise decay of the learning rate: the nearer a parameter is to the pixels, the slower it learns."""

from __future__ import annotations

import re
from collections.abc import Iterable

_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
_STEM = re.compile(
    r"(?:^|\.)(?:patch_embed|cls_token|pos_embed|registers?|register_token|reg_token|mask_token)(?:\.|$)"
)


def layer(name: str, depth: int) -> int:
    """Layer of a parameter: 0 what makes the tokens, i + 1 block i, depth + 1 the final norm and everything after it.

    The numbering of BEiT and MAE. Raises ValueError for a block that an encoder of `depth` blocks does not have.
    """
    if _STEM.search(name):
        return 0
    if (found := _BLOCK.search(name)) is None:
        return depth + 1
    if (block := int(found[1])) >= depth:
        raise ValueError(f"{name} belongs to block {block} of an encoder with {depth} blocks")
    return block + 1


def scales(names: Iterable[str], depth: int, decay: float) -> dict[str, float]:
    """Name of a parameter → factor of its learning rate: decay ** (depth + 1 - layer), 1 for norm and head."""
    return {name: decay ** (depth + 1 - layer(name, depth)) for name in names}
