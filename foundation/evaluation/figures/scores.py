"""Scores: never a number without its interval, its seeds and its controls."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from foundation.evaluation.figures.style import MARKERS, canvas, colours, count, grid, plain, safe, save, unique
from foundation.evaluation.leaks import reason
from foundation.evaluation.scores import Score

RED = "#b3001b"
_SHOTS = re.compile(r"^(\d+)-shot (.+)$")


def line_names(scores: Sequence[Score]) -> list[str]:
    """The encoder of each score, and behind it those of weights, data and crop in which the scores differ."""
    differ = [key for key in ("weights", "data", "crop") if len({s.settings.get(key) for s in scores}) > 1]
    origins = [", ".join(f"{key} {s.settings.get(key) or 'not recorded'}" for key in differ) for s in scores]
    return [f"{s.encoder} ({origin})" if origin else s.encoder for s, origin in zip(scores, origins, strict=True)]


def score_figure(scores: Sequence[Score], path: Path, warning: str = "") -> Path:
    """Scores with their 95 % intervals, one group of lines per protocol and metric, one colour per encoder → PNG.

    Scores that mean nothing, because test images were seen or for the `warning`, have a red cross and say so.
    """
    labels = line_names(scores)
    encoders = unique(labels)
    colour, groups = colours(encoders), unique((s.protocol, s.metric) for s in scores)
    rows = {group: [(s, n) for s, n in zip(scores, labels, strict=True) if (s.protocol, s.metric) == group]
            for group in groups}  # fmt: skip
    lines = sum(len(row) for row in rows.values()) + len(groups)
    legend_rows = -(-len(encoders) // (4 if max(map(len, encoders)) < 24 else 2))
    figure, axes = canvas(8.0, 0.9 + 0.23 * (lines + legend_rows))
    ticks: list[float] = []
    unnamed, y = set(encoders), 0.0
    for group in groups:
        ticks.append(y + (len(rows[group]) - 1) / 2)
        for s, name in rows[group]:
            bad = reason(s, warning)
            axes.plot([100 * s.low, 100 * s.high], [y, y], color=colour[name], linewidth=2.4, alpha=0.45)
            axes.plot([100 * v for v in s.per_seed], [y] * len(s.per_seed), "|", color=colour[name], markersize=7)
            label = safe(name) if name in unnamed else ""
            unnamed.discard(name)
            axes.plot(100 * s.mean, y, "o", color=colour[name], markersize=6, label=label)
            if bad:
                axes.plot(100 * s.mean, y, "x", color=RED, markersize=9, markeredgewidth=2)
            axes.annotate(f"{100 * s.mean:.1f}" + bool(bad) * "  LEAKED", (100 * s.high, y), (5, 0), va="center",
                          textcoords="offset points", fontsize=8, color=RED if bad else "0.3")  # fmt: skip
            y += 1
        y += 1
    axes.set_yticks(ticks, [safe(f"{protocol}\n{metric}") for protocol, metric in groups], fontsize=9)
    axes.set_ylim(y - 1.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 108)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("score [%], 95 % interval, ticks are seeds")
    columns = -(-len(encoders) // legend_rows)
    figure.legend(loc="outside upper center", ncols=columns, frameon=False, fontsize=9)
    return save(figure, path)


def fewshot_panels(scores: Sequence[Score]) -> dict[tuple[str, str], dict[str, list[tuple[int, Score]]]]:
    """The few-shot scores by (mode, metric), then by line (`line_names`), then by shots, of which there are several."""
    panels: dict[tuple[str, str], dict[str, list[tuple[int, Score]]]] = {}
    for s, name in zip(scores, line_names(scores), strict=True):
        if found := _SHOTS.match(s.protocol):
            panels.setdefault((found[2], s.metric), {}).setdefault(name, []).append((int(found[1]), s))
    for lines in panels.values():
        for points in lines.values():
            points.sort(key=lambda point: point[0])
    return {key: lines for key, lines in panels.items() if len({n for points in lines.values() for n, _ in points}) > 1}


def fewshot_figure(scores: Sequence[Score], path: Path, warning: str = "") -> Path | None:
    """Score over images per class, a line per encoder with 95 % intervals, a panel per mode and metric → PNG.

    None, and no file, where no mode has scores of two numbers of shots. Panels with scores that mean nothing say so.
    """
    panels = fewshot_panels(scores)
    if not panels:
        return None
    names = unique(name for lines in panels.values() for name in lines)
    colour, columns = colours(names), 2 if len(panels) == 4 else min(len(panels), 3)
    legend_rows = -(-len(names) // (4 if max(map(len, names)) < 24 else 2))
    rows = -(-len(panels) // columns)
    figure, axes = grid(rows, columns, max(6.4, 4.2 * columns), 3.6 * rows + 0.3 * legend_rows,
                        sharey=len({metric for _, metric in panels}) == 1)  # fmt: skip
    for ax, ((mode, metric), lines) in zip(axes.flat, panels.items(), strict=False):
        ax = plain(ax)
        shots = sorted({n for points in lines.values() for n, _ in points})
        for name, points in lines.items():
            index = names.index(name)
            shift = 1.018 ** (index - (len(names) - 1) / 2)  # intervals side by side, not on each other
            x, mean = [n * shift for n, _ in points], [100 * s.mean for _, s in points]
            error = [[100 * (s.mean - s.low) for _, s in points], [100 * (s.high - s.mean) for _, s in points]]
            ax.errorbar(x, mean, error, color=colour[name], marker=MARKERS[index % len(MARKERS)], markersize=5,
                        linewidth=1.5, elinewidth=1.2, capsize=3, label=safe(name))  # fmt: skip
        ax.set_xscale("log")
        ax.set_xticks(shots, [count(n) for n in shots], minor=False)
        ax.set_xticks([], minor=True)
        seeds = sorted({len(s.seeds) for points in lines.values() for _, s in points})
        leaked = any(reason(s, warning) for points in lines.values() for _, s in points)
        title = safe(f"{mode}, {metric}") + leaked * ": LEAKED"
        ax.set_title(title, fontsize=11, color=RED if leaked else "black")
        ax.set(xlabel="images per class", ylabel=f"{safe(metric)} [%], 95 % interval")
        drawn = "bootstrap" if seeds == [1] else f"{' or '.join(map(str, seeds))} draws"
        ax.annotate(drawn, (0.99, 0.02), xycoords="axes fraction", ha="right", fontsize=8, color="0.4")
    for ax in axes.flat[: len(panels)]:  # after all are drawn: panels may share their limits
        low, high = ax.get_ylim()
        ax.set_ylim(max(0, low), min(100, high))
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    handles = {box.get_label(): box for ax in axes.flat for box in ax.containers}
    columns = -(-len(names) // legend_rows)
    figure.legend(handles=list(handles.values()), loc="outside upper center", ncols=columns, frameon=False, fontsize=9)
    return save(figure, path)
