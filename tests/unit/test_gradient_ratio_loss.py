"""The masked loss equals what the objective computes from whole maps: value, parts and gradient, bit by bit again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foundation.objectives.masks import Masks
from foundation.objectives.reconstruction import gather_masked
from foundation.objectives.targets import patchify
from kernels.gradient_ratio import BACKENDS, gradient_ratio, masked_loss

ROWS = {name: pytest.mark.skipif(bool(row.unavailable), reason=row.unavailable) for name, row in BACKENDS.items()}
EACH_BACKEND = pytest.mark.parametrize("backend", [pytest.param(name, marks=mark) for name, mark in ROWS.items()])
V2 = {"radii": (3, 5), "offset": 1e-6, "centre": "exclude", "blind_spot": True, "sigmoid": True}


def device(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def case(
    batch: int = 2,
    channels: int = 1,
    grid: tuple[int, int] = (3, 4),
    patch: int = 8,
    masked: tuple[int, ...] = (2, 3),
    maps: int = 2,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Images, a prediction, ids of masked patches, the patch side."""
    random = torch.Generator().manual_seed(batch + maps + patch)
    images = torch.rand(batch, channels, grid[0] * patch, grid[1] * patch, generator=random)
    ids = torch.randint(0, grid[0] * grid[1], (batch, *masked), generator=random)
    prediction = torch.randn(*ids.shape, channels * maps * patch**2, generator=random)
    return images, prediction.to(dtype), ids, patch


def by_whole_maps(images: Tensor, prediction: Tensor, ids: Tensor, patch: int, **how: Any) -> tuple[Tensor, Tensor]:
    """The loss of `MaskedReconstruction`: maps, patches, the masked ones, squared error; and its mean per map."""
    batch, channels, height, width = images.shape
    maps = gradient_ratio(images.reshape(-1, 1, height, width), backend="integral", **how)
    tokens = patchify(maps.view(batch, -1, height, width), patch)
    windows = ids.flatten(1)[:, None]
    target = gather_masked(tokens, Masks(windows, torch.arange(windows.shape[-1]).expand_as(windows)))
    error = (prediction.float() - target.view(prediction.shape)).square()
    per_map = error.flatten(0, -2).mean(0).view(channels * maps.shape[1], -1).mean(1)
    return per_map.mean(), per_map.detach()


def with_gradient(loss: Any, images: Tensor, prediction: Tensor, *arguments: Any, **how: Any) -> tuple[Tensor, ...]:
    leaf = prediction.detach().clone().requires_grad_()
    value, per_map = loss(images, leaf, *arguments, **how)
    (value * 0.5).backward()  # as one of two micro-batches
    assert leaf.grad is not None
    assert not per_map.requires_grad
    return value.detach(), per_map, leaf.grad


def on(backend: str, *tensors: Any) -> list[Any]:
    return [each.to(device(backend)) if isinstance(each, Tensor) else each for each in tensors]


@EACH_BACKEND
@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 2),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    patch=st.sampled_from([4, 7, 8]),
    masked=st.lists(st.integers(1, 3), min_size=1, max_size=2).map(tuple),
    second=st.booleans(),
    pixels=st.sampled_from([torch.uint8, torch.float32]),
)
def test_value_parts_and_gradient_are_those_of_whole_maps(
    backend: str, batch: int, channels: int, grid: tuple[int, int], patch: int, masked: tuple[int, ...],
    second: bool, pixels: torch.dtype,
) -> None:  # fmt: skip
    how = {**V2, "radii": (1, 2, 3)} if second else {"radii": (1, 3), "offset": 0.01, "centre": "include"}
    arguments = case(batch, channels, grid, patch, masked, maps=4 if second else 2)
    images = arguments[0] if pixels == torch.float32 else (arguments[0] * 255).to(pixels)
    expected = with_gradient(by_whole_maps, images, *arguments[1:], **how)
    found = with_gradient(masked_loss, *on(backend, images, *arguments[1:]), backend=backend, **how)
    for ours, theirs in zip(found, expected, strict=True):
        scale = float(theirs.abs().max())
        assert torch.allclose(ours.cpu(), theirs, rtol=0, atol=scale * (1e-5 if backend == "reference" else 1e-6))


@EACH_BACKEND
def test_a_published_batch_of_windows_has_the_objectives_loss(backend: str) -> None:
    images, prediction, ids, patch = case(1, 1, (3, 3), 16, (1, 3), maps=4)  # radii of the publication, a small image
    expected = with_gradient(by_whole_maps, images, prediction, ids, patch)
    found = with_gradient(masked_loss, *on(backend, images, prediction, ids, patch), backend=backend)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours.cpu(), theirs, rtol=1e-5 if backend == "reference" else 1e-6, atol=1e-8)


@EACH_BACKEND
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_prediction_gets_a_gradient_rounded_once(backend: str, dtype: torch.dtype) -> None:
    arguments = case(dtype=dtype)
    value, _, gradient = with_gradient(masked_loss, *on(backend, *arguments), (3, 5), backend=backend)
    exact = with_gradient(by_whole_maps, arguments[0], arguments[1].float(), *arguments[2:], radii=(3, 5))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact[0].item(), rel=1e-5)
    assert gradient.dtype == dtype
    largest = float(exact[2].abs().max())
    assert (gradient.cpu().float() - exact[2]).abs().max() <= 1.001 * largest * torch.finfo(dtype).eps / 2


