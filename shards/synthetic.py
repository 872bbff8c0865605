"""A synthetic corpus of radar chips whose classes differ in structure, not in brightness.

A chip is the power of `looks` coherent images. Each is the sum, through one band-limited point spread function, of the
target's point scatterers (with a random phase each) and of complex Gaussian clutter whose power follows a correlated
gamma texture (the product model: the clutter is K-distributed). Targets are assemblies of boxes: faces turned towards
the radar flash, hidden ones do not return, and what stands above the ground lays over and casts a shadow. The radar
looks along +rows. Lengths are in pixels of a 96-pixel chip. A chip is a pure function of (seed, split, class, index).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy import ndarray

from shards.addressed import stream_key
from shards.errors import DataError
from shards.schema import Record

if TYPE_CHECKING:
    from shards.catalog import Catalog

# Each box: centre along and across the body, length, width, bottom, top, yaw in degrees.
# fmt: off
BODIES: dict[str, tuple[tuple[float, ...], ...]] = {
    "tank": ((0, 0, 32, 16, 0, 5, 0), (-2, 0, 13, 11, 5, 9, 0), (14, 0, 20, 1.5, 6, 8, 0)),
    "truck": ((13, 0, 8, 12, 0, 11, 0), (-5, 0, 24, 13, 3, 9, 0), (4, 0, 34, 8, 0, 3, 0)),
    "launcher": ((0, 0, 36, 11, 0, 4, 0), (15, 0, 6, 11, 4, 9, 0),
                 (-6, -3.5, 26, 3, 6, 10, 0), (-6, 3.5, 26, 3, 6, 10, 0)),
    "cargo": ((0, 0, 42, 10, 0, 5, 0), (-17, 0, 5, 9, 5, 14, 0),
              (-8, 0, 3, 5, 5, 9, 0), (1, 0, 3, 5, 5, 9, 0), (10, 0, 3, 5, 5, 9, 0)),
    "tanker": ((0, 0, 42, 11, 0, 4, 0), (-16, 0, 8, 9, 4, 12, 0), (4, 0, 28, 1.5, 4, 7, 0), (4, 0, 2, 9, 4, 8, 0)),
    "patrol": ((0, 0, 36, 10, 0, 5, 0), (1, 0, 10, 6, 5, 11, 0), (-2, 0, 2, 2, 11, 17, 0), (11, 0, 3, 3, 5, 8, 0)),
    "airliner": ((0, 0, 40, 5, 3, 8, 0), (-2, 10, 5, 19, 3, 5, 25), (-2, -10, 5, 19, 3, 5, -25),
                 (4, 7, 5, 2.5, 1, 4, 0), (4, -7, 5, 2.5, 1, 4, 0), (-18, 0, 4, 14, 7, 8, 0), (-18, 0, 5, 1, 8, 13, 0)),
    "fighter": ((3, 0, 32, 5, 2, 7, 0), (-4, 6, 14, 11, 3, 5, 30), (-4, -6, 14, 11, 3, 5, -30),
                (-12, 4, 5, 1, 5, 11, 0), (-12, -4, 5, 1, 5, 11, 0)),
}
# fmt: on
CLASSES = tuple(BODIES)
SCALES = {8: 255.0, 16: 4095.0}  # the pixel value of amplitude 1; sixteen bits keep what eight bits saturate
_SHADOW = 0.02  # thermal noise, relative to the mean power of the clutter
_FLASHES = 1 / 230  # the share of a chip's pixels that reach the level of the target, whatever the class


class Scatterers(NamedTuple):
    """Points of a body: position [N, 3], azimuth of the outward normal, width exponent of the lobe, amplitude [N]."""

    position: ndarray
    normal: ndarray
    lobe: ndarray
    amplitude: ndarray


def texture(rng: np.random.Generator, size: int, shape: float, correlation: float) -> ndarray:
    """Unit-mean gamma texture of order `shape`, correlated over `correlation` pixels: fp32 [size, size]."""
    if math.isinf(shape):
        return np.ones((size, size), np.float32)
    smooth = _unit_power(np.exp(-0.5 * (_lags(size) / correlation) ** 2))
    field = smooth @ rng.standard_normal((size, size), np.float32) @ smooth.T
    return np.interp(field, *_gamma_of_normal(shape)).astype(np.float32)


def speckle(rng: np.random.Generator, size: int, looks: int) -> ndarray:
    """Circular complex Gaussian clutter of unit power seen through the point spread function: [looks, size, size]."""
    white = rng.standard_normal((looks, 2, size, size), np.float32)
    blurred = _blur(size) @ white @ _blur(size).T
    return (blurred[:, 0] + 1j * blurred[:, 1]) * np.float32(math.sqrt(0.5))


def scene(
    rng: np.random.Generator,
    kind: str,
    size: int = 96,
    looks: int | None = None,
    shape: float | None = None,
) -> tuple[ndarray, dict[str, float]]:
    """One chip of `kind` (a class, «background» or «clutter») and what is known of it.

    Returns the amplitude, fp32 [size, size], where 1 is full scale and may be exceeded, and the metadata. `looks`
    (default: 1 to 4) and the `shape` of the texture (default: 1.5 to 12; infinite: none) may be given.
    Raises DataError for an unknown kind.
    """
    if kind not in (*CLASSES, "background", "clutter"):
        raise DataError(
            f"there is no synthetic class «{kind}»",
            where="synthetic corpus",
            do=f"use one of {', '.join(CLASSES)}, background, clutter",
        )
    looks = int(rng.integers(1, 5)) if looks is None else looks
    shape = float(rng.choice([1.5, 2, 3, 4, 6, 8, 12])) if shape is None else shape
    depression = rng.uniform(28, 42)
    power = texture(rng, size, shape, rng.uniform(2, 7))
    meta = {"looks": looks, "texture_shape": shape, "depression_deg": depression}
    field = speckle(rng, size, looks)
    if kind == "background":
        power = power * _landscape(rng, size, math.radians(depression))
    field *= np.sqrt(power)
    if kind in BODIES:
        aspect, contrast = rng.uniform(0, 360), rng.uniform(14, 21)
        parts, points = _pose(rng, kind, size, math.radians(aspect))
        field *= 1 - (1 - math.sqrt(_SHADOW)) * _shadow(parts, size, math.radians(depression))
        field += _returns(rng, parts, points, size, looks, math.radians(depression)) * 10 ** (contrast / 20)
        meta |= {"aspect_deg": aspect, "contrast_db": contrast}
    intensity = (field.real**2 + field.imag**2).mean(axis=0)
    gain = rng.uniform(0.06, 0.14)  # amplitude of the mean clutter power
    return np.sqrt(intensity) * np.float32(gain), meta


def chip(seed: int, split: str, kind: str, index: int, size: int, bits: int = 8) -> tuple[ndarray, dict[str, float]]:
    """The chip with this address as uint8 or uint16 [size, size], and its metadata."""
    rng = np.random.Generator(np.random.SFC64(stream_key(seed, f"synthetic/{split}/{kind}/{index}") % (1 << 64)))
    amplitude, meta = scene(rng, kind, size)
    top = (1 << bits) - 1
    return np.minimum(np.rint(amplitude * SCALES[bits]), top).astype(f"uint{bits}"), meta


def generate(
    split: str, kinds: Sequence[str], per_kind: int, size: int, seed: int, bits: int = 8, labelled: bool = True
) -> Iterator[Record]:
    """Records of `per_kind` chips of each kind, taken in turns; unlabelled ones keep their kind in the key only."""
    for index in range(per_kind):
        for kind in kinds:
            pixels, meta = chip(seed, split, kind, index, size, bits)
            yield Record(pixels, f"{split}/{kind}/{index}", kind if labelled else None, meta)


def write(
    out: Path | str,
    size: int = 96,
    per_class_train: int = 200,
    per_class_test: int = 100,
    pretrain: int = 4000,
    seed: int = 0,
    bits: int = 8,
    progress: Callable[[str, int], None] | None = None,
) -> Catalog:
    """Pack the corpus into `out`: the sources synthetic-pretrain, synthetic-train and synthetic-test.

    The first is unlabelled: every class and «background» in equal parts. A source with a count of 0 is left out.
    """
    from shards.pack import SourceSpec, pack

    kinds = (*CLASSES, "background")
    mixed = generate("pretrain", kinds, -(-pretrain // len(kinds)), size, seed, bits, labelled=False)
    records: dict[str, Iterator[Record]] = {"pretrain": islice(mixed, pretrain)} if pretrain else {}
    for split, count in (("train", per_class_train), ("test", per_class_test)):
        if count:
            records[split] = generate(split, CLASSES, count, size, seed, bits)
    specs = [SourceSpec(f"synthetic-{split}", split=split, records=chips) for split, chips in records.items()]
    return pack(out, specs, progress=progress)


def _lags(size: int) -> ndarray:
    """Signed distance between the pixels of a row: int64 [size, size]."""
    return np.arange(size)[:, None] - np.arange(size)


def _unit_power(rows: ndarray) -> ndarray:
    """Filter rows scaled to keep the power of white noise, also at the edges: fp32."""
    return (rows / np.sqrt((rows**2).sum(axis=1, keepdims=True))).astype(np.float32)


@lru_cache(maxsize=16)
def _blur(size: int) -> ndarray:
    """The point spread function along one axis, as filter rows: fp32 [size, size]."""
    return _unit_power(_spread(_lags(size)))


def _spread(distance: ndarray) -> ndarray:
    """Point spread function of an aperture with a raised-cosine weight, 0.8 cycles per pixel wide."""
    # sinc(t) + 0.35 (sinc(t - 1) + sinc(t + 1)) over one sine; the offset keeps t off the removable poles at 0 and ±1
    t = 0.8 * distance + 1e-6
    return np.sin(np.pi * t) / (np.pi * t) * (0.3 * t * t - 1) / (t * t - 1)


@lru_cache(maxsize=64)
def _gamma_of_normal(shape: float) -> tuple[ndarray, ndarray]:
    """Table that maps a standard normal value to the unit-mean gamma value of the same rank."""
    # Substituting x = t⁴ keeps the density finite at 0 for every shape above 1/4.
    t = np.linspace(0, (8 + 30 / shape) ** 0.25, 20001)[1:]
    log_density = (4 * shape - 1) * np.log(t) - shape * t**4
    cumulative = np.cumsum(np.exp(log_density - log_density.max()))
    normal = np.linspace(-4.5, 4.5, 361)
    rank = np.array([0.5 * math.erfc(-z / math.sqrt(2)) for z in normal])
    return normal, np.interp(rank, cumulative / cumulative[-1], t) ** 4


@lru_cache(maxsize=16)
def _scatterers(kind: str) -> Scatterers:
    """The fixed constellation of a class: points on the walls of its boxes, and details on their tops."""
    rng = np.random.Generator(np.random.SFC64(stream_key(0, f"body/{kind}") % (1 << 64)))
    rows: list[tuple[float, ...]] = []
    for x, y, length, width, bottom, top, yaw in BODIES[kind]:
        yaw = math.radians(yaw)

        def at(u: float, v: float, x: float = x, y: float = y, yaw: float = yaw) -> tuple[float, float]:
            return x + u * math.cos(yaw) - v * math.sin(yaw), y + u * math.sin(yaw) + v * math.cos(yaw)

        for side in range(4):  # a wall flashes when it faces the radar
            normal = side * math.pi / 2
            half, run = (length / 2, width) if side % 2 == 0 else (width / 2, length)
            cos, sin = math.cos(normal), math.sin(normal)
            for offset in np.repeat(np.linspace(-run / 2, run / 2, max(2, round(run / 1.6))), 2):
                offset += rng.uniform(-0.5, 0.5)
                place = (*at(half * cos - offset * sin, half * sin + offset * cos), rng.uniform(bottom, top))
                rows.append((*place, normal + yaw, rng.choice([2, 4, 8]), rng.uniform(0.2, 1.2)))
        for u, v in rng.uniform(-0.5, 0.5, (round(2 + length * width / 10), 2)) * (length, width):
            rows.append((*at(u, v), top + 0.2, rng.uniform(0, 2 * math.pi), rng.choice([0, 1]), rng.rayleigh(0.35)))
    table = np.array(rows)
    return Scatterers(table[:, :3], table[:, 3], table[:, 4], table[:, 5])


def _pose(rng: np.random.Generator, kind: str, size: int, aspect: float) -> tuple[ndarray, Scatterers]:
    """Boxes [P, 7] and scatterers of a body in the image: x to the right, y along range (+rows), heading `aspect`."""
    grow, (shift_x, shift_y) = size / 96 * rng.uniform(0.92, 1.08), size / 96 * rng.uniform(-5, 5, 2)
    cos, sin = math.cos(aspect), math.sin(aspect)
    turn = grow * np.array([[cos, sin], [-sin, cos]])
    centre = size / 2 + np.array([shift_x, shift_y])
    body, points = np.array(BODIES[kind], dtype=float), _scatterers(kind)
    parts = np.concatenate([body[:, :2] @ turn + centre, body[:, 2:6] * grow, np.radians(body[:, 6:]) + aspect], axis=1)
    position = np.concatenate([points.position[:, :2] @ turn + centre, points.position[:, 2:] * grow], axis=1)
    return parts, points._replace(position=position, normal=points.normal + aspect)


def _blocked(x: ndarray, y: ndarray, z: ndarray | float, parts: ndarray, depression: float, start: float) -> ndarray:
    """Whether a box stands between the points (x, y, z) and the radar, `start` pixels in front of them or further."""
    hidden = np.zeros(x.shape, bool)
    for cx, cy, length, width, bottom, top, yaw in parts:
        near = np.maximum((bottom - z) / math.tan(depression), start)
        far = (top - z) / math.tan(depression)
        cos, sin = math.cos(yaw), math.sin(yaw)
        for half, axis_x, axis_y in ((length / 2, cos, sin), (width / 2, -sin, cos)):
            along = (x - cx) * axis_x + (y - cy) * axis_y  # falls by axis_y for each pixel towards the radar
            step = axis_y if abs(axis_y) > 1e-6 else 1e-6
            enter, leave = (along - half) / step, (along + half) / step
            near = np.maximum(near, np.minimum(enter, leave))
            far = np.minimum(far, np.maximum(enter, leave))
        hidden |= near < far
    return hidden


def _shadow(parts: ndarray, size: int, depression: float) -> ndarray:
    """1 on ground that the boxes cover or hide, softened by a pixel: fp32 [size, size]."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    mask: ndarray = np.pad(_blocked(x, y, 0.0, parts, depression, 0.0).astype(np.float32), 1, mode="edge")
    mask = (mask[:-2] + 2 * mask[1:-1] + mask[2:]) / 4
    return (mask[:, :-2] + 2 * mask[:, 1:-1] + mask[:, 2:]) / 4


