"""What an encoder looks at: how far its heads reach, and where its answer comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from foundation.evaluation.figures.pictures import heat, picture, sar
from foundation.evaluation.figures.style import COLOURS, GREY, canvas, grid, save


def attention_figure(distances: Tensor, path: Path, control: Tensor | None = None) -> Path:
    """Scatter of the heads of each layer: distances [blocks, B, heads] in pixels (mean over images) → PNG at `path`.

    `control` holds the same of an untrained encoder; the mean of its heads is drawn beside.
    """
    mean = distances.float().mean(1).cpu().numpy()
    blocks, heads = mean.shape
    figure, axes = canvas(7.2, 4.0)
    layer = np.arange(1, blocks + 1)
    axes.plot(np.repeat(layer, heads), mean.ravel(), "o", color=COLOURS[0], alpha=0.55, markersize=5,
              markeredgewidth=0, label="one head")  # fmt: skip
    axes.plot(layer, mean.mean(1), color=COLOURS[0], linewidth=1.5, label="mean of the heads")
    if control is not None:
        untrained = control.float().mean((1, 2)).cpu().numpy()
        axes.plot(layer, untrained, color=GREY, linewidth=1.3, linestyle="--", label="mean, untrained encoder")
    axes.set(xlabel="layer", ylabel="attention distance [px]")
    axes.set_title(f"{heads} heads in {blocks} layers, mean of {distances.shape[1]} images", fontsize=11)
    axes.set_xticks(range(1, blocks + 1, max(1, blocks // 12)))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)
    return save(figure, path)


def rollout_figure(images: Tensor, rollouts: dict[str, Tensor], path: Path) -> Path:
    """Images [n, C, S, S] over one row of maps for each encoder, `rollouts` {name: [n, h, w]} that sum to 1 → PNG.

    A map is drawn as a multiple of the even share of a patch, 1 / (h·w), all on one scale.
    """
    pixels = images[:, 0].float().cpu().numpy()
    maps = {name: (r / r.mean((-2, -1), keepdim=True)).float().cpu().numpy() for name, r in rollouts.items()}
    style = heat(np.concatenate([m.ravel() for m in maps.values()]), "viridis")
    rows, columns = 1 + len(maps), len(pixels)
    figure, axes = grid(rows, columns, 1.35 * columns + 0.9, 1.35 * rows + 0.1)
    shown: Any = None
    for column in range(columns):
        sar(axes[0, column], pixels[column])
        for row, values in enumerate(maps.values(), start=1):
            shown = picture(axes[row, column], values[column], **style)
    for row, name in enumerate(("image", *maps)):
        axes[row, 0].set_ylabel(name, fontsize=10)
    bar = figure.colorbar(shown, ax=axes[1:, :], aspect=22, pad=0.01)
    bar.set_label("share of a patch / even share", fontsize=9)
    bar.ax.tick_params(labelsize=9)
    return save(figure, path)