@EACH_BACKEND
def test_the_same_inputs_give_the_same_bits_whatever_autocast_says(backend: str) -> None:
    arguments = on(backend, *case(3, 2))
    first = with_gradient(masked_loss, *arguments, (3, 5), backend=backend)
    with torch.autocast(device(backend), torch.bfloat16):
        again = with_gradient(masked_loss, *copy.deepcopy(arguments), (3, 5), backend=backend)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@EACH_BACKEND
def test_an_evaluation_without_gradients_has_the_same_value_and_keeps_nothing(backend: str) -> None:
    images, prediction, ids, patch = on(backend, *case())
    with torch.no_grad():
        value, per_map = masked_loss(images, prediction.requires_grad_(), ids, patch, (3, 5), backend=backend)
    assert not value.requires_grad
    found = with_gradient(masked_loss, images, prediction, ids, patch, (3, 5), backend=backend)
    assert torch.equal(value, found[0])
    assert torch.equal(per_map, found[1])
    scales = ([3, 5], 0.01, "include", False, False, backend)
    _, kept = torch.ops.sar_foundation.gradient_ratio_loss(images, prediction.detach(), ids, patch, *scales, False)
    assert not kept.numel()


@EACH_BACKEND
def test_images_get_no_gradient(backend: str) -> None:
    images, prediction, ids, patch = on(backend, *case())
    loss, _ = masked_loss(images.requires_grad_(), prediction.requires_grad_(), ids, patch, (3, 5), backend=backend)
    loss.backward()
    assert images.grad is None
    assert prediction.grad is not None


@EACH_BACKEND
def test_torch_compile_traces_it_whole_and_changes_no_bit(backend: str) -> None:
    images, prediction, ids, patch = on(backend, *case(channels=2))

    def loss(images: Tensor, prediction: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return masked_loss(images, prediction, ids, patch, (3, 5), backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for one, other in zip(
        with_gradient(loss, images, prediction, ids), with_gradient(compiled, images, prediction, ids), strict=True
    ):
        assert torch.equal(one, other)


@EACH_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("keep", [True, False])
def test_the_operator_keeps_the_rules_of_torch_library(backend: str, dtype: torch.dtype, keep: bool) -> None:
    images, prediction, ids, patch = on(backend, *case(dtype=dtype))
    arguments = (
        images,
        prediction.requires_grad_(keep),
        ids,
        patch,
        [3, 5],
        0.01,
        "include",
        False,
        False,
        backend,
        keep,
    )
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.sar_foundation.gradient_ratio_loss.default, arguments, test_utils=checks)


def replaced(place: int, value: Any, **how: Any) -> tuple[list[Any], dict[str, Any]]:
    arguments: list[Any] = [*case()]
    arguments[place] = value
    return arguments, {"radii": (3, 5), **how}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (replaced(0, torch.rand(1, 24, 32)), r"images must be \[B, C, H, W\], not \(1, 24, 32\)"),
        (replaced(0, torch.rand(2, 1, 24, 32).half()), r"float32 or float64 images, not torch.float16"),
        (replaced(1, torch.rand(2, 2, 3, 64)), r"prediction must be floating \(2, 2, 3, 128\), not .* \(2, 2, 3, 64\)"),
        (replaced(1, torch.zeros(2, 2, 3, 128, dtype=torch.int64)), r"prediction must be floating .*, not torch.int64"),
        (replaced(1, torch.empty(2, 2, 3, 128, device="meta")), r"where the images are, on cpu, not on meta and cpu"),
        (replaced(2, torch.zeros(2, 2, 3)), r"patch_ids must be int64 \[2, ...\] .*, not torch.float32 \(2, 2, 3\)"),
        (replaced(2, torch.zeros(3, 2, dtype=torch.int64)), r"patch_ids must be int64 \[2, ...\] .*int64 \(3, 2\)"),
        (replaced(2, torch.zeros(2, 0, dtype=torch.int64)), r"patch_ids must name at least one patch; .* \(2, 0\)"),
        (replaced(2, torch.full((2, 2, 3), 12)), r"patch_ids must be from 0 to 11, not 12 to 12"),
        (replaced(2, torch.full((2, 2, 3), -1)), r"patch_ids must be from 0 to 11, not -1 to -1"),
        (replaced(3, 7), r"patch 7 must be positive and divide both image sides, which are \(24, 32\)"),
        (replaced(3, 0), r"patch 0 must be positive and divide"),
        (replaced(3, 8, radii=(24,)), r"radii \(24,\) need 1 <= r < image side, which is 24"),
        (replaced(3, 8, offset=-1.0), r"offset -1.0 must be positive and finite"),
        (replaced(3, 8, centre="both"), r"centre 'both' is neither 'include' nor 'exclude'"),
        (replaced(3, 8, backend="fft"), r"unknown target backend 'fft': choose auto, "),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_is_said(call: tuple[list[Any], dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        masked_loss(*call[0], **call[1])


@pytest.mark.parametrize("outside", [-1, 12, 2**40])
@pytest.mark.parametrize("backend", [pytest.param("triton", marks=ROWS["triton"])])
def test_an_id_outside_of_the_grid_makes_the_loss_of_a_kernel_nan(backend: str, outside: int) -> None:
    images, prediction, ids, patch = case()
    ids[1, 0, 2] = outside
    loss, per_map = masked_loss(*on(backend, images, prediction, ids, patch), (3, 5), backend=backend)
    assert loss.isnan()
    assert per_map.isnan().all()
