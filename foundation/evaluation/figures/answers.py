"""What an encoder answers image by image: confusion matrices and reliability diagrams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foundation.evaluation.calibration import calibration_error, confusion, reliability, wilson
from foundation.evaluation.figures.style import MARKERS, canvas, colours, grid, plain, safe, save, unique
from foundation.evaluation.predictions import Predictions
from foundation.evaluation.scores import t_interval

NAMED, WRITTEN = 40, 16  # classes: up to so many have names on the axes, and numbers in the cells


def share_right(p: Predictions) -> tuple[float, float, float]:
    """Accuracy with its 95 % interval: over the draws, or over the images where there is one draw."""
    each = (p.predicted == p.y).double().mean(1).tolist()
    return t_interval(each) if len(each) > 1 else (each[0], *wilson(each[0] * len(p.y), len(p.y)))


def confusion_figure(p: Predictions, path: Path) -> Path:
    """Rows are true classes: share of the row by colour and in per cent, with the count (mean over seeds) → PNG."""
    counts = confusion(p).numpy()
    total = counts.sum(1, keepdims=True)
    share = np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)
    n = len(p.classes)
    side = min(max(4.2, 0.62 * n), 11)
    figure, axes = canvas(side + 2.0, side + 1.0)
    axes.grid(visible=False)
    shown = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    names = [safe(name) for name in p.classes]
    ticks = range(n) if n <= NAMED else []
    axes.set_xticks(ticks, names if n <= NAMED else [], rotation=45, ha="right", rotation_mode="anchor", fontsize=9)
    axes.set_yticks(ticks, [f"{name} ({round(t)})" for name, t in zip(names, total[:, 0], strict=True)]
                    if n <= NAMED else [], fontsize=9)  # fmt: skip
    if n <= WRITTEN:
        for (row, column), value in np.ndenumerate(share):
            if counts[row, column] > 0:
                text = f"{100 * value:.0f} %\n({counts[row, column]:.1f})".replace(".0)", ")")
                axes.text(column, row, text, ha="center", va="center", fontsize=7, linespacing=1.05,
                          color="white" if value > 0.55 else "0.15")  # fmt: skip
    right, low, high = share_right(p)
    seeds = f", mean of {len(p.seeds)} draws" if len(p.seeds) > 1 else ""
    title = f"{p.encoder}, {p.protocol}{seeds}: {100 * right:.1f} % right ({100 * low:.1f} – {100 * high:.1f})"
    axes.set_title(safe(title), fontsize=11)
    axes.set(xlabel="predicted class", ylabel="true class (test images)")
    bar = figure.colorbar(shown, ax=axes, shrink=0.75, aspect=28)
    bar.set_label("share of the true class", fontsize=9)
    bar.ax.tick_params(labelsize=9)
    return save(figure, path)


def reliability_figure(panels: Mapping[str, Sequence[Predictions]], path: Path) -> Path:
    """Share of right answers over confidence, a panel per protocol, a line per encoder; the diagonal is calibrated.

    Bars are 95 % intervals, below stands how many of the answers have that confidence → PNG.
    """
    columns = len(panels)
    colour = colours(unique(p.encoder for found in panels.values() for p in found))
    figure, axes = grid(2, columns, max(5.2, 4.1 * columns), 5.2, sharex=True, height_ratios=(4, 1))
    for index, (title, found) in enumerate(panels.items()):
        above, below = plain(axes[0, index]), plain(axes[1, index])
        above.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--")
        for number, p in enumerate(found):
            bins = reliability(p)
            x, y = [b.confidence for b in bins], [b.accuracy for b in bins]
            error = [[b.accuracy - b.low for b in bins], [b.high - b.accuracy for b in bins]]
            label = safe(f"{p.encoder}: ECE {100 * calibration_error(p):.1f} %")
            style: dict[str, Any] = {
                "color": colour[p.encoder],
                "marker": MARKERS[number % len(MARKERS)],
                "markersize": 4.5,
            }
            above.errorbar(x, y, error, linewidth=1.4, elinewidth=1, capsize=2.5, label=label, **style)
            below.plot(x, [100 * b.weight for b in bins], linewidth=1.2, **style)
        above.set_title(safe(title), fontsize=11)
        above.set(xlim=(0, 1), ylim=(0, 1))
        above.legend(framealpha=0.85, edgecolor="none", fontsize=8.5, loc="upper left")
        below.set(xlabel="confidence")
        below.set_ylim(bottom=0)
    axes[0, 0].set_ylabel("share of right answers")
    axes[1, 0].set_ylabel("answers [%]")
    return save(figure, path)
