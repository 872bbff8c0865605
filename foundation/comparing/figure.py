"""The results of a comparison as a figure: one panel per protocol, rows in the order of the file."""

from __future__ import annotations

from pathlib import Path

from foundation.comparing.results import Results
from foundation.evaluation.figures import COLOURS, grid, plain, save
from foundation.evaluation.protocols import RANDOM


def comparison_figure(results: Results, path: Path) -> Path:
    """Means with 95 % intervals and a tick for each pretraining seed; a cross is the same network untrained → PNG.

    Controls that do not depend on the row are lines across the panel.
    """
    lines = {name: values for name, values in results.controls.items() if not name.startswith(RANDOM)}
    rows, protocols = list(results.rows), results.protocols
    figure, axes = grid(1, len(protocols), 2.2 + 2.1 * len(protocols), 1.4 + 0.3 * len(rows))
    for column, protocol in enumerate(protocols):
        ax = plain(axes[0, column])
        for y, name in enumerate(rows):
            value = next(v for v in results.rows[name] if v.protocol == protocol)
            if value.values:
                colour = COLOURS[1] if y == 0 else COLOURS[0]
                ax.plot([100 * value.low, 100 * value.high], [y, y], color=colour, linewidth=2.4, alpha=0.45)
                ax.plot([100 * v for v in value.values], [y] * len(value.values), "|", color=colour, markersize=7)
                ax.plot(100 * value.mean, y, "o", color=colour, markersize=5)
                label = RANDOM if (column, y) == (0, 0) else None
                ax.plot(100 * value.untrained, y, "x", color="0.35", markersize=6, label=label)
        for number, (name, values) in enumerate(lines.items()):
            control = next(v for v in values if v.protocol == protocol)
            style = ("--", ":", "-.")[number % 3]
            label = name if column == 0 else None
            ax.axvline(100 * control.mean, color=COLOURS[2], linestyle=style, linewidth=1.2, label=label)
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.set_yticks(range(len(rows)), rows if column == 0 else [""] * len(rows), fontsize=9)
        ax.set_title(protocol, fontsize=10)
        ax.set_xlabel("accuracy [%]", fontsize=9)
        ax.margins(x=0.08)
    if results.warnings:
        figure.suptitle("\n".join(results.warnings), color="#b3261e", fontsize=9)
    figure.legend(loc="outside lower center", ncols=1 + len(lines), frameon=False, fontsize=9)
    return save(figure, path)
