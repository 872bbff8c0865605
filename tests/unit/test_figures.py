"""What a figure shows is what was measured: the data of its axes, its intervals, its names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import fsum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from foundation.errors import StorageError
from foundation.evaluation.calibration import calibration_error, confusion, reliability, wilson
from foundation.evaluation.figures import style
from foundation.evaluation.figures.answers import confusion_figure, reliability_figure
from foundation.evaluation.figures.attention import attention_figure, rollout_figure
from foundation.evaluation.figures.curves import curve_figure, curves_figure, series, smoothed
from foundation.evaluation.figures.features import class_styles, embedding_figure, pca_figure
from foundation.evaluation.figures.scores import fewshot_figure, score_figure
from foundation.evaluation.predictions import Predictions
from foundation.evaluation.scores import Score
from foundation.evaluation.scores import score as score_of

NAME = "$\\frac{_<b>"  # an unfinished formula for who takes it for one


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, with their artists."""
    figures: list[Figure] = []
    whole = Figure.savefig

    def keep(self: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(self)
        whole(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def shown(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.get_visible()]


def score(encoder: str, shots: int, mean: float, **changes: Any) -> Score:
    given = {"low": mean - 0.04, "high": mean + 0.06, "seeds": (0, 1), "per_seed": (mean, mean), "n_test": 50}
    return Score(encoder, f"{shots}-shot linear", "accuracy", mean, **(given | changes))


def test_few_shot_curves_are_the_scores_with_their_intervals(tmp_path: Path, drawn: list[Figure]) -> None:
    scores = [score("pretrained", n, m) for n, m in ((40, 0.6), (10, 0.4), (20, 0.5))]
    scores += [score("random-init", n, m) for n, m in ((10, 0.2), (20, 0.25), (40, 0.3))]
    single = Score("pretrained", "knn", "accuracy", 0.9, 0.8, 1.0, (0,), (0.9,), 50)
    assert fewshot_figure([*scores, single], tmp_path / "f.png") == tmp_path / "f.png"
    (axes,) = shown(drawn[0])
    assert [box.get_label() for box in axes.containers] == ["pretrained", "random-init"]
    for box, name in zip(axes.containers, ("pretrained", "random-init"), strict=True):
        own = sorted((s for s in scores if s.encoder == name), key=lambda s: s.mean)
        line, _, (bars,) = box.lines
        assert line.get_color() == style.KNOWN[name]
        np.testing.assert_allclose(line.get_ydata().astype(float), [100 * s.mean for s in own])
        np.testing.assert_allclose(line.get_xdata().astype(float), (10, 20, 40), rtol=0.02)
        ends = np.array(bars.get_segments())[:, :, 1]
        np.testing.assert_allclose(ends, [(100 * s.low, 100 * s.high) for s in own])
    assert axes.get_xlabel() == "images per class"
    assert "95 % interval" in axes.get_ylabel()


@pytest.mark.parametrize("modes", [2, 4])
def test_no_panel_cuts_an_interval_off(tmp_path: Path, drawn: list[Figure], modes: int) -> None:
    means = {f"mode {n}": 0.1 + 0.2 * n for n in range(modes)}
    scores = [replace(score("a", n, m), protocol=f"{n}-shot {mode}") for mode, m in means.items() for n in (10, 20)]
    fewshot_figure(scores, tmp_path / "f.png")
    panels = shown(drawn[0])
    assert len(panels) == modes
    for axes, mean in zip(panels, means.values(), strict=True):
        low, high = axes.get_ylim()
        assert low <= 100 * (mean - 0.04) < 100 * (mean + 0.06) <= high


def test_one_number_of_shots_is_no_curve(tmp_path: Path) -> None:
    assert fewshot_figure([score("pretrained", 10, 0.5)], tmp_path / "f.png") is None
    assert not (tmp_path / "f.png").exists()


def test_scores_of_several_weights_are_lines_of_their_own(tmp_path: Path, drawn: list[Figure]) -> None:
    weights = [{"settings": {"weights": f"{n},000 samples"}} for n in (12, 24)]
    scores = [score("pretrained", n, 0.3, **changes) for n in (10, 20) for changes in weights]
    fewshot_figure(scores, tmp_path / "f.png")
    score_figure(scores, tmp_path / "s.png")
    wanted = {"pretrained (weights 12,000 samples)", "pretrained (weights 24,000 samples)"}
    assert {box.get_label() for box in shown(drawn[0])[0].containers} == wanted
    heights = [line.get_ydata()[0] for line in shown(drawn[1])[0].get_lines() if line.get_marker() == "o"]
    assert len(set(heights)) == len(scores)


def test_a_leaked_score_is_crossed_out(tmp_path: Path, drawn: list[Figure]) -> None:
    scores = [score("a", 10, 0.9, settings={"pretrained_on_test_images": 3}), score("b", 10, 0.2)]
    score_figure(scores, tmp_path / "one.png")
    score_figure(scores, tmp_path / "all.png", warning="the run leaked")
    fewshot_figure([score("a", n, 0.5) for n in (1, 2)], tmp_path / "shots.png", warning="the run leaked")
    assert "LEAKED" in shown(drawn.pop())[0].get_title()
    for figure, wanted in zip(drawn, ([90.0], [90.0, 20.0]), strict=True):
        crosses = [float(line.get_xdata()[0]) for line in shown(figure)[0].get_lines() if line.get_marker() == "x"]
        assert crosses == pytest.approx(wanted)
        assert sum("LEAKED" in text.get_text() for text in shown(figure)[0].texts) == len(wanted)


def predictions(y: list[int], probabilities: Any, classes: int = 3) -> Predictions:
    p = torch.as_tensor(probabilities, dtype=torch.float32)
    names = tuple("abcdefghij"[:classes])
    return Predictions("pretrained", "linear", "m", names, tuple(map(str, y)), tuple(range(len(p))), torch.tensor(y), p)


def test_a_confusion_matrix_is_row_normalised_and_says_its_counts(tmp_path: Path, drawn: list[Figure]) -> None:
    answers = [[0, 0, 1, 1, 1], [0, 1, 1, 1, 0]]
    p = predictions([0, 0, 0, 1, 1], np.eye(3)[np.array(answers)])
    assert confusion(p).tolist() == [[1.5, 1.5, 0], [0.5, 1.5, 0], [0, 0, 0]]
    confusion_figure(p, tmp_path / "c.png")
    axes = drawn[0].axes[0]
    image = axes.images[0].get_array()
    np.testing.assert_allclose(image[:2], [[0.5, 0.5, 0], [0.25, 0.75, 0]])
    assert np.ma.getmaskarray(image)[2].all(), "a class without test images has no shares"
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts == {(0, 0): "50 %\n(1.5)", (1, 0): "50 %\n(1.5)", (0, 1): "25 %\n(0.5)", (1, 1): "75 %\n(1.5)"}
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a (3)", "b (2)", "c (0)"]
    assert "60.0 % right" in axes.get_title()


def test_reliability_is_the_share_of_right_answers_by_confidence(tmp_path: Path, drawn: list[Figure]) -> None:
    sure, unsure = [0.95, 0.05, 0.0], [0.55, 0.45, 0.0]
    p = predictions([0, 1, 0, 0, 1, 1], [[sure, sure, sure, unsure, unsure, unsure]])
    bins = reliability(p)
    assert [(round(b.confidence, 6), round(b.accuracy, 6), b.weight) for b in bins] == [
        (0.55, pytest.approx(1 / 3, abs=1e-6), 0.5),
        (0.95, pytest.approx(2 / 3, abs=1e-6), 0.5),
    ]
    assert calibration_error(p) == pytest.approx((0.55 - 1 / 3) / 2 + (0.95 - 2 / 3) / 2)
    twice = reliability(predictions([0, 1, 0, 0, 1, 1], [[sure, sure, sure, unsure, unsure, unsure]] * 2))
    assert [(b.low, b.high) for b in twice] == [(b.low, b.high) for b in bins], "a second draw adds no images"
    reliability_figure({"linear": [p]}, tmp_path / "r.png")
    (box,) = drawn[0].axes[0].containers
    np.testing.assert_allclose(box.lines[0].get_xydata().astype(float), [(b.confidence, b.accuracy) for b in bins])
    bars = box.lines[2][0]
    assert isinstance(bars, LineCollection)
    np.testing.assert_allclose(np.array(bars.get_segments())[:, :, 1], [(b.low, b.high) for b in bins])
    assert "ECE 25.0 %" in str(box.get_label())


def test_the_figure_tells_the_calibration_error_of_the_table(tmp_path: Path, drawn: list[Figure]) -> None:
    low, high = [0.61, 0.39, 0.0], [0.69, 0.31, 0.0]  # one of ten bins, two of fifteen
    one, other = [low, low, high, high], [high, high, low, low]
    reliability_figure({"linear": [p := predictions([0, 1, 0, 0], [one, other])]}, tmp_path / "r.png")
    expected = fsum(score_of("e", "linear", "calibration error", p.y, [*p.probabilities], p.seeds).per_seed) / 2
    assert calibration_error(p) == pytest.approx(expected)
    (box,) = drawn[0].axes[0].containers
    assert f"ECE {100 * expected:.1f} %" in str(box.get_label())


def test_the_wilson_interval_is_the_published_one() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Newcombe 1998, method 3
    assert wilson(0, 5)[0] == 0
    assert wilson(5, 5)[1] == 1


@given(st.integers(1, 10_000), st.integers(1, 7), st.floats(0, 1))
def test_the_wilson_interval_holds_its_share_also_of_counts_that_are_not_whole(n: int, seeds: int, part: float) -> None:
    total = n / seeds
    share = round(part * n) / n
    low, high = wilson(share * total, total)
    assert 0 <= low <= share <= high <= 1  # or a figure cannot draw its bar


def test_curves_of_several_runs_are_their_metrics_by_name(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [{"samples": 10 * i, "loss": 1 / i, "rankme": float(i)} for i in range(1, 6)]
    short = [{"samples": 10, "loss": 3.0}, {"samples": 5, "loss": 4.0}, {"note": 1}]
    curves_figure([("a", rows), (NAME, short)], ["loss", "rankme"], tmp_path / "c.png")
    loss, rank = shown(drawn[0])
    assert loss.get_yscale() == "log"
    assert rank.get_yscale() == "linear"
    (first, second) = loss.get_lines()
    np.testing.assert_allclose(first.get_xydata(), [(r["samples"], r["loss"]) for r in rows])
    np.testing.assert_allclose(second.get_xydata(), [(5, 4.0), (10, 3.0)])
    assert [t.get_text() for t in drawn[0].legends[0].get_texts()] == ["a", style.safe(NAME)]
    assert rank.get_title() == "RankMe (effective rank)"


def test_a_long_noisy_curve_is_smoothed_over_its_pale_points(tmp_path: Path, drawn: list[Figure]) -> None:
    noise = np.random.default_rng(0).normal(size=500)
    rows = [{"samples": i, "loss": 5 + v, "lr": 1.0} for i, v in enumerate(noise)]
    curve_figure(rows, tmp_path / "c.png")
    points, mean = shown(drawn[0])[0].get_lines()
    assert np.std(mean.get_ydata()) < 0.5 * np.std(points.get_ydata())
    assert points.get_alpha() < 0.5
    assert len(shown(drawn[0])[2].get_lines()) == 1, "a schedule is not noisy"
    curves_figure([("a", rows)], ["loss"], tmp_path / "raw.png", width=1)
    assert len(shown(drawn[1])[0].get_lines()) == 1


def test_smoothing_keeps_straight_lines_beginnings_and_gaps() -> None:
    line = np.arange(40.0)
    np.testing.assert_allclose(smoothed(line, 9)[:36], line[:36])
    assert smoothed(line, 9)[-1] == np.mean(line[-5:])
    line[20] = np.nan
    found = smoothed(line, 9)
    assert np.isnan(found[20])
    assert np.isfinite(np.delete(found, 20)).all()
    assert found[19] == pytest.approx(np.nanmean(line[15:24]))


def test_a_run_with_monitors_has_a_panel_for_each(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [{"samples": i, "loss": 1.0, "lr": 1.0, "rankme": 7.0 + i, "probe_knn": None} for i in range(4)]
    curve_figure([*rows, {"samples": 9, "probe_linear": 0.5}], tmp_path / "c.png")
    titles = [axes.get_title() for axes in shown(drawn[0])]
    assert titles == ["loss", "loss (log)", "learning rate", "RankMe (effective rank)", "online linear-probe accuracy"]
    assert shown(drawn[0])[3].get_lines()[0].get_ydata().tolist() == [7, 8, 9, 10]
    assert series(rows, "probe_knn")[1].size == 0


def test_heads_are_drawn_beside_the_untrained_encoder(tmp_path: Path, drawn: list[Figure]) -> None:
    distances, control = torch.rand(3, 2, 4) * 50, torch.rand(3, 2, 4) * 50
    attention_figure(distances, tmp_path / "a.png", control)
    heads, mean, untrained = shown(drawn[0])[0].get_lines()
    np.testing.assert_allclose(heads.get_ydata(), distances.mean(1).flatten(), rtol=1e-6)
    np.testing.assert_allclose(mean.get_ydata(), distances.mean((1, 2)), rtol=1e-6)
    np.testing.assert_allclose(untrained.get_ydata(), control.mean((1, 2)), rtol=1e-6)


def test_a_roll_out_is_drawn_as_multiples_of_the_even_share(tmp_path: Path, drawn: list[Figure]) -> None:
    share = torch.tensor([[[0.1, 0.2], [0.3, 0.4]]])
    rollout_figure(
        torch.rand(1, 1, 8, 8), {"mine": share, "random-init": torch.full_like(share, 0.25)}, tmp_path / "r.png"
    )
    pictures = [axes.images[0].get_array() for axes in drawn[0].axes if axes.images]
    np.testing.assert_allclose(pictures[1], [[0.4, 0.8], [1.2, 1.6]], rtol=1e-6)
    np.testing.assert_allclose(pictures[2], 1, rtol=1e-6)


def test_colours_of_patches_and_points_of_chips_are_drawn_as_given(tmp_path: Path, drawn: list[Figure]) -> None:
    colours, points, y = torch.rand(2, 3, 3, 3), torch.randn(6, 2), torch.tensor([0, 1, 0, 2, 1, 0])
    pca_figure(torch.rand(2, 1, 6, 6), {"mine": (colours, 0.42)}, tmp_path / "p.png")
    np.testing.assert_allclose(drawn[0].axes[3].images[0].get_array(), colours[1])
    assert "42 % of variance" in drawn[0].axes[2].get_ylabel()
    embedding_figure({NAME: (points, (0.5, 0.2, 0.8))}, y, ("c", NAME, "a"), tmp_path / "e.png")
    lines = drawn[1].axes[0].get_lines()
    assert [line.get_label() for line in lines] == [style.safe(NAME), "a", "c"]
    np.testing.assert_allclose(lines[2].get_xydata(), points[y == 0])
    assert "50 % (20 – 80)" in drawn[1].axes[0].get_xlabel()


def test_no_two_of_56_classes_look_alike() -> None:
    names = [str(i) for i in range(60)]
    styles = class_styles(names)
    assert len(set(styles[:56])) == 56
    assert len(set(styles[56:])) == 1


def test_an_encoder_has_one_colour_everywhere() -> None:
    for names in (["random-init", "pretrained"], ["mine", "pretrained", "x", "random-init"]):
        found = style.colours(names)
        assert len(set(found.values())) == len(names)
        assert {found[name] for name in ("pretrained", "random-init")} == set(style.COLOURS[:2])


FIGURES: dict[str, Callable[[Path], Any]] = {
    "scores": lambda path: score_figure([score(NAME, 10, 0.5), score("_b", 10, 0.4)], path),
    "few-shot": lambda path: fewshot_figure([score(NAME, n, 0.5) for n in (1, 2)], path),
    "confusion": lambda path: confusion_figure(predictions([0, 1], [[[0.2, 0.8, 0], [0, 1, 0]]]), path),
    "reliability": lambda path: reliability_figure({NAME: [predictions([0], [[[0.2, 0.8, 0]]])]}, path),
    "curves": lambda path: curves_figure([(NAME, [{"samples": 1, NAME: 1.0}])], [NAME], path),
}


@pytest.mark.parametrize("name", FIGURES)
def test_names_are_taken_as_they_are_and_the_same_numbers_give_the_same_bytes(name: str, tmp_path: Path) -> None:
    for path in (tmp_path / "1.png", tmp_path / "2.png"):
        FIGURES[name](path)
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()
    assert (tmp_path / "1.png").stat().st_size > 5000


def test_a_folder_that_takes_no_figure_is_named(tmp_path: Path) -> None:
    (tmp_path / "figures").write_text("a file")
    with pytest.raises(StorageError, match=rf"speed\.png cannot be written: [\s\S]*where: {tmp_path}/figures"):
        style.save(style.canvas(1, 1)[0], tmp_path / "figures" / "speed.png")
