"""`foundation bench kernels`: both operators beside their published definitions, against the roofline of the device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from foundation.bench import Table, compact, environment, environment_line, here, markdown, roof_line, span, write
from foundation.errors import StorageError
from kernels.bench import Budget, Clock, Roof, Row, Work, first_line, measure_roof
from kernels.bench_attention import ALL, BOTH, CEILING, FORWARD, PUBLISHED, attention
from kernels.bench_target import one_thread, target

ATTENTION_HEADER = (
    *("backend", "forward ms", "of roof", "backward ms", "both ms", "GB/s", "TFLOP/s", "of roof", "× published"),
    *("peak MB", "error: output", "gradients", "same bits"),
)
TARGET_HEADER = ("pixels", "backend", "µs / image", "GB/s", "of copy", "× published", "peak MB", "max error")
LOSS_HEADER = (
    *("backend", "forward µs / image", "both µs / image", "of copy", "× published", "peak MB"),
    *("error: loss", "gradient", "same bits"),
)


class Report(NamedTuple):
    """Everything of one run."""

    environment: dict[str, Any]
    roof: Roof
    target_roof: Roof
    """copies as the target's operators run: on a CPU by one thread"""
    rows: list[Row]

    def to_json(self) -> dict[str, Any]:
        """What is written down: intensities are of the fused operator."""
        rows = [{**asdict(row), "flops": row.work.flops, "nbytes": row.work.nbytes} for row in self.rows]
        for row in rows:
            del row["work"]
        roof = {"copy_bytes_per_s": self.roof.copy, "gemm_flop_per_s": self.roof.gemm}
        return {
            "environment": self.environment,
            "roofline": {**roof, "copy_bytes_per_s_of_target": self.target_roof.copy},
            "rows": rows,
        }


