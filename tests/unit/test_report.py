"""The report is one page that needs nothing beside it, shows every figure, and never runs what it was given."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foundation.errors import DataError
from foundation.evaluation import report
from foundation.evaluation.scores import Score

METRICS = [{"samples": 64 * i, "loss": 2 / (i + 1), "lr": 1e-3} for i in range(80)]
SCORES = [
    Score(name, "10-shot linear", "accuracy", mean, mean - 0.05, mean + 0.05, (0, 1), (mean, mean), 50)
    for name, mean in (("<i>mine</i>", 0.7), ("random-init", 0.4), ("background only", 0.3))
]


def png(path: Path) -> np.ndarray:
    """The decoded figure, grey [H, W]; fails when it is not a PNG or is blank."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("L"))
    assert pixels.std() > 1
    return pixels


def page(folder: Path, **changes: object) -> str:
    given = {
        "metrics": METRICS,
        "panels": {},
        "scores": SCORES,
        "config_yaml": "name: a\n",
        "environment": {"torch": "2"},
        "title": "A run",
    }
    return report.write_report(folder, **{**given, **changes}).read_text(encoding="utf-8")  # type: ignore[arg-type]


class Links(HTMLParser):
    """Collects every address and tag of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]


def test_the_page_holds_every_figure_and_points_to_nothing_outside(tmp_path: Path) -> None:
    panel = report.attention_figure(torch.rand(3, 2, 4), tmp_path / "attention.png")
    html = page(tmp_path, panels={"Attention distance": panel, "Targets": panel.read_bytes()})
    links = Links(html)
    assert not links.tags & {"script", "link", "iframe", "object", "embed"}
    assert all(address.startswith("data:image/png;base64,") for address in links.addresses)
    assert not re.search(r"https?://|@import|url\(", html)
    embedded = [base64.b64decode(address.partition(",")[2]) for address in links.addresses]
    wanted = [tmp_path / "figures" / "curves.png", panel, panel, tmp_path / "figures" / "scores.png"]
    assert embedded == [path.read_bytes() for path in wanted]
    for caption in ("Loss and learning rate", "Attention distance", "Targets", "Scores"):
        assert f"<h2>{caption}</h2>" in html


def test_the_page_says_scores_with_intervals_and_controls_configuration_and_environment(tmp_path: Path) -> None:
    html = page(tmp_path)
    for text in (
        "70.0 %",
        "65.0 – 75.0",
        "random-init",
        "background only",
        "name: a",
        "torch",
        "samples seen",
        "5,056",
    ):
        assert text in html


def test_everything_given_is_escaped(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>"
    html = page(tmp_path, title=bad, config_yaml=bad, environment={bad: bad}, panels={'"><b>': _dot(tmp_path)})
    assert "<script" not in html
    assert "<i>mine" not in html
    assert '"><b>' not in html
    assert html.count("&lt;script&gt;") == 5


def test_a_run_without_metrics_scores_or_panels_still_has_a_page(tmp_path: Path) -> None:
    html = page(tmp_path, metrics=[], scores=[])
    assert "<img" not in html
    assert "Configuration" in html


def test_the_page_adapts_to_dark_screens_and_phones(tmp_path: Path) -> None:
    html = page(tmp_path, metrics=[])
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


def test_a_panel_that_is_missing_or_no_png_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file") as caught:
        page(tmp_path, panels={"Targets": tmp_path / "none.png"})
    assert "panel «Targets»" in str(caught.value)
    with pytest.raises(DataError, match="is not a PNG"):
        page(tmp_path, panels={"Targets": b"<svg>"})


def test_curves_have_gaps_where_rows_lack_values(tmp_path: Path) -> None:
    rows = [{"samples": 1, "loss": 1.0}, {"samples": 2, "lr": 1e-3}, {"samples": 3, "loss": float("nan")}, {"note": 1}]
    png(report.curve_figure(rows, tmp_path / "c.png"))
    png(report.curve_figure([], tmp_path / "empty.png"))


def test_figures_are_drawn_for_targets_reconstructions_attention_and_scores(tmp_path: Path) -> None:
    images, targets = torch.rand(2, 1, 32, 32), torch.rand(2, 3, 32, 32)
    masks = torch.tensor([[1.0, 0.0], [-1.0, torch.nan]]).expand(2, 2, 2)
    holes = targets.clone()
    holes[:, :, :16] = torch.nan
    png(report.target_panels(images, targets, ("r5", "r9", "r13"), tmp_path / "t.png"))
    png(report.reconstruction_panels(images, masks, targets, holes, tmp_path / "r.png", ("r5", "r9", "r13")))
    png(report.reconstruction_panels(images, masks > 0, targets, targets, tmp_path / "bool.png"))
    png(report.attention_figure(torch.rand(4, 2, 6), tmp_path / "deep" / "a.png"))
    png(report.score_figure(SCORES, tmp_path / "s.png"))


def test_the_same_figure_is_the_same_bytes(tmp_path: Path) -> None:
    first, second = (report.score_figure(SCORES, tmp_path / name).read_bytes() for name in ("1.png", "2.png"))
    assert first == second


def test_the_veil_tells_masked_visible_and_outside_patches_apart() -> None:
    from foundation.evaluation.figures import MASKED, WINDOW_OUT, _veil

    veil = _veil(np.array([[1.0, 0.0], [-1.0, np.nan]]), (4, 4))
    assert tuple(veil[0, 0]) == MASKED
    assert not veil[0, 3].any()
    assert tuple(veil[3, 0]) == tuple(veil[3, 3]) == WINDOW_OUT


def _dot(folder: Path) -> Path:
    path = folder / "dot.png"
    Image.new("L", (2, 2)).save(path)
    return path
