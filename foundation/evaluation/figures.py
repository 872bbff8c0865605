"""PNG figures of a run. SAR amplitudes are drawn grey with gamma 1/2, targets and predictions on the same scale."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from foundation.evaluation.scores import Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#3b6fb6", "#d08b2c", "#8a8a8a", "#4f9d69", "#b5525c")
WINDOW_OUT, MASKED = (0.55, 0.60, 0.70, 0.75), (0.85, 0.35, 0.25, 0.85)


def grid(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """A figure of `width` × `height` inches and its axes [rows, columns]; no global plotting state is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure with one plain set of axes."""
    figure, axes = grid(1, 1, width, height)
    return figure, plain(axes[0, 0])


def plain(axes: Axes) -> Axes:
    """Axes without box, with a light grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    return axes


def save(figure: Figure, path: Path) -> Path:
    """Write the PNG (the same bytes for the same figure) and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, facecolor="white", metadata={"Software": None})
    return path


def curve_figure(metrics: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Loss (linear and logarithmic) and learning rate over samples: rows with `samples`, `loss`, `lr` → PNG.

    Rows without a key are left out of its curve; losses that are not finite are gaps.
    """
    figure, axes = grid(1, 3, 11.0, 3.3)
    for ax, key, title in zip(axes[0], ("loss", "loss", "lr"), ("loss", "loss (log)", "learning rate"), strict=True):
        rows = [(m["samples"], m[key]) for m in metrics if m.get(key) is not None and m.get("samples") is not None]
        x, y = np.array(rows, dtype=float).reshape(-1, 2).T
        smooth = len(y) > 60 and key == "loss" and bool(np.isfinite(y).all())
        plain(ax).plot(x, y, color=COLOURS[0], linewidth=0.7 if smooth else 1.4, alpha=0.35 if smooth else 1)
        if smooth:
            width = max(5, len(y) // 50)
            ax.plot(x[width // 2 : width // 2 + len(y) - width + 1], np.convolve(y, np.ones(width) / width, "valid"),
                    color=COLOURS[0], linewidth=1.6)  # fmt: skip
        if title.endswith("(log)") and (y > 0).any():
            ax.set_yscale("log")
            ax.yaxis.set_minor_formatter(_sparse)
        ax.set(title=title, xlabel="samples seen")
        ax.locator_params(axis="x", nbins=5)
        ax.xaxis.set_major_formatter(_count)
        ax.yaxis.set_major_formatter(_number)
    return save(figure, path)


def _count(value: float, _: int | None = None) -> str:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"


def _number(value: float, _: int | None = None) -> str:
    return f"{value:.3g}"


def _sparse(value: float, _: int | None = None) -> str:
    """Labels of a logarithmic axis between the decades: 2 and 5 are enough."""
    return _number(value) if f"{value:e}"[0] in "25" else ""


def _picture(axes: Axes, image: np.ndarray, title: str = "", **style: Any) -> Any:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    if title:
        axes.set_title(title, fontsize=10)
    return axes.imshow(np.ma.masked_invalid(image), interpolation="nearest", **style)


def _sar(axes: Axes, image: np.ndarray, title: str = "") -> None:
    _picture(axes, np.sqrt(image.clip(0, 1)), title, cmap="gray", vmin=0, vmax=1)


def _limits(values: np.ndarray) -> tuple[float, float]:
    """The 1st and 99th percentile of what is finite, never equal."""
    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite, (1, 99)) if finite.size else (0.0, 1.0)
    return float(low), float(max(high, low + 1e-6))


def _style(values: np.ndarray) -> dict[str, Any]:
    """Colour map and limits of a feature; what is not finite is drawn light grey."""
    from matplotlib import colormaps

    low, high = _limits(values)
    return {"cmap": colormaps["magma"].with_extremes(bad="0.88"), "vmin": low, "vmax": high}


def map_title(name: str) -> str:
    """What stands over a map: `r5` is a radius, other names speak for themselves."""
    return f"r = {name[1:]}" if re.fullmatch(r"r\d+", name) else name.replace("_", " ")


def target_panels(images: Tensor, targets: Tensor, names: Sequence[str], path: Path) -> Path:
    """Each image beside every map of its target: images [n, 1, S, S], targets [n, maps, h, w] → PNG."""
    pixels, values = images[:, 0].float().cpu().numpy(), targets.float().cpu().numpy()
    rows, columns = len(pixels), 1 + values.shape[1]
    figure, axes = grid(rows, columns, 1.9 * columns, 1.9 * rows + 0.55)
    for row in range(rows):
        _sar(axes[row, 0], pixels[row], "" if row else "image")
        for scale, name in enumerate(names):
            title = "" if row else map_title(name)
            shown = _picture(axes[row, 1 + scale], values[row, scale], title, **_style(values[:, scale]))
            if row == rows - 1:
                figure.colorbar(shown, ax=axes[row, 1 + scale], location="bottom", shrink=0.85, aspect=18)
    return save(figure, path)


def reconstruction_panels(
    images: Tensor, masks: Tensor, targets: Tensor, predictions: Tensor, path: Path, names: Sequence[str] | None = None
) -> Path:
    """Two rows per image: image and targets, masked image and predictions on the targets' colour limits → PNG.

    images [n, 1, S, S]; masks [n, gh, gw], true where masked, NaN or -1 outside the windows (which is drawn pale);
    targets and predictions [n, maps, h, w], NaN where there is none.
    """
    pixels, wanted, got = images[:, 0].float().cpu().numpy(), targets.float().cpu().numpy(), predictions.float().cpu()
    rows, scales = len(pixels), wanted.shape[1]
    figure, axes = grid(2 * rows, 1 + scales, 1.9 * (1 + scales), 3.9 * rows + 0.3)
    for i in range(rows):
        _sar(axes[2 * i, 0], pixels[i], "" if i else "image")
        _sar(axes[2 * i + 1, 0], pixels[i])
        axes[2 * i + 1, 0].imshow(_veil(masks[i].float().cpu().numpy(), pixels[i].shape), interpolation="nearest")
        axes[2 * i, 0].set_ylabel("target", fontsize=10)
        axes[2 * i + 1, 0].set_ylabel("mask, prediction", fontsize=10)
        for scale in range(scales):
            title = map_title(names[scale]) if names else f"scale {scale + 1}"
            style = _style(wanted[:, scale])
            _picture(axes[2 * i, 1 + scale], wanted[i, scale], "" if i else title, **style)
            _picture(axes[2 * i + 1, 1 + scale], got[i, scale].numpy(), **style)
    return save(figure, path)


def block_panels(images: Tensor, context: Tensor, targets: Tensor, patch: int, path: Path) -> Path:
    """Each image, its context, and each of its target blocks in red, the rest pale → PNG.

    images [n, 1, S, S]; raster ids of patches int64: context [n, c], targets [n, T, m].
    """
    pixels, side = images[:, 0].float().cpu().numpy(), images.shape[-1] // patch
    rows, columns = len(pixels), 2 + targets.shape[1]
    figure, axes = grid(rows, columns, 1.9 * columns, 1.9 * rows + 0.3)
    for row in range(rows):
        _sar(axes[row, 0], pixels[row], "" if row else "image")
        shown = [("context", context[row], 0.0), *((f"target {n + 1}", t, 1.0) for n, t in enumerate(targets[row]))]
        for column, (title, ids, state) in enumerate(shown, start=1):
            mask = np.full(images.shape[-2] // patch * side, np.nan)
            mask[ids.cpu().numpy()] = state
            _sar(axes[row, column], pixels[row], "" if row else title)
            axes[row, column].imshow(_veil(mask.reshape(-1, side), pixels[row].shape), interpolation="nearest")
    return save(figure, path)


def _veil(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Colours [S, S, 4] over an image: masked patches red, patches outside the windows pale, the rest clear."""
    veil = np.zeros((*mask.shape, 4))
    veil[mask > 0.5] = MASKED
    veil[~(mask >= 0)] = WINDOW_OUT
    return veil.repeat(shape[0] // mask.shape[0], 0).repeat(shape[1] // mask.shape[1], 1)


def score_figure(scores: Sequence[Score], path: Path) -> Path:
    """Scores with their 95 % intervals, one group of lines per protocol and metric, one colour per encoder → PNG."""
    groups, encoders = _unique((s.protocol, s.metric) for s in scores), _unique(s.encoder for s in scores)
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(encoders)}
    figure, axes = canvas(8.0, 1.1 + 0.22 * len(groups) * (len(encoders) + 1))
    ticks: list[float] = []
    unnamed = set(encoders)
    for number, group in enumerate(groups):
        top = number * (len(encoders) + 1.0)
        ticks.append(top + (len(encoders) - 1) / 2)
        for s in (s for s in scores if (s.protocol, s.metric) == group):
            y = top + encoders.index(s.encoder)
            axes.plot([100 * s.low, 100 * s.high], [y, y], color=colour[s.encoder], linewidth=2.4, alpha=0.45)
            axes.plot([100 * v for v in s.per_seed], [y] * len(s.per_seed), "|", color=colour[s.encoder], markersize=7)
            label = s.encoder if s.encoder in unnamed else ""
            unnamed.discard(s.encoder)
            axes.plot(100 * s.mean, y, "o", color=colour[s.encoder], markersize=6, label=label)
            axes.annotate(f"{100 * s.mean:.1f}", (100 * s.high, y), (5, 0), textcoords="offset points", va="center",
                          fontsize=8, color="0.3")  # fmt: skip
    axes.set_yticks(ticks, [f"{protocol}\n{metric}" for protocol, metric in groups], fontsize=9)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 105)
    axes.set_xlabel("score [%], 95 % interval, ticks are seeds")
    figure.legend(loc="outside upper center", ncols=len(encoders), frameon=False, fontsize=9)
    return save(figure, path)


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
