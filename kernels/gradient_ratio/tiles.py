"""Triton: all maps of a tile in one pass over its pixels, and the masked loss without writing a map.

A program takes a tile of pixels with its halo, writes the tile's integral image into a table of its own (it stays in
the nearest cache), and reads twelve entries of it per pixel and radius. Nothing is read from the image twice but the
halos; reflection is index arithmetic. Integer pixels are summed in uint32: a table may wrap around, the differences
are exact. Float pixels are summed in float64. Only halves rounded to float32 meet a logarithm, as in `integral`.

TRITON_INTERPRET=1, set before this module is imported, runs the kernels on a CPU.
"""

# Triton's language has no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from kernels.gradient_ratio.scales import FULL_SCALE, Scales

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the kernels below run in Triton's interpreter, on CPU tensors."""
FAST_LOG = tl.constexpr(not INTERPRETED)
"""CUDA's __logf: off by 2^-21.4 at most from 0.5 to 2 and by 3 units in the last place elsewhere, for a tenth of the
instructions, which were 40 % of all."""
LARGEST_BLOCK = 1 << 20
"""Elements of the largest block that Triton allows."""
TILE_ROWS, PASS_PIXELS = 56, 512
"""Rows of a tile of the maps; pixels of a pass over a tile."""


class Launch(NamedTuple):
    """What a kernel takes of a multiprocessor: elements of a scan, warps of a program, programs that work at once.

    Tables of float images, 80 kB and 21 kB, decide the last: beyond these numbers they leave the nearest cache.
    """

    scan: int
    warps: int
    programs: int


MAPS, LOSS = Launch(1024, 8, 3), Launch(512, 2, 10)


@triton.jit
def _reflect(index, size):
    """Reflect padding as an index; what lies beyond any halo is clamped, because nothing depends on it."""
    index = tl.where(index < 0, -index, index)
    index = tl.where(index >= size, 2 * size - 2 - index, index)
    return tl.maximum(index, 0)


