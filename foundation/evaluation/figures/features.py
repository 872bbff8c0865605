"""Features made visible: principal components of patches as colours, chips on a plane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from foundation.evaluation.figures.pictures import picture, sar
from foundation.evaluation.figures.style import COLOURS, MARKERS, bare, grid, safe, save

OTHERS = "0.75"


def pca_figure(images: Tensor, colours: Mapping[str, tuple[Tensor, float]], path: Path) -> Path:
    """Images [n, C, S, S] over one row of colours for each encoder, {name: ([n, h, w, 3], share of variance)} → PNG."""
    pixels = images[:, 0].float().cpu().numpy()
    rows, columns = 1 + len(colours), len(pixels)
    figure, axes = grid(rows, columns, 1.35 * columns + 0.4, 1.35 * rows + 0.1)
    for column in range(columns):
        sar(axes[0, column], pixels[column])
        for row, (values, _) in enumerate(colours.values(), start=1):
            picture(axes[row, column], values[column].numpy())
    axes[0, 0].set_ylabel("image", fontsize=10)
    for row, (name, (_, share)) in enumerate(colours.items(), start=1):
        axes[row, 0].set_ylabel(safe(f"{name}\n{100 * share:.0f} % of variance"), fontsize=9)
    return save(figure, path)


def class_styles(names: Sequence[str]) -> list[tuple[str, str]]:
    """A colour and a marker for each class, no two alike for up to 56 of them; those beyond are grey points."""
    colour, marker = len(COLOURS), len(MARKERS)
    pairs = [(COLOURS[i % colour], MARKERS[(i + i // colour) % marker]) for i in range(len(names))]
    return [pair if i < colour * marker else (OTHERS, ".") for i, pair in enumerate(pairs)]


def embedding_figure(
    panels: Mapping[str, tuple[Tensor, tuple[float, float, float]]], y: Tensor, classes: Sequence[str], path: Path
) -> Path:
    """Chips on a plane, a panel for each encoder, coloured by class → PNG.

    `panels` {name: (points [n, 2], share of chips whose nearest neighbour has their class, with its interval)}, `y`
    int64 [n] into `classes`.
    """
    labels = y.numpy()
    order = sorted(set(labels.tolist()), key=lambda label: classes[label])
    styles = class_styles(order)
    columns = len(panels)
    lines = -(-len(order) // 8)
    figure, axes = grid(1, columns, 4.0 * columns, 4.45 + 0.24 * lines)
    for index, (name, (points, (share, low, high))) in enumerate(panels.items()):
        ax, at = bare(axes[0, index]), points.numpy()
        ax.spines[:].set_visible(True)
        ax.spines[:].set_color("0.85")
        for label, (colour, marker) in zip(order, styles, strict=True):
            ax.plot(*at[labels == label].T, marker, color=colour, markersize=4.5, alpha=0.8, markeredgewidth=0,
                    label=safe(classes[label]))  # fmt: skip
        ax.margins(0.06)
        ax.set_title(safe(name), fontsize=11)
        ax.set_xlabel(f"nearest neighbour of the same class:\n{100 * share:.0f} % ({100 * low:.0f} – {100 * high:.0f})",
                      fontsize=9)  # fmt: skip
    handles, texts = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=-(-len(order) // lines), frameon=False, fontsize=9,
                  handletextpad=0.1, columnspacing=1.2)  # fmt: skip
    return save(figure, path)
