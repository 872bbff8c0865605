"""The one style of all figures: axes, colours that colour-blind readers can tell apart, numbers on axes, saving."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from foundation.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

T = TypeVar("T")
GREY = "#8a8a8a"
# Okabe and Ito's palette, without its yellow, which is lost on white; the third is for what is only background.
COLOURS = ("#0072b2", "#e08a00", GREY, "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#5b4b8a")
# An encoder has the same colour in every figure of every run.
KNOWN = {"pretrained": COLOURS[0], "random-init": COLOURS[1], "pixels": COLOURS[3], "background only": GREY}
MARKERS = ("o", "^", "s", "D", "v", "P", "X")


def grid(
    rows: int, columns: int, width: float, height: float, **options: Any
) -> tuple[Figure, np.ndarray[tuple[int, int], Any]]:
    """A figure of `width` × `height` inches and its axes [rows, columns]; no global plotting state is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure with one plain set of axes."""
    figure, axes = grid(1, 1, width, height)
    return figure, plain(axes[0, 0])


def plain(axes: Axes) -> Axes:
    """Axes without box, with a light grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    return axes


def bare(axes: Axes) -> Axes:
    """Axes of a picture: no ticks, no box."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return axes


def save(figure: Figure, path: Path) -> Path:
    """Write the PNG (the same bytes for the same figure) and return its path. Raises StorageError."""
    content = BytesIO()
    figure.savefig(content, format="png", dpi=120, facecolor="white", metadata={"Software": None})
    return write_whole(path, content.getvalue())


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name: those of the known encoders where it begins with one, the free ones in order else."""
    found: dict[str, str] = {}
    for name in names:
        known = next((c for n, c in KNOWN.items() if name.startswith(n) and c not in found.values()), None)
        free = [c for c in COLOURS if c not in found.values() and (known or c not in KNOWN.values())]
        free += [c for c in COLOURS if c not in found.values()]
        found[name] = known or (free[0] if free else COLOURS[len(found) % len(COLOURS)])
    return found


def unique(values: Iterable[T]) -> list[T]:
    """Each value once, in the order of its first appearance."""
    return list(dict.fromkeys(values))


def safe(text: str) -> str:
    """A name from outside as it is: a dollar sign would begin a formula, and a leading underscore hide a legend."""
    return ("\u200b" if text.startswith("_") else "") + text.replace("$", r"\$")


def count(value: float, _: float | None = None) -> str:
    """Samples on an axis: 12k, 3M, 1.5G."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"


def number(value: float, _: float | None = None) -> str:
    """Three digits are enough on an axis."""
    return f"{value:.3g}"


def sparse(value: float, _: float | None = None) -> str:
    """Labels of a logarithmic axis between the decades: 2 and 5 are enough."""
    return number(value) if f"{value:e}"[0] in "25" else ""
