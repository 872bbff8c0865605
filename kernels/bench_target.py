"""The gradient-ratio backends beside the published sixteen convolutions, by pixel type, and the masked loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.bench import Budget, Clock, Memory, Roof, Row, Stage, Trial, Work, name_of, relative_error, run
from kernels.bench_attention import BOTH, FORWARD, PUBLISHED
from kernels.gradient_ratio import BACKENDS, gradient_ratio, masked_loss
from kernels.gradient_ratio.reference import half_windows, reference
from kernels.gradient_ratio.scales import FULL_SCALE

RADII, OFFSET, PATCH = (5, 9, 13, 17), 0.01, 16
SIDE, MASKED = 224, 4 * 39
"""Pixels of an image, and its masked patches: 80 % of four windows of 7 x 7."""
Call = Callable[[Tensor], Tensor]
DTYPES = (torch.uint8, torch.uint16, torch.float32)
OPERATIONS = 70
"""Of a pixel: two sums of the integral image, 48 of sixteen boxes, 20 logarithms, divisions and square roots."""


def speckle(device: torch.device, batch: int = 8, side: int = SIDE) -> Tensor:
    """4-look amplitude chips as uint8 [batch, 1, side, side], with a bright square in each."""
    generator = torch.Generator().manual_seed(0)
    looks = torch.rand(4, batch, 1, side, side, generator=generator).log().neg()
    images = (looks.mean(0).sqrt() * 50).clamp(0, 255)
    images[..., side // 2 : side // 2 + 20, side // 3 : side // 3 + 40] = 240
    return images.to(torch.uint8).to(device)


def published_target(images: Tensor) -> Tensor:
    """The target as the published code computes it: sixteen convolutions with one output channel each."""
    maps = []
    for radius in RADII:
        padded = F.pad(images, (radius,) * 4, mode="reflect") + OFFSET
        masks = half_windows(radius, "include", images.device, images.dtype)
        left, right, top, bottom = (F.conv2d(padded, mask[None]) for mask in masks)
        maps.append(torch.sqrt(torch.log(left / right) ** 2 + torch.log(top / bottom) ** 2))
    return torch.cat(maps, dim=1)


def works(images: Tensor) -> Work:
    """Of the maps: pixels in, float32 maps out."""
    return Work(OPERATIONS * images.numel(), images.nbytes + len(RADII) * 4 * images.numel())


def loss_works(images: Tensor, prediction: Tensor) -> tuple[Work, Work]:
    """Of the loss, and of loss and gradient: pixels and prediction in; the gradient out."""
    forward = Work(OPERATIONS * prediction.numel() / len(RADII), images.nbytes + prediction.nbytes)
    return forward, forward + Work(0, prediction.nbytes)


def typed(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 images in another pixel type, of the same brightness; 16 bits use all of theirs."""
    if dtype == torch.float32:
        return pixels.float() / 255
    return pixels if dtype == torch.uint8 else (pixels.int() * 257).to(dtype)


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU, a target is timed on one core: training gives the others to the model and the readers."""
    threads = torch.get_num_threads()
    try:
        if device.type == "cpu":
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


def target(
    device: torch.device, clock: Clock, roof: Roof, repeats: int, budget: Budget, quick: bool = False
) -> Iterator[Row]:
    """Rows of the maps by pixel type, then of the masked loss. Errors are absolute for maps, relative for the loss.

    The shares are of the copy bandwidth, to be measured under `one_thread` as the operators are.
    """
    side, batch = (64, 2) if quick else (SIDE, 256 if device.type == "cuda" else 8)
    with one_thread(device):
        pixels = speckle(device, batch, side)
        for dtype in DTYPES:
            yield from _maps(typed(pixels.cpu(), dtype).to(device), clock, roof, repeats, budget)
        yield from _losses(pixels, clock, roof, repeats, budget)


def why_not(name: str, device: torch.device) -> str:
    """Why a backend is not timed here; '' when it is."""
    if name == "triton" and device.type == "cpu" and not BACKENDS[name].unavailable:
        return "Triton is interpreted on a CPU, which says nothing about its speed"
    return BACKENDS[name].unavailable


def _exact(images: Tensor) -> Tensor:
    """The maps in float64, on a CPU whatever runs beside it: nobody's GPU convolutions are their own judge."""
    exact = reference(images.cpu().double() / FULL_SCALE[images.dtype], RADII, OFFSET, "include")
    return exact.to(images.device)


