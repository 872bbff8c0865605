"""How a run went: speed over the hours, and where the time of each logged stretch went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from foundation.evaluation.figures.style import COLOURS, canvas, number, save
from foundation.inspecting.attempts import Attempt
from foundation.inspecting.timing import Window

PARTS = {"data": COLOURS[1], "checkpoints": COLOURS[3], "monitor": COLOURS[4], "rest": "#c9dff0"}


def speed_figure(windows: Sequence[Window], attempts: Sequence[Attempt], path: Path) -> Path:
    """Images per second over the time since the first start; a gap and a dashed line at each restart → PNG."""
    figure, axes = canvas(9.0, 3.0)
    zero = min([windows[0].end - windows[0].seconds, *(attempt.began for attempt in attempts)])
    begins = [attempt.began for attempt in attempts[1:]]
    ends = np.array([window.end for window in windows])
    unit, word = scale(ends[-1] - zero)
    groups = np.searchsorted(begins, ends)
    for group in np.unique(groups):
        mine = [window for window, belongs in zip(windows, groups == group, strict=True) if belongs]
        times = [(window.end - zero) / unit for window in mine]
        mark = "o" if len(mine) < 3 else None
        axes.plot(times, [w.images_per_s for w in mine], color=COLOURS[0], linewidth=1.5, marker=mark, markersize=3.5)
    for index, begin in enumerate(begins):
        label = "restart" if index == 0 else None
        axes.axvline((begin - zero) / unit, color=COLOURS[5], linewidth=1.2, linestyle="--", label=label)
    axes.set(xlabel=f"{word} since the first start", ylabel="images / s")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(number)
    if begins:
        axes.legend(frameon=False, fontsize=9, loc="lower right")
    return save(figure, path)


def scale(seconds: float) -> tuple[float, str]:
    """The unit of an axis for so long a time: its seconds, and its name."""
    return (3600.0, "hours") if seconds > 2 * 3600 else (60.0, "minutes")


def time_figure(windows: Sequence[Window], path: Path) -> Path:
    """The share of each part of the time, in percent, over the time that was logged → PNG."""
    figure, axes = canvas(9.0, 3.0)
    unit, word = scale(sum(window.seconds for window in windows))
    width = np.array([window.seconds for window in windows]) / unit
    left = np.concatenate([[0.0], np.cumsum(width)[:-1]])
    parts = np.array([[w.data, w.checkpoint, w.monitor, w.rest] for w in windows]).T
    shares = 100 * parts / np.maximum(parts.sum(0), 1e-9)
    bottom = np.zeros(len(windows))
    for (name, colour), share in zip(PARTS.items(), shares, strict=True):
        axes.bar(left, share, width, bottom, align="edge", color=colour, label=name, linewidth=0)
        bottom += share
    axes.set(xlabel=f"logged {word}", ylabel="% of the time", ylim=(0, 100), xlim=(0, left[-1] + width[-1]))
    axes.legend(frameon=False, fontsize=9, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return save(figure, path)
