"""Initial weights: the value of a parameter is a pure function of (seed, its name, its shape)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from foundation.models.layers import LayerScale
from shards.addressed import stream_key

_PIECE = 1 << 20  # values drawn at a time
_BLOCK = 8  # 32-bit numbers of one count of Philox


class Piece(NamedTuple):
    """Values of a parameter of `shape` that this process holds: contiguous, from the flat index `first` on."""

    values: Tensor
    first: int
    shape: torch.Size


class Given(NamedTuple):
    """Initial values that come from elsewhere: `read` makes the CPU tensor of `shape`, when they are needed."""

    shape: torch.Size
    read: Callable[[], Tensor]


def whole(parameter: nn.Parameter) -> Piece:
    """All of a parameter."""
    return Piece(parameter.detach(), 0, parameter.shape)


def initialise(
    model: nn.Module,
    seed: int,
    part: Callable[[nn.Parameter], Piece] = whole,
    given: Mapping[str, Given] | None = None,
) -> None:
    """Xavier-uniform weights, zero biases and tables, unit norms, tokens of std 0.02: the published initialisation.

    A parameter that is `given` by its name takes those values instead. A teacher is drawn, or given, as the encoder,
    which it equals.

    Fusions start at zero too: equal weights; learnt positions as tokens, layer scales at the value of their layer. Each
    process draws the `part` that it holds of a parameter and no more, so any sharding starts from the same weights.
    Raises TypeError for a parameter that no rule knows.
    """
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        student = re.sub(r"^teacher\.", "encoder.", name)
        if given and student in given:
            _copy(part(parameter), given[student])
        else:
            _fill(part(parameter), model.get_submodule(owner), leaf, seed, student)


@torch.no_grad()
def _copy(part: Piece, given: Given) -> None:
    """Write a piece of what is given; one tensor at a time is whole, and none of which this process holds nothing."""
    piece = part.values.view(-1)
    if len(piece):
        piece.copy_(given.read().reshape(-1)[part.first : part.first + len(piece)])


@torch.no_grad()
def _fill(part: Piece, owner: nn.Module, leaf: str, seed: int, name: str) -> None:
    """Write a piece of the parameter that is drawn as `name`, which its owner calls `leaf`."""
    piece, first, shape = part.values.view(-1), part.first, part.shape
    if isinstance(owner, nn.Linear | nn.Conv2d) and leaf == "weight":
        bound = math.sqrt(6 / (shape[0] + shape[1:].numel())) * getattr(owner, "gain", 1.0)
        _draw(piece, first, seed, name, lambda u: (2 * u - 1) * bound)
    elif leaf.endswith("token") or leaf == "embedding":
        _draw(piece, first, seed, name, lambda u: torch.special.ndtri(u.clamp(min=2**-25)) * 0.02)
    elif leaf in ("bias", "table", "fusion"):
        piece.zero_()
    elif isinstance(owner, nn.LayerNorm) and leaf == "weight":
        piece.fill_(1)
    elif isinstance(owner, LayerScale):
        piece.fill_(owner.initial)
    else:
        raise TypeError(f"there is no rule for the initial value of {name}, a parameter of {type(owner).__name__}")


def _draw(piece: Tensor, first: int, seed: int, name: str, shaped: Callable[[Tensor], Tensor]) -> None:
    """Write numbers in [0, 1), `shaped` to the wanted distribution; the same on all devices, drawn on the CPU."""
    key = stream_key(seed, f"initial {name}") & (2**64 - 1)
    for begin in range(0, len(piece), _PIECE):
        part = piece[begin : begin + _PIECE]
        part.copy_(shaped(torch.from_numpy(_uniform(key, first + begin, len(part)))))


def _uniform(key: int, first: int, count: int) -> np.ndarray:
    """Numbers [first, first + count) of the stream of `key`: float32 in [0, 1).

    Philox (Salmon et al., SC 2011) is counted, not stepped, and NumPy promises its raw output for all versions.
    """
    block, skip = divmod(first, _BLOCK)
    raw = np.random.Philox(key=key).advance(block).random_raw((skip + count + 1) // 2)
    return (raw.astype("<u8", copy=False).view("<u4")[skip : skip + count] >> 8).astype(np.float32) * np.float32(2**-24)