def _label(images: Tensor) -> str:
    return f"{images.shape[-1]} px, B={len(images)}"


def _maps(images: Tensor, clock: Clock, roof: Roof, repeats: int, budget: Budget) -> Iterator[Row]:
    few = images[:8]
    exact = None if budget.spent else _exact(few)
    calls: dict[str, Call] = {
        name: partial(gradient_ratio, radii=RADII, offset=OFFSET, backend=name) for name in BACKENDS
    }
    if images.dtype == torch.float32:
        calls = {PUBLISHED: published_target, **calls}
    trials = []
    for name, call in calls.items():
        row = Row("target", _label(images), name, FORWARD, name_of(images.dtype), works(images))

        def start(call: Call = call, row: Row = row) -> Sequence[Stage]:
            assert exact is not None
            row.error = (call(few).double() - exact).abs().max().item()
            call(images)
            memory = Memory(clock.device)
            call(images)
            row.peak = memory.peak
            return (lambda _: call(images),)

        trials.append(Trial(start, [row], "" if name == PUBLISHED else why_not(name, clock.device)))
    run(trials, clock, repeats, budget, roof)
    yield from (row for trial in trials for row in trial.rows)


def published_loss(images: Tensor, prediction: Tensor, ids: Tensor) -> Tensor:
    """Squared error against maps cut into patches, of which the masked ones are gathered, as published."""
    return _against(published_target(images), prediction, ids)


def _against(maps: Tensor, prediction: Tensor, ids: Tensor) -> Tensor:
    batch, count, height, width = maps.shape
    cut = maps.view(batch, count, height // PATCH, PATCH, width // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
    tokens = cut.reshape(batch, -1, count * PATCH * PATCH)
    wanted = tokens.gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[-1]))
    return (prediction - wanted).square().mean()


def _losses(pixels: Tensor, clock: Clock, roof: Roof, repeats: int, budget: Budget) -> Iterator[Row]:
    """Of 8-bit pixels, as they come from the data; the published form takes them as float32."""
    batch, side = len(pixels), pixels.shape[-1]
    generator = torch.Generator(pixels.device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": pixels.device}
    grid = side // PATCH
    ids = torch.randint(grid * grid, (batch, min(MASKED, grid * grid)), **options)
    prediction = torch.rand(*ids.shape, len(RADII) * PATCH * PATCH, **options).requires_grad_()
    floats, trials = typed(pixels, torch.float32), []
    maps = None if budget.spent else _exact(pixels[:8])
    for name in (PUBLISHED, *BACKENDS):
        images = floats if name == PUBLISHED else pixels
        named = zip((FORWARD, BOTH), loss_works(pixels, prediction), strict=True)
        shape = f"{_label(pixels)}, {ids.shape[1]} patches"
        rows = [Row("loss", shape, name, to, name_of(images.dtype), work) for to, work in named]
        start = partial(_start_loss, name, images, prediction, ids, rows, maps)
        trials.append(Trial(start, rows, "" if name == PUBLISHED else why_not(name, clock.device)))
    run(trials, clock, repeats, budget, roof)
    yield from (row for trial in trials for row in trial.rows)


def _start_loss(
    name: str, images: Tensor, prediction: Tensor, ids: Tensor, rows: list[Row], maps: Tensor | None
) -> Sequence[Stage]:
    """Warm up, check value and gradient against the float64 `maps` of a few images, compare two runs."""
    assert maps is not None

    def loss(images: Tensor, prediction: Tensor, ids: Tensor) -> Tensor:
        if name == PUBLISHED:
            return published_loss(images, prediction, ids)
        return masked_loss(images, prediction, ids, PATCH, RADII, OFFSET, backend=name)[0]

    def forward(_: object) -> Tensor:
        return loss(images, prediction, ids)

    def backward(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, prediction)[0]

    few = prediction.detach()[:8].double().requires_grad_()
    exact = _against(maps, few, ids[:8])
    single = prediction.detach()[:8].clone().requires_grad_()
    found = loss(images[:8], single, ids[:8])
    rows[0].error = relative_error(found, exact.detach())
    rows[1].error = relative_error(torch.autograd.grad(found, single)[0], torch.autograd.grad(exact, few)[0])
    memory = Memory(images.device)
    value = forward(None)
    rows[0].peak = memory.peak
    gradient = backward(value)
    rows[1].peak = memory.peak
    rows[1].same_bits = torch.equal(gradient, backward(forward(None)))
    return (forward, backward)
