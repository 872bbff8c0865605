"""Training curves: of one run for its report, of several runs on the same axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from foundation.evaluation.figures.style import COLOURS, count, grid, number, plain, safe, save, sparse

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, Any]]
LABELS = {
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "feature_std": "feature standard deviation",
    "rankme": "RankMe (effective rank)",
    "target_variance": "target variance",
    "probe_knn": "online kNN accuracy",
    "probe_linear": "online linear-probe accuracy",
    "images_per_s": "images / s",
}
MONITORS = ("feature_std", "rankme", "target_variance", "probe_knn", "probe_linear")
LOGARITHMIC = ("loss", "grad_norm", "lr")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.5, 1.5)))
_NOISY = 60  # points from which a curve is smoothed


def series(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Samples seen and values of one metric, fp64 [n] each; rows without it are left out, NaN stays."""
    pairs = [(row["samples"], row[key]) for row in rows if row.get(key) is not None and row.get("samples") is not None]
    x, y = np.array(sorted(pairs, key=lambda pair: pair[0]), dtype=float).reshape(-1, 2).T
    return x, y


def smoothed(y: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over `width` points, fp64 [n]. At the beginning, where losses fall steeply, the window shrinks on
    both sides alike; at the end only what lies beyond it is missing. Points that are not finite are left out of the
    means and stay gaps."""
    good = np.isfinite(y)
    sums, counts = (np.concatenate([[0.0], np.cumsum(v)]) for v in (np.where(good, y, 0.0), good.astype(float)))
    at = np.arange(len(y))
    half = np.minimum(width // 2, at)
    low, high = at - half, np.minimum(at + half + 1, len(y))
    mean = (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)
    return np.where(good, mean, np.nan)


def draw(axes: Axes, x: np.ndarray, y: np.ndarray, label: str = "", width: int | None = None, **style: Any) -> None:
    """One curve: beyond 60 points a running mean over `width` (a twentieth) of them, and the points pale behind it."""
    width = width or (max(5, len(y) // 20) if len(y) > _NOISY else 1)
    if width > 1:
        axes.plot(x, y, linewidth=0.7, alpha=0.28, color=style.get("color"), label="_points")
    mark: dict[str, Any] = {"marker": "o", "markersize": 3.5} if len(y) <= 12 else {}
    axes.plot(x, smoothed(y, width), linewidth=1.6, label=label, **mark, **style)


def finish(axes: Axes, key: str, title: str = "", log: bool = False, log_x: bool = False) -> None:
    """Titles, scales and numbers of axes whose curves are drawn."""
    axes.set(title=title or LABELS.get(key, safe(key.replace("_", " "))), xlabel="samples seen")
    axes.title.set_fontsize(11)
    if log_x:
        axes.set_xscale("log")
    else:
        axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(count)
    values = [np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()]
    if log and any((v > 0).any() for v in values):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(sparse)
        axes.tick_params(axis="y", which="minor", labelsize=8)
    axes.yaxis.set_major_formatter(number)


def curve_figure(metrics: Rows, path: Path) -> Path:
    """One run: loss (linear and logarithmic) and learning rate over samples, below them the monitors it has → PNG.

    Rows have `samples` and some of the metrics; what a row lacks is left out of its curve, what is not finite a gap.
    """
    monitors = [key for key in MONITORS if any(row.get(key) is not None for row in metrics)]
    panels = [("loss", "loss", False), ("loss", "loss (log)", True), ("lr", "learning rate", False)]
    panels += [(key, "", False) for key in monitors]
    lines = -(-len(panels) // 3)
    figure, axes = grid(lines, 3, 11.0, 3.3 * lines)
    for ax, (key, title, log) in zip(axes.flat, panels, strict=False):
        draw(plain(ax), *series(metrics, key), color=COLOURS[0], width=None if key == "loss" else 1)
        finish(ax, key, title, log)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    return save(figure, path)


def curves_figure(
    runs: Sequence[tuple[str, Rows]],
    keys: Sequence[str],
    path: Path,
    *,
    log: bool | None = None,
    log_x: bool = False,
    width: int | None = None,
) -> Path:
    """Several runs, (name, rows) each, on the same axes: one panel per metric of `keys`, one legend → PNG.

    `log` makes the values logarithmic; by default those of losses, gradient norms and learning rates. `width` is that
    of the running mean, in points; by default none below 60 points, a twentieth of them above.
    """
    columns = min(len(keys), 2 if len(keys) in (2, 4) else 3)
    lines = -(-len(keys) // columns)
    rows = -(-len(runs) // 3)
    figure, axes = grid(lines, columns, max(4.6 * columns, 6.4), 3.5 * lines + 0.25 * rows + 0.2)
    for ax, key in zip(axes.flat, keys, strict=False):
        plain(ax)
        for index, (name, metrics) in enumerate(runs):
            x, y = series(metrics, key)
            draw(ax, x, y, safe(name), width, **line_style(index))
        finish(ax, key, log=key.startswith(LOGARITHMIC) if log is None else log, log_x=log_x)
    for ax in axes.flat[len(keys) :]:
        ax.set_visible(False)
    handles = [line for line in axes.flat[0].get_lines() if not str(line.get_label()).startswith("_")]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(3, len(runs)), frameon=False, fontsize=9)
    return save(figure, path)


def line_style(index: int) -> dict[str, Any]:
    """Colours first, then dashes: 32 runs can be told apart."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": _DASHES[index // len(COLOURS) % len(_DASHES)]}
