"""A model before an engine spreads it: built without memory, recomputed and compiled block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from foundation.config import TrainConfig
from foundation.errors import LaunchError
from kernels.rpe_attention.op import OPERATOR

# What selective checkpointing keeps: the results of products, which cost most to compute again.
_KEPT = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    OPERATOR,
]


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """The model with shapes and no memory. Raises TypeError when it has buffers, whose values would be lost."""
    with torch.device("meta"):
        model = build()
    if names := [name for name, _ in model.named_buffers()]:
        raise TypeError(f"{names[0]} is a buffer; derive it in forward, since models are built without memory")
    return model


def units(model: nn.Module) -> Iterator[nn.Module]:
    """The parts that are recomputed, compiled and sharded one at a time: modules with `shard_unit = True`."""
    return (module for module in model.modules() if getattr(module, "shard_unit", False))


def eight_bits(model: nn.Module, emulate: bool) -> nn.Module:
    """Let the products of each unit round their operands to float8 with one scale per tensor (torchao).

    `emulate` rounds and multiplies in the precision of the run, on devices that have no such products. Layers whose
    widths are no multiples of 16 stay as they are; numbers of tokens that are none are padded, for the gradient of the
    weights. Raises LaunchError without torchao.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        do = "pip install 'sar-foundation[float8]', or train.float8=false"
        raise LaunchError("train.float8 needs torchao, which is not installed", where="train.float8", do=do) from error

    def fits(module: nn.Module, _: str) -> bool:
        return isinstance(module, nn.Linear) and not (module.in_features % 16 or module.out_features % 16)

    for unit in units(model):
        config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
        convert_to_float8_training(unit, config=config, module_filter_fn=fits)
    return model


def prepare(model: nn.Module, train: TrainConfig) -> nn.Module:
    """Activation checkpointing, then compile, of each unit; engines shard last.

    In this order the compiler sees the recomputation and plans with it, and the gathering of shards stays outside of
    both. Only `forward` is replaced, so that parameters keep their names.
    """
    for unit in units(model):
        forward = unit.forward
        if train.activation_checkpointing == "full":
            forward = partial(checkpoint, forward, use_reentrant=False)
        elif train.activation_checkpointing == "selective":
            keep = partial(create_selective_checkpoint_contexts, _KEPT)
            forward = partial(checkpoint, forward, use_reentrant=False, context_fn=keep)
        if train.compile:
            forward = torch.compile(forward)
        unit.forward = forward
    return model


def with_features(model: nn.Module) -> nn.Module:
    """Let `model(images, features=True)` give pooled features [B, dim], any other call predictions.

    Features are those of `encoder`, or of the part that the model names as `judged`. By the model's own call, since
    engines gather pieces of it around that call and around no other. Only `forward` is replaced, as by `prepare`.
    """
    predict, judged = model.forward, getattr(model, "judged", "encoder")

    def forward(*arguments: Any, features: bool = False, **named: Any) -> Any:
        return model.get_submodule(judged)(*arguments) if features else predict(*arguments, **named)

    model.forward = forward
    return model


@torch.no_grad()
def poison(model: nn.Module) -> None:
    """Fill every parameter with NaN: one that initialisation forgets shows in the first loss."""
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
