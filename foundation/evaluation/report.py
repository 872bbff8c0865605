"""The report of a run: one HTML page that needs nothing beside it, and the PNG figures it shows."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from foundation.evaluation.figures.answers import confusion_figure, reliability_figure
from foundation.evaluation.figures.curves import curve_figure
from foundation.evaluation.figures.scores import fewshot_figure, score_figure
from foundation.evaluation.leaks import Verdict, reason
from foundation.evaluation.predictions import Predictions
from foundation.evaluation.scores import Score, to_rows
from foundation.files import write_whole
from foundation.inspecting.text import Section
from shards.errors import DataError

PNG = b"\x89PNG\r\n\x1a\n"
FIGURES = "figures"
CONTROLS = ("random-init", "background only", "pixels")
SHOWN = 6  # confusion matrices on the page
# Anchor → title, in the order of the page.
SECTIONS = {
    "facts": "Facts",
    "leakage": "Leakage",
    "curves": "Training curves",
    "throughput": "Throughput",
    "time": "Where the time went",
    "restarts": "Attempts and restarts",
    "events": "Guard and monitor",
    "checkpoints": "Checkpoints",
    "coverage": "Data",
    "stragglers": "Stragglers",
    "standstill": "Standstill",
    "targets": "Targets and predictions",
    "features": "Features",
    "attention": "Attention",
    "robustness": "Robustness",
    "scores": "Scores",
    "confusion": "Confusion and calibration",
    "configuration": "Configuration",
    "environment": "Environment",
}
Panels = Mapping[str, Mapping[str, bytes | Path]]


def write_report(
    run_folder: Path,
    *,
    metrics: Sequence[Mapping[str, Any]],
    panels: Panels,
    scores: Sequence[Score],
    config_yaml: str,
    environment: Mapping[str, Any],
    title: str,
    predictions: Sequence[Predictions] = (),
    verdict: Verdict | None = None,
    listings: Mapping[str, Section] | None = None,
) -> Path:
    """Write `report.html` into the run folder and return its path.

    `metrics` are the run's rows (`samples`, `loss`, `lr`); `panels` maps a section of SECTIONS to its figures, a
    caption and a PNG (bytes or path) each, in the order they are shown, `listings` to its table. Curves, scores and
    answers are drawn here, into `figures/`, where there are any. Every text is escaped. Raises DataError when a
    panel is not a readable PNG.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder, warning = run_folder / FIGURES, verdict.warning if verdict else ""
    curves = {"Loss and learning rate": curve_figure(metrics, folder / "curves.png")} if metrics else {}
    drawn: dict[str, Mapping[str, bytes | Path]] = {
        "curves": curves,
        **panels,
        "scores": _score_figures(scores, folder, warning),
        "confusion": _answer_figures(predictions, folder),
    }
    encoded = {anchor: {caption: base64.b64encode(_png(caption, source)).decode() for caption, source in found.items()}
               for anchor, found in drawn.items()}  # fmt: skip
    facts = _facts(metrics)
    shown = {**(listings or {})} | {anchor: found for anchor, found in encoded.items() if found}
    present: dict[str, object] = {"facts": facts, "leakage": verdict, **shown}
    present |= dict.fromkeys(("configuration", "environment"), True)
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    html = pages.get_template("report.html.j2").render(
        title=title,
        sections={anchor: name for anchor, name in SECTIONS.items() if present.get(anchor)},
        facts=facts,
        figures=encoded,
        listings=listings or {},
        scores=to_rows(scores),
        reasons=[reason(s, warning) for s in scores],
        verdict=verdict,
        config=config_yaml,
        environment=environment,
    )
    return write_whole(run_folder / "report.html", html)


def _facts(metrics: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What the top of the page says about the run."""
    samples = [m["samples"] for m in metrics if m.get("samples") is not None]
    losses = [m["loss"] for m in metrics if m.get("loss") is not None]
    facts = {"samples seen": f"{max(samples):,}"} if samples else {}
    return facts | ({"first loss": f"{losses[0]:.4g}", "last loss": f"{losses[-1]:.4g}"} if losses else {})


def _score_figures(scores: Sequence[Score], folder: Path, warning: str) -> dict[str, bytes | Path]:
    """All scores on one picture, and the few-shot ones over their numbers of shots."""
    if not scores:
        return {}
    shots = fewshot_figure(scores, folder / "few-shot.png", warning)
    figures: dict[str, bytes | Path] = {"Few-shot curves": shots} if shots else {}
    return figures | {"Scores": score_figure(scores, folder / "scores.png", warning)}


def _answer_figures(predictions: Sequence[Predictions], folder: Path) -> dict[str, bytes | Path]:
    """One reliability diagram, and a confusion matrix per protocol of the encoder in question; few-shot: most shots."""
    chosen = dict(headline(predictions))
    if not chosen:
        return {}
    figures: dict[str, bytes | Path] = {}
    for name, found in list(chosen.items())[:SHOWN]:
        p = found[0]
        words = re.sub(r"\W+", "-", name).strip("-")
        figures[f"Confusion matrix: {name}"] = confusion_figure(p, folder / f"confusion-{words}.png")
    few = dict(list(chosen.items())[:3])
    return figures | {"Reliability": reliability_figure(few, folder / "reliability.png")}


def control(encoder: str) -> int:
    """The rank of an encoder among the controls, -1 for none."""
    return next((rank for rank, name in enumerate(CONTROLS) if encoder.startswith(name)), -1)


def headline(predictions: Sequence[Predictions]) -> Iterator[tuple[str, list[Predictions]]]:
    """Protocol and measurement → its encoders, controls last; of few-shot protocols only the one with most shots."""
    groups: dict[tuple[str, str], dict[int, list[Predictions]]] = {}
    for p in predictions:
        shots = re.match(r"(\d+)-shot ", p.protocol)
        kind = p.protocol[shots.end() :] + ", few-shot" if shots else p.protocol
        groups.setdefault((kind, p.measurement), {}).setdefault(int(shots[1]) if shots else 0, []).append(p)
    several = len({measurement for _, measurement in groups}) > 1
    for (_, measurement), by_shots in groups.items():
        found = by_shots[max(by_shots)]
        found.sort(key=lambda p: (control(p.encoder), p.encoder))
        yield found[0].protocol + (f" ({measurement})" if several else ""), found


def _png(caption: str, source: bytes | Path) -> bytes:
    where = f"panel «{caption}»" + (f", {source}" if isinstance(source, Path) else "")
    try:
        data = source.read_bytes() if isinstance(source, Path) else source
    except OSError as error:
        what = f"a figure of the report cannot be read: {error.strerror}"
        raise DataError(what, where=where, do="draw it again: foundation report RUN") from error
    if not data.startswith(PNG):
        raise DataError("a figure of the report is not a PNG", where=where, do="pass PNG bytes or the path of a PNG")
    return data
