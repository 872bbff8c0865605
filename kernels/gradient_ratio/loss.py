"""Mean squared error of predicted gradient-ratio maps on masked patches.

The forward pass leaves the gradient for the prediction in the prediction's own dtype, in the place that the target
would take; the backward pass only scales it. Computing the features again would save the same number of bytes that
the target and its error need today, and cost the whole operator once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.gradient_ratio.backends import BACKENDS, resolve
from kernels.gradient_ratio.scales import Scales, checked


def masked_loss(
    images: Tensor,
    prediction: Tensor,
    patch_ids: Tensor,
    patch: int,
    radii: Sequence[int] = (5, 9, 13, 17),
    offset: float = 0.01,
    centre: str = "include",
    backend: str = "auto",
    *,
    blind_spot: bool = False,
    sigmoid: bool = False,
) -> tuple[Tensor, Tensor]:
    """(mean squared error, the same per map [C · maps] without a gradient) of the maps on masked patches; float32.

    images: [B, C, H, W] of a dtype of `gradient_ratio`, which also defines radii, offset, centre, blind_spot, sigmoid.
    patch_ids: int64 [B, ...], raster numbers on the grid of H/patch x W/patch patches; one may come more than once.
    prediction: floating [B, ..., C · maps · patch²]: per patch the maps one after another, those of a channel
    together, each row by row. Only the prediction gets a gradient, and only a first one.

    The same inputs give the same bits. Works under torch.compile. Raises ValueError that names the argument. An id
    outside of the grid is a ValueError on a CPU, and makes the loss NaN with backend "triton", which cannot look.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be [B, C, H, W], not {tuple(images.shape)}")
    scales = checked(images, radii, offset, centre, blind_spot, sigmoid)
    _check(images, prediction, patch_ids, patch, images.shape[1] * scales.maps * patch * patch)
    name = resolve(backend, images.device.type)
    keep = prediction.requires_grad and torch.is_grad_enabled()
    options = (list(scales.radii), scales.offset, scales.centre, blind_spot, sigmoid, name, keep)
    per_map, _ = _operator(images, prediction, patch_ids, patch, *options)
    return per_map.mean(), per_map.detach()


def _check(images: Tensor, prediction: Tensor, patch_ids: Tensor, patch: int, width: int) -> None:
    sides = tuple(images.shape[-2:])
    if patch < 1 or sides[0] % patch or sides[1] % patch:
        raise ValueError(f"patch {patch} must be positive and divide both image sides, which are {sides}")
    if patch_ids.dtype != torch.int64 or patch_ids.ndim < 2 or patch_ids.shape[0] != images.shape[0]:
        found = f"{patch_ids.dtype} {tuple(patch_ids.shape)}"
        raise ValueError(f"patch_ids must be int64 [{images.shape[0]}, ...] as the images are many, not {found}")
    if not patch_ids.numel():
        raise ValueError(f"patch_ids must name at least one patch; their shape is {tuple(patch_ids.shape)}")
    if not prediction.is_floating_point() or prediction.shape != (*patch_ids.shape, width):
        found = f"{prediction.dtype} {tuple(prediction.shape)}"
        raise ValueError(f"prediction must be floating {(*patch_ids.shape, width)}, not {found}")
    if not prediction.device == patch_ids.device == images.device:
        raise ValueError(
            f"prediction and patch_ids must be where the images are, on {images.device}, "
            f"not on {prediction.device} and {patch_ids.device}"
        )


def _kept_dtype(prediction: Tensor) -> torch.dtype:
    """Of the kept gradient: the prediction's own, but 2 / n of an error leaves float16's range."""
    return torch.float32 if prediction.dtype == torch.float16 else prediction.dtype


@torch.library.custom_op("sar_foundation::gradient_ratio_loss", mutates_args=())
def _operator(
    images: Tensor,
    prediction: Tensor,
    patch_ids: Tensor,
    patch: int,
    radii: Sequence[int],
    offset: float,
    centre: str,
    blind_spot: bool,
    sigmoid: bool,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """(mean squared error per map, its derivative by the prediction: per map, empty unless `keep`)."""
    scales = Scales(tuple(radii), offset, centre, blind_spot, sigmoid)
    batch, maps = images.shape[0], images.shape[1] * scales.maps
    ids, guess = patch_ids.reshape(batch, -1), prediction.reshape(-1, prediction.shape[-1]).contiguous()
    with torch.autocast(images.device.type, enabled=False):
        if backend == "triton":
            from kernels.gradient_ratio.tiles import patch_errors

            gradient = torch.empty_like(guess, dtype=_kept_dtype(prediction)) if keep else None
            sums = patch_errors(images, guess, ids.contiguous(), patch, scales, gradient)
            per_map = (sums.sum(0, dtype=torch.float64) / (ids.numel() * patch**2)).to(torch.float32)
        else:
            error = _errors(images, guess, ids, patch, scales, backend)
            gradient = (error * (2 / (ids.numel() * patch**2))).to(_kept_dtype(prediction)) if keep else None
            per_map = error.square_().view(-1, maps, patch * patch).mean(2).mean(0)
    kept = prediction.new_empty(0, dtype=_kept_dtype(prediction)) if gradient is None else gradient
    return per_map, kept.view(prediction.shape) if keep else kept


def _errors(images: Tensor, guess: Tensor, ids: Tensor, patch: int, scales: Scales, backend: str) -> Tensor:
    """Prediction minus maps on the masked patches, float32 [B · m, C · maps · patch²], by whole maps."""
    batch, channels, height, width = images.shape
    rows, cols = height // patch, width // patch
    if ids.device.type == "cpu" and not bool(((ids >= 0) & (ids < rows * cols)).all()):
        raise ValueError(f"patch_ids must be from 0 to {rows * cols - 1}, not {int(ids.min())} to {int(ids.max())}")
    maps = BACKENDS[backend].run(images.reshape(batch * channels, 1, height, width), scales)
    cut = maps.view(batch, -1, rows, patch, cols, patch).permute(0, 2, 4, 1, 3, 5)
    first = torch.arange(batch, device=ids.device)[:, None]
    target = cut[first, ids // cols, ids % cols].view(guess.shape)
    return guess.to(torch.float32) - target


@_operator.register_fake
def _(images: Tensor, prediction: Tensor, patch_ids: Tensor, patch: int, radii: Sequence[int],
      offset: float, centre: str, blind_spot: bool, sigmoid: bool, backend: str, keep: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    per_map = images.new_empty(images.shape[1] * (blind_spot + len(radii)), dtype=torch.float32)
    shape = prediction.shape if keep else (0,)
    return per_map, prediction.new_empty(shape, dtype=_kept_dtype(prediction))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # the kept gradient is no result: zeros of its size are never needed
    ctx.save_for_backward(output[1])
    ctx.dtype, ctx.values = inputs[1].dtype, inputs[3] ** 2


def _backward(ctx: Any, by_map: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (kept,) = ctx.saved_tensors
    grad = None
    if by_map is not None:
        maps = kept.unflatten(-1, (-1, ctx.values)).to(torch.float32) * by_map[:, None]
        grad = maps.flatten(-2).to(ctx.dtype)
    return None, grad, *(None,) * 9


_operator.register_autograd(_backward, setup_context=_setup)