def measure(
    repeats: int = 30, quick: bool = False, budget: float = 420.0, progress: Callable[[str], None] = lambda _: None
) -> Report:
    """The target first, which takes seconds; then attention from the shapes of the pretraining to long sequences."""
    device, limit = here(), Budget(budget)
    clock, described = Clock(device), environment(device)
    progress("roofline")
    roof = measure_roof(clock, quick)
    with one_thread(device):
        target_roof = measure_roof(clock, quick, products=False) if device.type == "cpu" else roof
    rows: list[Row] = []
    groups = {
        "target": target(device, clock, Roof(target_roof.copy, {}), repeats, limit, quick),
        "attention": attention(device, clock, roof, repeats, limit, quick),
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        for what, found in groups.items():
            try:
                for row in found:
                    progress(f"{row.what}, {row.shape}, {row.dtype}")
                    rows.append(row)
            except Exception as error:  # what broke the device must not take what was measured before it along
                rows.append(Row(what, "the rest", ALL, FORWARD, "-", Work(0, 0), first_line(error)))
    progress("roofline")
    with suppress(RuntimeError):  # of a device that a backend broke
        roof = roof.best(measure_roof(clock, quick))
        with one_thread(device):
            target_roof = target_roof.best(measure_roof(clock, quick, products=False)) if device.type == "cpu" else roof
    for row in rows:
        if row.ms:
            row.fill(row.ms / 1e3, row.repeats, roof if row.what == "attention" else Roof(target_roof.copy, {}))
    return Report(described, roof, target_roof, rows)


def tables(report: Report) -> Iterator[Table]:
    """The target, the loss, attention by shape and dtype, and what has no time, with the reason."""
    rows = report.rows
    if maps := [row for row in rows if row.what == "target" and row.ms]:
        base = _published(maps)
        lines = [_target_line(row, base) for row in maps]
        yield compact(Table(f"Gradient-ratio maps, {maps[0].shape}", TARGET_HEADER, lines))
    if losses := [row for row in rows if row.what == "loss"]:
        yield compact(Table(f"Masked loss, {losses[0].shape}", LOSS_HEADER, list(_loss_lines(losses))))
    for (shape, dtype), group in groupby(
        (row for row in rows if row.what == "attention" and row.ms), lambda row: (row.shape, row.dtype)
    ):
        yield compact(Table(f"Attention, {shape}, {dtype}", ATTENTION_HEADER, list(_attention_lines(list(group)))))
    if missing := list(_missing(rows)):
        yield Table("Without a time", ("what", "backend", "reason"), missing)


def _published(rows: Iterable[Row]) -> float | None:
    return next((row.ms for row in rows if row.backend == PUBLISHED), None)


def _pairs(rows: list[Row]) -> Iterator[tuple[str, Row | None, Row | None]]:
    """Every backend once: its row forward, its row forward and backward."""
    for backend in dict.fromkeys(row.backend for row in rows if row.ms):
        mine = {row.direction: row for row in rows if row.backend == backend and row.ms}
        yield backend, mine.get(FORWARD), mine.get(BOTH)


def _attention_lines(rows: list[Row]) -> Iterator[tuple[str, ...]]:
    base = _published(row for row in rows if row.direction == BOTH)
    for backend, forward, both in _pairs(rows):
        assert forward is not None
        name = f"{backend}, fp32" if backend == PUBLISHED else backend
        first = (name, number(forward.ms), share(forward.share))
        if both is None:
            yield (*first, *("-",) * 6, megabytes(forward.peak), tiny(forward.error), "-", "-")
            continue
        rates = (
            number(both.last_ms),
            number(both.ms),
            number(both.gb_s),
            number(both.tflop_s),
            share(both.share),
            times(base, both.ms),
        )
        end = megabytes(both.peak), tiny(forward.error), tiny(both.error), "yes" if both.same_bits else "no"
        yield (*first, *rates, *end)


def _target_line(row: Row, base: float | None) -> tuple[str, ...]:
    took = number(_per_image(row))
    rates = number(row.gb_s), share(row.share), times(base, row.ms), megabytes(row.peak), tiny(row.error)
    return (row.dtype, row.backend, took, *rates)


def _loss_lines(rows: list[Row]) -> Iterator[tuple[str, ...]]:
    base = _published(row for row in rows if row.direction == BOTH)
    for backend, forward, both in _pairs(rows):
        assert forward is not None
        assert both is not None
        name = f"{backend}, fp32" if backend == PUBLISHED else backend
        took = number(_per_image(forward)), number(_per_image(both))
        rates = share(both.share), times(base, both.ms), megabytes(both.peak)
        yield (name, *took, *rates, tiny(forward.error), tiny(both.error), "yes" if both.same_bits else "no")


def _per_image(row: Row) -> float | None:
    batch = int(row.shape.split("B=")[1].split(",")[0])
    return None if row.ms is None else row.ms * 1e3 / batch


def _missing(rows: list[Row]) -> Iterator[tuple[str, ...]]:
    """One line for each backend and reason, with every shape that it holds for."""
    places: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.reason:
            places.setdefault((row.what, row.backend, row.reason), []).append(row)
    for (what, backend, reason), found in places.items():
        shapes = {row.shape for row in rows if row.what == what and row.backend != ALL}
        everywhere = shapes == {row.shape for row in found}
        where = "" if everywhere else ": " + "; ".join(dict.fromkeys(row.shape for row in found))
        only = f", {BOTH}" if {row.direction for row in found} == {BOTH} else ""
        yield f"{what}{where}{only}", backend, reason


def number(value: float | None) -> str:
    """Three figures."""
    return "-" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def share(value: float | None) -> str:
    """Percent."""
    return "-" if value is None else f"{100 * value:.2g}%" if value < 0.1 else f"{value:.0%}"


def times(base: float | None, value: float | None) -> str:
    """How many times faster than the base."""
    return "-" if not base or not value else f"{base / value:.1f}"


def tiny(value: float | None) -> str:
    """An error."""
    return "-" if value is None else f"{value:.1e}"


def megabytes(value: int | None) -> str:
    """Bytes as MB."""
    return "-" if value is None else f"{value / 1e6:,.0f}"


def intro(report: Report, command: str) -> str:
    """What a reader needs to know beside the tables."""
    repeats = [row.repeats for row in report.rows if row.repeats]
    return (
        f"`{command}` on {environment_line(report.environment)}; {roof_line(report.roof)}. Medians of {span(repeats)} "
        "repeats, taken in turn; both: forward and backward. Bytes and operations are those of a fused operator, "
        f"whatever a backend does; `{CEILING}` leaves the position term out and is no alternative. Errors are against "
        "float64 of the same inputs: the largest absolute one of maps, otherwise relative to the largest value. Peak "
        "memory is above the inputs. On a CPU the target and the loss run on one thread, in processor time."
    )


def save(report: Report, out: Path, command: str) -> list[Path]:
    """kernels.json, kernels.md and kernels.png in a folder. Raises StorageError."""
    page = markdown("Kernels", intro(report, command), tables(report))
    return [*write(out, "kernels", report.to_json(), page), draw(report, out / "kernels.png")]


MARKS = "osD^vPX*"


def draw(report: Report, path: Path) -> Path:
    """The roofline: operations per byte against TFLOP/s, a point for each backend (colour) and shape (mark)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = [row for row in report.rows if row.what == "attention" and row.tflop_s]
    drawing = Figure(figsize=(12, 5.4), layout="constrained")
    FigureCanvasAgg(drawing)
    for axes, direction in zip(drawing.subplots(1, 2, sharey=True), (FORWARD, BOTH), strict=True):
        _panel(axes, report.roof, points, direction)
    handles, labels = _legend(points)
    drawing.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    drawing.suptitle(f"{report.environment['device']}: attention with a position table, fused bytes and operations")
    try:
        drawing.savefig(path, dpi=130, format="png")
    except OSError as error:
        what = f"cannot be written: {error.strerror}"
        raise StorageError(what, where=str(path), do="choose another --out") from error
    return path


def _colours(points: list[Row]) -> dict[str, Any]:
    from matplotlib import colormaps

    names = dict.fromkeys(row.backend for row in points)
    return dict(zip(names, colormaps["tab10"].colors, strict=False))  # type: ignore[attr-defined]


def _kinds(points: list[Row]) -> dict[tuple[str, str], str]:
    """A mark for each shape; dtypes differ in being filled."""
    shapes = dict.fromkeys(row.shape for row in points)
    return {(shape, dtype): mark for shape, mark in zip(shapes, MARKS, strict=False) for dtype in _dtypes(points)}


def _dtypes(points: list[Row]) -> list[str]:
    return list(dict.fromkeys(row.dtype for row in points))


def _panel(axes: Any, roof: Roof, points: list[Row], direction: str) -> None:
    colours, kinds, dtypes = _colours(points), _kinds(points), _dtypes(points)
    edges = [rate / roof.copy for rate in roof.gemm.values()]
    intensities = [row.work.flops / row.work.nbytes for row in points]
    low, high = min(edges + intensities) / 2, max(edges + intensities) * 2
    styles = dict(zip(sorted(roof.gemm), ("-", "--"), strict=False))
    for dtype, rate in sorted(roof.gemm.items()):
        edge = rate / roof.copy
        x = [low, edge, max(high, edge)]
        axes.plot(x, [min(i * roof.copy, rate) / 1e12 for i in x], color="0.35", linewidth=1.2, linestyle=styles[dtype])
        label = f"{dtype} products {rate / 1e12:.3g} TFLOP/s"
        axes.annotate(label, (high, rate / 1e12), (-4, 4), textcoords="offset points", fontsize=8, ha="right")
    mine = [row for row in points if row.direction == direction]
    for row in mine:
        filled = colours[row.backend] if row.dtype == dtypes[0] else "none"
        slot = list(colours).index(row.backend) - (len(colours) - 1) / 2  # beside one another, or they hide each other
        x = row.work.flops / row.work.nbytes * 1.035**slot
        mark = kinds[row.shape, row.dtype]
        axes.plot(x, row.tflop_s, mark, color=colours[row.backend], markerfacecolor=filled, markersize=7, alpha=0.9)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", title=direction, xlim=(low, high))
    axes.grid(which="major", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.annotate(
        f"copy {roof.copy / 1e9:.3g} GB/s", (low * 1.3, low * 1.3 * roof.copy / 1e12), (6, -12), fontsize=8,
        textcoords="offset points",
    )  # fmt: skip
    if direction == FORWARD:
        axes.set_ylabel("TFLOP/s")


def _legend(points: list[Row]) -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D

    handles, labels = [], []
    for backend, colour in _colours(points).items():
        handles.append(Line2D([], [], marker="o", linestyle="none", color=colour))
        labels.append(f"{backend}, fp32" if backend == PUBLISHED else backend)
    for shape in dict.fromkeys(row.shape for row in points):
        mark = _kinds(points)[shape, _dtypes(points)[0]]
        handles.append(Line2D([], [], marker=mark, linestyle="none", color="0.4"))
        labels.append(shape)
    if len(_dtypes(points)) > 1:
        for dtype, filled in zip(_dtypes(points), ("0.4", "none"), strict=False):
            handles.append(Line2D([], [], marker="o", linestyle="none", color="0.4", markerfacecolor=filled))
            labels.append(dtype)
    return handles, labels