def _returns(
    rng: np.random.Generator, parts: ndarray, points: Scatterers, size: int, looks: int, depression: float
) -> ndarray:
    """Coherent target signal, complex64 [looks, size, size]; the mean power of its brightest pixels is 1."""
    x, y, z = points.position.T
    facing = np.maximum(-np.sin(points.normal), 1e-3)  # the radar is at -y
    facing[points.lobe == 0] = 1
    amplitude = points.amplitude * facing**points.lobe * rng.rayleigh(0.8, len(x))
    seen = ~_blocked(x, y - 0.3, z + 0.1, parts, depression, 0.8)
    x, y, z, amplitude = x[seen], y[seen], z[seen], amplitude[seen]
    row = _spread(y - z * math.tan(depression) - np.arange(size)[:, None])
    column = _spread(x[:, None] - np.arange(size))
    phase = np.exp(2j * np.pi * rng.random((looks, 1, len(x)))).astype(np.complex64)
    field = ((row * amplitude).astype(np.float32) * phase) @ column.astype(np.float32)
    power = (field.real**2 + field.imag**2).mean(axis=0).ravel()
    brightest = round(_FLASHES * power.size) + 1
    return field / np.sqrt(np.partition(power, -brightest)[-brightest:].mean())


def _landscape(rng: np.random.Generator, size: int, depression: float) -> ndarray:
    """Power of a natural scene: fields with straight borders, and lines of trees with their shadows: [size, size]."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    power = np.ones((size, size), np.float32)

    def line() -> tuple[float, float, float, float]:
        angle = rng.uniform(0, 2 * math.pi)
        return *rng.uniform(0.15, 0.85, 2) * size, math.cos(angle), math.sin(angle)

    for _ in range(rng.integers(1, 4)):
        px, py, cos, sin = line()
        power *= np.where((x - px) * sin > (y - py) * cos, 10 ** rng.uniform(-0.6, 0.6), 1).astype(np.float32)
    for _ in range(rng.integers(0, 3)):
        px, py, cos, sin = line()
        steps = np.cumsum(rng.uniform(3, 7, 12)) - 30
        trees = np.zeros((len(steps), 7))
        trees[:, 0], trees[:, 1] = px + steps * cos, py + steps * sin
        trees[:, 2:4], trees[:, 5] = rng.uniform(3, 6, (len(steps), 1)), rng.uniform(5, 11, len(steps))
        power *= 1 - (1 - 3 * _SHADOW) * _shadow(trees, size, depression)
        for cx, cy, width, _, _, height, _ in trees:
            top = cy - height * math.tan(depression) / 2
            bump = np.exp(-(((x - cx) ** 2 + (y - top) ** 2) / (0.5 * width**2)))
            power += bump * np.float32(rng.uniform(1.5, 5))
    return power
