"""Images and maps of them. SAR amplitudes are drawn grey with gamma 1/2, targets and predictions on the same scale."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from foundation.evaluation.figures.style import bare, grid, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WINDOW_OUT, MASKED = (0.55, 0.60, 0.70, 0.75), (0.85, 0.35, 0.25, 0.85)


def picture(axes: Axes, image: np.ndarray, title: str = "", **style: Any) -> Any:
    """One image without ticks; what is not finite stays empty."""
    bare(axes)
    if title:
        axes.set_title(title, fontsize=10)
    return axes.imshow(np.ma.masked_invalid(image), interpolation="nearest", **style)


def sar(axes: Axes, image: np.ndarray, title: str = "") -> Any:
    """One SAR image: amplitudes [H, W] in [0, 1]."""
    return picture(axes, np.sqrt(image.clip(0, 1)), title, cmap="gray", vmin=0, vmax=1)


def _limits(values: np.ndarray) -> tuple[float, float]:
    """The 1st and 99th percentile of what is finite, never equal."""
    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite, (1, 99)) if finite.size else (0.0, 1.0)
    return float(low), float(max(high, low + 1e-6))


def heat(values: np.ndarray, name: str = "magma") -> dict[str, Any]:
    """Colour map and limits of a feature; what is not finite is drawn light grey."""
    from matplotlib import colormaps

    low, high = _limits(values)
    return {"cmap": colormaps[name].with_extremes(bad="0.88"), "vmin": low, "vmax": high}


def map_title(name: str) -> str:
    """What stands over a map: `r5` is a radius, other names speak for themselves."""
    return f"r = {name[1:]}" if re.fullmatch(r"r\d+", name) else name.replace("_", " ")


def target_panels(images: Tensor, targets: Tensor, names: Sequence[str], path: Path) -> Path:
    """Each image beside every map of its target: images [n, C, S, S], targets [n, maps, h, w] → PNG."""
    pixels, values = images[:, 0].float().cpu().numpy(), targets.float().cpu().numpy()
    rows, columns = len(pixels), 1 + values.shape[1]
    figure, axes = grid(rows, columns, 1.9 * columns, 1.9 * rows + 0.55)
    for row in range(rows):
        sar(axes[row, 0], pixels[row], "" if row else "image")
        for scale, name in enumerate(names):
            title = "" if row else map_title(name)
            shown = picture(axes[row, 1 + scale], values[row, scale], title, **heat(values[:, scale]))
            if row == rows - 1:
                figure.colorbar(shown, ax=axes[row, 1 + scale], location="bottom", shrink=0.85, aspect=18)
    return save(figure, path)


def reconstruction_panels(
    images: Tensor, masks: Tensor, targets: Tensor, predictions: Tensor, path: Path, names: Sequence[str] | None = None
) -> Path:
    """Two rows per image: image and targets, masked image and predictions on the targets' colour limits → PNG.

    images [n, C, S, S]; masks [n, gh, gw], true where masked, NaN or -1 outside the windows (which is drawn pale);
    targets and predictions [n, maps, h, w], NaN where there is none.
    """
    pixels, wanted, got = images[:, 0].float().cpu().numpy(), targets.float().cpu().numpy(), predictions.float().cpu()
    rows, scales = len(pixels), wanted.shape[1]
    figure, axes = grid(2 * rows, 1 + scales, 1.9 * (1 + scales), 3.9 * rows + 0.3)
    for i in range(rows):
        sar(axes[2 * i, 0], pixels[i], "" if i else "image")
        sar(axes[2 * i + 1, 0], pixels[i])
        axes[2 * i + 1, 0].imshow(veil(masks[i].float().cpu().numpy(), pixels[i].shape), interpolation="nearest")
        axes[2 * i, 0].set_ylabel("target", fontsize=10)
        axes[2 * i + 1, 0].set_ylabel("mask, prediction", fontsize=10)
        for scale in range(scales):
            title = map_title(names[scale]) if names else f"scale {scale + 1}"
            style = heat(wanted[:, scale])
            picture(axes[2 * i, 1 + scale], wanted[i, scale], "" if i else title, **style)
            picture(axes[2 * i + 1, 1 + scale], got[i, scale].numpy(), **style)
    return save(figure, path)


def veil(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Colours [S, S, 4] over an image: masked patches red, patches outside the windows pale, the rest clear."""
    colour = np.zeros((*mask.shape, 4))
    colour[mask > 0.5] = MASKED
    colour[~(mask >= 0)] = WINDOW_OUT
    return colour.repeat(shape[0] // mask.shape[0], 0).repeat(shape[1] // mask.shape[1], 1)


def block_panels(images: Tensor, context: Tensor, targets: Tensor, patch: int, path: Path) -> Path:
    """Each image, its context, and each of its target blocks in red, the rest pale → PNG.

    images [n, 1, S, S]; raster ids of patches int64: context [n, c], targets [n, T, m].
    """
    pixels, side = images[:, 0].float().cpu().numpy(), images.shape[-1] // patch
    rows, columns = len(pixels), 2 + targets.shape[1]
    figure, axes = grid(rows, columns, 1.9 * columns, 1.9 * rows + 0.3)
    for row in range(rows):
        sar(axes[row, 0], pixels[row], "" if row else "image")
        shown = [("context", context[row], 0.0), *((f"target {n + 1}", t, 1.0) for n, t in enumerate(targets[row]))]
        for column, (title, ids, state) in enumerate(shown, start=1):
            mask = np.full(images.shape[-2] // patch * side, np.nan)
            mask[ids.cpu().numpy()] = state
            sar(axes[row, column], pixels[row], "" if row else title)
            axes[row, column].imshow(veil(mask.reshape(-1, side), pixels[row].shape), interpolation="nearest")
    return save(figure, path)