@triton.jit
def _integral_image(
    image, table, top, left, height, width, unit,
    HIGH: tl.constexpr, WIDE: tl.constexpr, REACH: tl.constexpr, SIGMOID: tl.constexpr,
    STEP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Table [HIGH, WIDE] of the sums above and left of each pixel, from row top-REACH and column left-REACH on."""
    sums = table.dtype.element_ty
    lanes = tl.arange(0, LANES)
    columns = _reflect(left - REACH - 1 + lanes, width)
    above = tl.zeros((LANES,), sums)
    for start in range(0, HIGH, STEP):
        rows = start + tl.arange(0, STEP)
        # Row 0 and column 0 of the table are the empty sums.
        live = ((rows > 0) & (rows < HIGH))[:, None] & ((lanes > 0) & (lanes < WIDE))[None, :]
        where = _reflect(top - REACH - 1 + rows, height)[:, None] * width + columns[None, :]
        pixels = tl.load(image + where, mask=live, other=0)
        if SIGMOID:
            bright = pixels.to(tl.float32) / unit
            pixels = tl.where(live, tl.sigmoid(bright), 0.0)
        pixels = pixels.to(sums)
        # The two casts undo the interpreter's widening of integer sums and compile to nothing.
        sideways = tl.cumsum(pixels, 1).to(sums)
        total = tl.cumsum(sideways, 0).to(sums) + above[None, :]
        there = (rows < HIGH)[:, None] & (lanes < WIDE)[None, :]
        tl.store(table + rows[:, None] * WIDE + lanes[None, :], total, mask=there)
        above += tl.sum(sideways, 0).to(sums)


@triton.jit
def _log(value):
    return libdevice.fast_logf(value) if FAST_LOG else tl.log(value)


@triton.jit
def _log_ratio(one, other, offset):
    """ln of the ratio of two sums, each plus its offset; equal sums give exactly 0."""
    return _log(tl.div_rn(one.to(tl.float32) + offset, other.to(tl.float32) + offset))


@triton.jit
def _half_windows(at, offset, WIDE: tl.constexpr, RADIUS: tl.constexpr, LINES: tl.constexpr):
    """sqrt(ln(left/right)² + ln(top/bottom)²) of the pixels whose own table entries `at` points to."""
    # A window spans table lines a to b; its first half ends at line c, its second begins at line d.
    a: tl.constexpr = -RADIUS
    b: tl.constexpr = RADIUS + 1
    c: tl.constexpr = LINES - RADIUS
    d: tl.constexpr = RADIUS + 1 - LINES
    aa, ab = tl.load(at + (a * WIDE + a)), tl.load(at + (a * WIDE + b))
    ba, bb = tl.load(at + (b * WIDE + a)), tl.load(at + (b * WIDE + b))
    left = tl.load(at + (b * WIDE + c)) - tl.load(at + (a * WIDE + c)) - ba + aa
    right = bb - ab - tl.load(at + (b * WIDE + d)) + tl.load(at + (a * WIDE + d))
    top = tl.load(at + (c * WIDE + b)) - tl.load(at + (c * WIDE + a)) - ab + aa
    bottom = bb - ba - tl.load(at + (d * WIDE + b)) + tl.load(at + (d * WIDE + a))
    area = offset * (LINES * (2 * RADIUS + 1))
    across, down = _log_ratio(left, right, area), _log_ratio(top, bottom, area)
    return tl.sqrt(across * across + down * down)


@triton.jit
def _log_neighbours(at, offset, unit, WIDE: tl.constexpr):
    """ln of the sum of the eight neighbours: the 3x3 box without its centre; `unit` is what 1.0 is in the table."""
    box = tl.load(at + (2 * WIDE + 2)) - tl.load(at + (2 - WIDE)) - tl.load(at + (2 * WIDE - 1))
    own = tl.load(at + (WIDE + 1)) - tl.load(at + 1) - tl.load(at + WIDE) + tl.load(at)
    around = box + tl.load(at + (-WIDE - 1)) - own
    return _log((around.to(tl.float32) + 8 * offset) / unit)


@triton.jit
def _map(
    at, offset, unit, WIDE: tl.constexpr, SLOT: tl.constexpr,
    RADII: tl.constexpr, INCLUDE: tl.constexpr, BLIND: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """Map SLOT of the pixels whose own table entries `at` points to: the blind spot first, then the radii."""
    if SLOT < BLIND:
        value = _log_neighbours(at, offset, 1.0 if SIGMOID else unit, WIDE)
    else:
        value = _half_windows(at, offset, WIDE, RADII[SLOT - BLIND], RADII[SLOT - BLIND] + INCLUDE)
    return tl.sigmoid(value) if SIGMOID else value


@triton.jit
def maps_kernel(
    images, maps, tables, jobs, height, width, down, across, offset, unit,
    RADII: tl.constexpr, MAPS: tl.constexpr, REACH: tl.constexpr, INCLUDE: tl.constexpr, BLIND: tl.constexpr,
    SIGMOID: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    STEP: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """images [B, H, W] → maps [B, MAPS, H, W]; job: one tile of one image; `down` x `across` tiles per image."""
    HIGH: tl.constexpr = TILE_H + 2 * REACH + 1
    WIDE: tl.constexpr = TILE_W + 2 * REACH + 1
    table = tables + tl.program_id(0).to(tl.int64) * (HIGH * WIDE)
    for job in range(tl.program_id(0), jobs, tl.num_programs(0)):
        image = tl.cast(job // (down * across), tl.int64)
        top, left = job // across % down * TILE_H, job % across * TILE_W
        _integral_image(
            images + image * height * width, table, top, left, height, width, unit,
            HIGH, WIDE, REACH, SIGMOID, STEP, LANES,
        )  # fmt: skip
        tl.debug_barrier()  # every warp's part of the table is written before another reads it
        for start in range(0, TILE_H * TILE_W, BLOCK):
            pixel = start + tl.arange(0, BLOCK)
            row, column = pixel // TILE_W, pixel % TILE_W
            live = (row < TILE_H) & (top + row < height) & (left + column < width)
            at = table + tl.where(live, (row + REACH) * WIDE + column + REACH, REACH * WIDE + REACH)
            out = maps + image * MAPS * height * width + (top + row) * width + left + column
            for slot in tl.static_range(MAPS):
                value = _map(at, offset, unit, WIDE, slot, RADII, INCLUDE, BLIND, SIGMOID)
                tl.store(out + slot * tl.cast(height * width, tl.int64), value, mask=live)
        tl.debug_barrier()  # and read before the next tile overwrites it


@triton.jit
def loss_kernel(
    images, prediction, patch_ids, gradient, partials, tables, jobs, per_image, channels, height, width,
    offset, unit, scale,
    RADII: tl.constexpr, MAPS: tl.constexpr, REACH: tl.constexpr, INCLUDE: tl.constexpr, BLIND: tl.constexpr,
    SIGMOID: tl.constexpr, PATCH: tl.constexpr, KEEP: tl.constexpr,
    STEP: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Squared errors of masked patches, one partial sum per patch and map; KEEP writes `scale` times the error.

    images [B, channels, H, W]; patch_ids int64 [B · per_image]; prediction, gradient [jobs, channels · MAPS · PATCH²];
    partials [jobs, channels · MAPS]. An id outside of the grid makes its partial sums NaN and reads nothing outside.
    """
    SIDE: tl.constexpr = PATCH + 2 * REACH + 1
    table = tables + tl.program_id(0).to(tl.int64) * (SIDE * SIDE)
    pixel = tl.arange(0, BLOCK)
    live = pixel < PATCH * PATCH
    own = (pixel // PATCH + REACH) * SIDE + pixel % PATCH + REACH
    at = table + tl.where(live, own, REACH * SIDE + REACH)
    across = width // PATCH
    for job in range(tl.program_id(0), jobs, tl.num_programs(0)):
        patch = tl.load(patch_ids + job)
        known = (patch >= 0) & (patch < height // PATCH * across)
        patch = tl.where(known, patch, 0).to(tl.int32)
        for channel in range(channels):
            image = tl.cast(job // per_image, tl.int64) * channels + channel
            _integral_image(
                images + image * height * width, table, patch // across * PATCH, patch % across * PATCH,
                height, width, unit, SIDE, SIDE, REACH, SIGMOID, STEP, LANES,
            )  # fmt: skip
            tl.debug_barrier()
            for slot in tl.static_range(MAPS):
                value = _map(at, offset, unit, SIDE, slot, RADII, INCLUDE, BLIND, SIGMOID)
                line = (tl.cast(job, tl.int64) * channels + channel) * MAPS + slot
                where = line * (PATCH * PATCH) + pixel
                guess = tl.load(prediction + where, mask=live, other=0.0).to(tl.float32)
                error = tl.where(live, guess - value, 0.0)
                if KEEP:
                    tl.store(gradient + where, (error * scale).to(gradient.dtype.element_ty), mask=live)
                squares = tl.sum(error * error, 0)
                tl.store(partials + line, tl.where(known, squares, float("nan")))
            tl.debug_barrier()


class Plan(NamedTuple):
    """How a tile is walked through: rows and columns of a tile, rows and columns of a scan, pixels of a pass."""

    high: int
    wide: int
    step: int
    lanes: int
    block: int


def plan(high: int, wide: int, reach: int, launch: Launch) -> Plan:
    """The plan of tiles of this size; the interpreter wants few large steps, a GPU what fits its registers."""
    scan, pixels = (LARGEST_BLOCK, LARGEST_BLOCK) if INTERPRETED else (launch.scan, PASS_PIXELS)
    lanes = triton.next_power_of_2(wide + 2 * reach + 1)
    step = min(triton.next_power_of_2(high + 2 * reach + 1), max(scan // lanes, 1))
    return Plan(high, wide, step, lanes, min(triton.next_power_of_2(high * wide), pixels))


def tiling(height: int, width: int, reach: int) -> Plan:
    """The tiles of an image: of up to 128 columns, so many that the fewest lanes idle; interpreted, one."""
    if INTERPRETED:
        return plan(height, width, reach, MAPS)

    def lanes(count: int) -> int:
        return count * triton.next_power_of_2(triton.cdiv(width, count) + 2 * reach + 1)

    counts = range(triton.cdiv(width, 128), triton.cdiv(width, 32) + 1)
    return plan(min(TILE_ROWS, height), triton.cdiv(width, min(counts, key=lanes)), reach, MAPS)


def patch_plan(patch: int, reach: int) -> Plan:
    """The plan of a masked patch, whose pixels are one pass: their errors are summed at once."""
    return plan(patch, patch, reach, LOSS)._replace(block=triton.next_power_of_2(patch * patch))


def constants(scales: Scales, walk: Plan) -> dict[str, Any]:
    """The compile-time arguments that both kernels share."""
    return {
        "RADII": scales.radii,
        "MAPS": scales.maps,
        "REACH": scales.reach,
        "INCLUDE": int(scales.centre == "include"),
        "BLIND": int(scales.blind_spot),
        "SIGMOID": scales.sigmoid,
        "STEP": walk.step,
        "LANES": walk.lanes,
        "BLOCK": walk.block,
    }


def _launchable(images: Tensor) -> None:
    if not (images.is_cuda or INTERPRETED):
        raise ValueError(
            f"target backend 'triton' takes CUDA images, not {images.device}; TRITON_INTERPRET=1 takes both"
        )


def _programs(device: torch.device, jobs: int, launch: Launch) -> int:
    """As many programs as the GPU holds at once: each keeps its table for all of its jobs."""
    if INTERPRETED:
        return min(jobs, 2)
    return min(jobs, torch.cuda.get_device_properties(device).multi_processor_count * launch.programs)


def _tables(images: Tensor, scales: Scales, programs: int, walk: Plan) -> Tensor:
    entries = (walk.high + 2 * scales.reach + 1) * (walk.wide + 2 * scales.reach + 1)
    dtype = torch.uint32 if scales.sums_fit(images.dtype, 32) else torch.float64
    return torch.empty(programs, entries, dtype=dtype, device=images.device)


def tiles(images: Tensor, scales: Scales, walk: Plan | None = None) -> Tensor:
    """[B, 1, H, W] of a type in FULL_SCALE → float32 [B, maps, H, W], in one launch; `walk` replaces `tiling`."""
    _launchable(images)
    batch, _, height, width = images.shape
    walk = walk or tiling(height, width, scales.reach)
    maps = torch.empty(batch, scales.maps, height, width, dtype=torch.float32, device=images.device)
    down, across = triton.cdiv(height, walk.high), triton.cdiv(width, walk.wide)
    jobs, unit = batch * down * across, FULL_SCALE[images.dtype]
    if not jobs:
        return maps
    programs = _programs(images.device, jobs, MAPS)
    with torch.cuda.device_of(images):
        maps_kernel[(programs,)](
            images.contiguous(), maps, _tables(images, scales, programs, walk), jobs, height, width, down, across,
            scales.offset * (1.0 if scales.sigmoid else unit), unit,
            TILE_H=walk.high, TILE_W=walk.wide, **constants(scales, walk), num_warps=MAPS.warps, num_stages=1,
        )  # fmt: skip
    return maps


def patch_errors(
    images: Tensor, prediction: Tensor, patch_ids: Tensor, patch: int, scales: Scales, gradient: Tensor | None
) -> Tensor:
    """Sums of squared errors float32 [B · m, C · maps] of the masked patches, in one launch.

    images [B, C, H, W], prediction [B · m, C · maps · patch²], patch_ids int64 [B, m]; `gradient`, of the prediction's
    shape, takes 2 / n times each error, n being the number of errors that a map has.
    """
    _launchable(images)
    channels, height, width = images.shape[1:]
    jobs, unit = patch_ids.numel(), FULL_SCALE[images.dtype]
    partials = torch.empty(jobs, channels * scales.maps, dtype=torch.float32, device=images.device)
    if not jobs:
        return partials
    walk, programs = patch_plan(patch, scales.reach), _programs(images.device, jobs, LOSS)
    out = prediction if gradient is None else gradient
    if INTERPRETED and out.dtype == torch.bfloat16:  # which the interpreter truncates to instead of rounding
        out = torch.empty_like(out, dtype=torch.float32)
    with torch.cuda.device_of(images):
        loss_kernel[(programs,)](
            images.contiguous(), prediction, patch_ids, out, partials,
            _tables(images, scales, programs, walk), jobs, patch_ids.shape[1], channels, height, width,
            scales.offset * (1.0 if scales.sigmoid else unit), unit, 2.0 / (jobs * patch * patch),
            PATCH=patch, KEEP=gradient is not None, **constants(scales, walk), num_warps=LOSS.warps, num_stages=1,
        )  # fmt: skip
    if gradient is not None and out is not gradient:
        gradient.copy_(out)
    return partials
