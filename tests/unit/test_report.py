"""The report is one page that needs nothing beside it, shows every figure, and never runs what it was given."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from foundation.errors import DataError
from foundation.evaluation import report
from foundation.evaluation.figures.attention import attention_figure
from foundation.evaluation.figures.curves import curve_figure
from foundation.evaluation.figures.pictures import MASKED, WINDOW_OUT, reconstruction_panels, target_panels, veil
from foundation.evaluation.figures.scores import score_figure
from foundation.evaluation.leaks import FILE, Verdict, read_verdict
from foundation.evaluation.panels import OPERATIONS
from foundation.evaluation.predictions import Predictions
from foundation.evaluation.scores import Score
from foundation.inspecting.text import Section

METRICS = [{"samples": 64 * i, "loss": 2 / (i + 1), "lr": 1e-3} for i in range(80)]
SCORES = [
    Score(name, f"{shots}-shot linear", "accuracy", mean, mean - 0.05, mean + 0.05, (0, 1), (mean, mean), 50)
    for name, mean in (("<i>mine</i>", 0.7), ("random-init", 0.4), ("background only", 0.3))
    for shots in (10, 20)
]


def answers() -> list[Predictions]:
    """Of two encoders under two numbers of shots."""
    sure = torch.eye(3)[torch.arange(6) % 3].expand(2, 6, 3) * 0.6 + 0.1
    given = {"measurement": "m", "classes": ("a", "b", "c"), "hashes": tuple("uvwxyz"), "seeds": (0, 1)}
    return [Predictions(encoder, f"{shots}-shot linear", **given, y=torch.arange(6) % 3, probabilities=sure)
            for encoder in ("random-init", "pretrained") for shots in (10, 20)]  # fmt: skip


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
    panel = attention_figure(torch.rand(3, 2, 4), tmp_path / "attention.png")
    panels = {"attention": {"Attention distance": panel}, "targets": {"Target per map": panel.read_bytes()}}
    html = page(tmp_path, panels=panels, predictions=answers())
    links = Links(html)
    assert not links.tags & {"script", "link", "iframe", "object", "embed"}
    assert not re.search(r"https?://|@import|url\(", html)
    pictures = [address for address in links.addresses if address.startswith("data:image/png;base64,")]
    assert all(address in pictures or address.startswith("#") for address in links.addresses)
    embedded = [base64.b64decode(address.partition(",")[2]) for address in pictures]
    names = ("few-shot", "scores", "confusion-20-shot-linear", "reliability")
    wanted = [tmp_path / "figures" / "curves.png", panel, panel, *(tmp_path / "figures" / f"{n}.png" for n in names)]
    assert embedded == [path.read_bytes() for path in wanted]
    captions = ("Loss and learning rate", "Attention distance", "Target per map", "Few-shot curves", "Scores",
                "Confusion matrix: 20-shot linear", "Reliability")  # fmt: skip
    for caption in captions:
        assert f"<figcaption>{caption}</figcaption>" in html


def test_every_section_has_an_anchor_that_the_contents_point_to_and_empty_ones_are_left_out(tmp_path: Path) -> None:
    dot = {"x": _dot(tmp_path)}
    listings = {name: Section(name, "t", ("<h>",), [("<c>",)], ("<n>",)) for name in OPERATIONS}
    full = page(tmp_path, panels=dict.fromkeys(("targets", "features", "attention", "robustness"), dot),
                predictions=answers(), verdict=Verdict("clean", "Nothing is shared."), listings=listings)  # fmt: skip
    for text in ("<th>&lt;h&gt;</th>", "<td>&lt;c&gt;</td>", '<p class="note">&lt;n&gt;</p>'):
        assert full.count(text) == len(OPERATIONS)
    anchors = re.findall(r'<h2 id="(\w+)">', full)
    assert anchors == list(report.SECTIONS)
    assert re.findall(r'<a href="#(\w+)">', full) == anchors
    bare = page(tmp_path, metrics=[], scores=[])
    assert re.findall(r'<h2 id="(\w+)">', bare) == ["configuration", "environment"]


def test_a_leak_is_said_in_red_at_the_top_and_beside_each_score(tmp_path: Path) -> None:
    examples = ("a.png = b.png", "<b>")
    verdict = Verdict("leaked", "7 of 50 test images & more", 7, 3, 2, examples)
    html = page(tmp_path, verdict=verdict)
    assert html.index('<p class="alarm">LEAKED') < html.index("<nav>")
    assert html.count('<tr class="leaked">') == len(SCORES) == html.count('class="bad" title=')
    for text in ("7 of 50 test images &amp; more", "a.png = b.png", "&lt;b&gt;", "near duplicates</dt><dd>3</dd>"):
        assert text in html
    for word in ("clean", "unknown"):
        sound = page(tmp_path, verdict=Verdict(word, "All is well."))
        assert "LEAKED" not in sound
        assert f">{word}</span>" in sound


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"pretrained_on_test_images": 12}, "pretrained on 12 of the test images"),
        ({"shared_groups": 3}, "3 groups are in both train and test"),
        ({"leakage": {"verdict": "leaked", "sentence": "PRETRAINED ON IT"}}, "PRETRAINED ON IT"),
    ],
)
def test_a_score_whose_settings_tell_of_a_leak_is_red_and_no_other(
    tmp_path: Path, settings: dict[str, Any], text: str
) -> None:
    html = page(tmp_path, scores=[replace(SCORES[0], settings=settings), *SCORES[1:]])
    assert html.count('<tr class="leaked">') == 1
    assert f'title="{text}"' in html
    assert f'<p class="alarm">LEAKED: {text}</p>' in html
    for sound in (0, "not checked: the pretraining catalog is not at hand"):
        assert "LEAKED" not in page(tmp_path, scores=[replace(SCORES[0], settings=dict.fromkeys(settings, sound))])


def test_a_score_on_another_test_set_keeps_its_own_verdict(tmp_path: Path) -> None:
    own = [replace(SCORES[0], settings={"leakage": {"verdict": "clean", "sentence": "fine"}}), SCORES[1]]
    html = page(tmp_path, scores=own, verdict=Verdict("leaked", "s"))
    assert html.count('<tr class="leaked">') == 1


def test_a_verdict_is_read_from_the_run_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    assert read_verdict(tmp_path) is None
    text = '{"verdict": "leaked", "sentence": "s", "identical": 1, "near": 2, "scenes": 3, "examples": [["a", "b"]]}'
    (tmp_path / FILE).write_text(text)
    assert read_verdict(tmp_path) == Verdict("leaked", "s", 1, 2, 3, ("a = b",))
    for bad in (
        '{"verdict": "fine", "sentence": ""}',
        '{"verdict": "clean"}',
        "[]",
        '{"verdict": "clean", "near": []}',
    ):
        (tmp_path / FILE).write_text(bad)
        with pytest.raises(DataError, match="is not a leakage verdict"):
            read_verdict(tmp_path)


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
    html = page(
        tmp_path, title=bad, config_yaml=bad, environment={bad: bad}, panels={"targets": {'"><b>': _dot(tmp_path)}}
    )
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
        page(tmp_path, panels={"targets": {"Targets": tmp_path / "none.png"}})
    assert "panel «Targets»" in str(caught.value)
    with pytest.raises(DataError, match="is not a PNG"):
        page(tmp_path, panels={"targets": {"Targets": b"<svg>"}})


def test_curves_have_gaps_where_rows_lack_values(tmp_path: Path) -> None:
    rows = [{"samples": 1, "loss": 1.0}, {"samples": 2, "lr": 1e-3}, {"samples": 3, "loss": float("nan")}, {"note": 1}]
    png(curve_figure(rows, tmp_path / "c.png"))
    png(curve_figure([], tmp_path / "empty.png"))


def test_figures_are_drawn_for_targets_reconstructions_attention_and_scores(tmp_path: Path) -> None:
    images, targets = torch.rand(2, 1, 32, 32), torch.rand(2, 3, 32, 32)
    masks = torch.tensor([[1.0, 0.0], [-1.0, torch.nan]]).expand(2, 2, 2)
    holes = targets.clone()
    holes[:, :, :16] = torch.nan
    png(target_panels(images, targets, ("r5", "r9", "r13"), tmp_path / "t.png"))
    png(reconstruction_panels(images, masks, targets, holes, tmp_path / "r.png", ("r5", "r9", "r13")))
    png(reconstruction_panels(images, masks > 0, targets, targets, tmp_path / "bool.png"))
    png(attention_figure(torch.rand(4, 2, 6), tmp_path / "deep" / "a.png"))
    png(score_figure(SCORES, tmp_path / "s.png"))


def test_the_same_figure_is_the_same_bytes(tmp_path: Path) -> None:
    first, second = (score_figure(SCORES, tmp_path / name).read_bytes() for name in ("1.png", "2.png"))
    assert first == second


def test_the_veil_tells_masked_visible_and_outside_patches_apart() -> None:
    colours = veil(np.array([[1.0, 0.0], [-1.0, np.nan]]), (4, 4))
    assert tuple(colours[0, 0]) == MASKED
    assert not colours[0, 3].any()
    assert tuple(colours[3, 0]) == tuple(colours[3, 3]) == WINDOW_OUT


def _dot(folder: Path) -> Path:
    path = folder / "dot.png"
    Image.new("L", (2, 2)).save(path)
    return path
