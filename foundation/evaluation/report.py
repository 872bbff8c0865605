"""The report of a run: one HTML page that needs nothing beside it, and the PNG figures it shows."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foundation.evaluation.attention import attention_figure
from foundation.evaluation.figures import block_panels, curve_figure, reconstruction_panels, score_figure, target_panels
from foundation.evaluation.scores import Score, to_rows
from foundation.files import write_whole
from shards.errors import DataError

__all__ = [
    "attention_figure",
    "block_panels",
    "curve_figure",
    "reconstruction_panels",
    "score_figure",
    "target_panels",
    "write_report",
]

PNG = b"\x89PNG\r\n\x1a\n"


def write_report(
    run_folder: Path,
    *,
    metrics: Sequence[Mapping[str, Any]],
    panels: Mapping[str, bytes | Path],
    scores: Sequence[Score],
    config_yaml: str,
    environment: Mapping[str, Any],
    title: str,
) -> Path:
    """Write `report.html` into the run folder and return its path.

    `metrics` are the run's rows (`samples`, `loss`, `lr`); `panels` maps a caption to a PNG (bytes or path), in the
    order they are shown. Curves and scores are drawn here, into `figures/`, when there are any. Every text is escaped.
    Raises DataError when a panel is not a readable PNG.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    drawn: dict[str, bytes | Path] = {}
    if metrics:
        drawn["Loss and learning rate"] = curve_figure(metrics, run_folder / "figures" / "curves.png")
    drawn |= panels
    if scores:
        drawn["Scores"] = score_figure(scores, run_folder / "figures" / "scores.png")
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    html = pages.get_template("report.html.j2").render(
        title=title,
        facts=_facts(metrics),
        figures={caption: base64.b64encode(_png(caption, source)).decode() for caption, source in drawn.items()},
        scores=to_rows(scores),
        config=config_yaml,
        environment=environment,
    )
    path = run_folder / "report.html"
    return write_whole(path, html)


def _facts(metrics: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What the top of the page says about the run."""
    samples = [m["samples"] for m in metrics if m.get("samples") is not None]
    losses = [m["loss"] for m in metrics if m.get("loss") is not None]
    facts = {"samples seen": f"{max(samples):,}"} if samples else {}
    return facts | ({"first loss": f"{losses[0]:.4g}", "last loss": f"{losses[-1]:.4g}"} if losses else {})


def _png(caption: str, source: bytes | Path) -> bytes:
    where = f"panel «{caption}»" + (f", {source}" if isinstance(source, Path) else "")
    try:
        data = source.read_bytes() if isinstance(source, Path) else source
    except OSError as error:
        raise DataError(f"a figure of the report cannot be read: {error.strerror}", where=where) from error
    if not data.startswith(PNG):
        raise DataError("a figure of the report is not a PNG", where=where, do="pass PNG bytes or the path of a PNG")
    return data
