"""Sums over half windows, for the targets that need more of them than the magnitude of `kernels.gradient_ratio`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.gradient_ratio.reference import half_windows

BLOCK = 32
"""Sums of one piece of a line."""


def log_ratios(
    image: Tensor, radius: int, offset: float, centre: str, spread: float | None = None
) -> tuple[Tensor, Tensor]:
    """ln(left / right) and ln(top / bottom) of the half windows of side 2r+1 around every pixel.

    image float [N, 1, H, W], reflect-padded by `radius` pixels, `offset` added to every pixel; `centre` is "include"
    (the middle line in both halves) or "exclude" (in none); `spread` weights a pixel at distance d by exp(-d² / 2s²),
    None weights all alike. Returns fp32 [N, 1, H, W] twice.

    A window is the product of two profiles, so rows and columns are summed one after the other. Sums are float64: two
    halves that mirror each other are then equal to the last bit of fp32, and no GPU shortens the factors to TF32.
    """
    steps = torch.arange(-radius, radius + 1, dtype=torch.float64, device=image.device)
    whole = torch.ones_like(steps) if spread is None else torch.exp(-steps.square() / (2 * spread**2))
    first = whole * (steps <= 0 if centre == "include" else steps < 0)
    halves = torch.stack([first, first.flip(0)])
    padded = F.pad(image, (radius,) * 4, mode="reflect")[:, 0].to(torch.float64) + offset
    columns = correlate(padded.mT, whole[None])[0].mT
    left, right = correlate(columns, halves)
    rows = correlate(padded, whole[None])[0]
    top, bottom = correlate(rows.mT, halves).mT
    return _log_ratio(left, right)[:, None], _log_ratio(top, bottom)[:, None]


def correlate(lines: Tensor, profiles: Tensor) -> Tensor:
    """Correlation of the last axis with each profile: [N, M, L + n - 1] and [K, n] → [K, N, M, L].

    A product of pieces of the lines with a band of shifted profiles: pieces of BLOCK sums cost twice the needed
    multiplications and run as a matrix product, where a float64 convolution of one channel would not.
    """
    (kinds, length), wanted = profiles.shape, lines.shape[-1] - profiles.shape[-1] + 1
    # Rows of the band, one step to the right each: profiles padded with zeros, read in rows that are one shorter.
    padded = F.pad(profiles, (0, BLOCK)).repeat(1, BLOCK)
    band = padded[:, : BLOCK * (length + BLOCK - 1)].reshape(kinds * BLOCK, length + BLOCK - 1)
    pieces = F.pad(lines, (0, -wanted % BLOCK)).unfold(-1, length + BLOCK - 1, BLOCK)
    sums = (pieces @ band.T).unflatten(-1, (kinds, BLOCK))  # [N, M, pieces, K, BLOCK]
    return sums.movedim(-2, 0).flatten(-2)[..., :wanted]


def published_log_ratios(image: Tensor, radius: int, offset: float, centre: str) -> tuple[Tensor, Tensor]:
    """`log_ratios` of windows without weights by four dense convolutions in the image's dtype, as the definition says.

    Its rounding is that of the published code: where both halves are equal (every pixel at the border, whose windows
    are mirrored) it leaves a ratio a bit above or below one, and the direction of that gradient is left to chance.
    """
    padded = F.pad(image, (radius,) * 4, mode="reflect") + offset
    sums = F.conv2d(padded, half_windows(radius, centre, image.device, image.dtype))
    left, right, top, bottom = sums[:, :, None].unbind(1)
    return _log_ratio(left, right), _log_ratio(top, bottom)


def _log_ratio(first: Tensor, second: Tensor) -> Tensor:
    """ln(first / second), the ratio rounded to fp32."""
    return (first / second).to(torch.float32).log()
