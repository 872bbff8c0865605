"""The figure of robustness: a panel per corruption, a line per encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from foundation.evaluation.corruptions import CORRUPTIONS
from foundation.evaluation.figures import COLOURS, grid, plain, save
from foundation.evaluation.figures.scores import RED
from foundation.evaluation.figures.style import safe

if TYPE_CHECKING:
    from foundation.evaluation.robustness import Row


def robustness_figure(rows: Sequence[Row], path: Path, warning: str = "") -> Path:
    """Accuracy over levels, from the mildest left, with shaded 95 % intervals: rows of one run → PNG.

    `warning` says in red why they mean nothing.
    """
    kinds = list(dict.fromkeys(row.corruption for row in rows))
    encoders = list(dict.fromkeys(row.encoder for row in rows))
    figure, axes = grid(1, len(kinds), 3.1 * len(kinds) + 0.4, 3.4)
    for ax, kind in zip(axes[0], kinds, strict=True):
        for encoder, colour in zip(encoders, COLOURS * len(encoders), strict=False):
            line = [row for row in rows if (row.corruption, row.encoder) == (kind, encoder)]
            line.sort(key=_order)
            at = range(len(line))
            ax.fill_between(
                at, [100 * r.low for r in line], [100 * r.high for r in line], color=colour, alpha=0.18, lw=0
            )
            ax.plot(
                at, [100 * r.accuracy for r in line], "o-", color=colour, markersize=4, linewidth=1.5, label=encoder
            )
        plain(ax).set_xticks(at, ["none" if r.level is None else f"{r.level:g}" for r in line])
        ax.set(title=kind, xlabel=CORRUPTIONS[kind].unit, ylim=(0, 100))
    axes[0, 0].set_ylabel("accuracy [%], 95 % interval")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(encoders), frameon=False, fontsize=9)
    if warning:
        figure.supxlabel(safe(fill(f"LEAKED: {warning}", 120)), color=RED, fontsize=9)
    return save(figure, path)


def _order(row: Row) -> float:
    """Levels as a person reads them: speckle from many looks to one, all others from small to large."""
    if row.corruption == "speckle":
        return float("-inf") if row.level is None else -row.level
    return row.level or 0.0
