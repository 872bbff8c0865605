"""What a call of the gradient ratio asks for, checked once for every backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FULL_SCALE = {torch.uint8: 255.0, torch.uint16: 65535.0, torch.float32: 1.0, torch.float64: 1.0}
"""The pixel value that means 1.0, of every pixel type that can be computed exactly."""


class Scales(NamedTuple):
    """The maps of one pass: the blind spot, if wanted, then one ratio per radius.

    `radii` in pixels; `offset` is added to every pixel; `centre` is "include" (the middle line in both half windows)
    or "exclude" (in none); `sigmoid` passes pixels and maps through 1 / (1 + e^-x).
    """

    radii: tuple[int, ...]
    offset: float
    centre: str
    blind_spot: bool = False
    sigmoid: bool = False

    @property
    def maps(self) -> int:
        """How many maps there are."""
        return self.blind_spot + len(self.radii)

    @property
    def reach(self) -> int:
        """How many pixels beyond its own a map depends on, in each direction."""
        return max(self.radii)

    def lines(self, radius: int) -> int:
        """Rows (columns) of one half window."""
        return radius + (self.centre == "include")

    def area(self, radius: int) -> int:
        """Pixels of one half window."""
        return self.lines(radius) * (2 * radius + 1)

    def sums_fit(self, dtype: torch.dtype, bits: int) -> bool:
        """Whether every half window of such integer pixels sums to less than 2^bits: exact, whatever wraps around."""
        largest = max(self.area(self.reach), 8 * self.blind_spot) * FULL_SCALE[dtype]
        return not (dtype.is_floating_point or self.sigmoid) and largest < 2**bits


def checked(
    images: Tensor, radii: Sequence[int], offset: float, centre: str, blind_spot: bool, sigmoid: bool
) -> Scales:
    """The scales of a call on images [B, C, H, W]; ValueError names the argument that cannot be served."""
    if images.dtype not in FULL_SCALE:
        allowed = "uint8, uint16, float32 or float64"
        raise ValueError(f"targets are computed from {allowed} images, not {images.dtype}")
    side = min(images.shape[-2:])
    if not radii or max(radii) >= side or min(radii) < 1:
        raise ValueError(f"radii {tuple(radii)} need 1 <= r < image side, which is {side}")
    if not 0 < offset < math.inf:
        raise ValueError(f"offset {offset} must be positive and finite: it keeps the sums of dark windows above zero")
    if centre not in ("include", "exclude"):
        raise ValueError(f"centre {centre!r} is neither 'include' nor 'exclude'")
    return Scales(tuple(radii), float(offset), centre, blind_spot, sigmoid)
