"""A comparison shares one budget or is refused, goes on where it was stopped, and says what its numbers are."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from compared_cells import scored
from processes import ROWS

from foundation.comparing.cells import MARK
from foundation.comparing.figure import comparison_figure
from foundation.comparing.plan import load
from foundation.comparing.results import Results, Value, collect, rank_correlation
from foundation.comparing.table import caption, cell, to_markdown
from foundation.errors import ConfigError
from shards.errors import DataError


def test_cells_are_rows_times_seeds_in_folders_of_their_own(compared: Callable[..., Path], tmp_path: Path) -> None:
    found = load(compared(), ["optim.lr=1e-3"])
    assert [(c.row, c.seed, c.config.name) for c in found.cells] == [
        ("SAR-JEPA", 0, "sar-jepa-seed0"),
        ("SAR-JEPA", 3, "sar-jepa-seed3"),
        ("Pixels (raw)", 0, "pixels-raw-seed0"),
        ("Pixels (raw)", 3, "pixels-raw-seed3"),
    ]
    assert {c.config.optim.lr for c in found.cells} == {1e-3}
    assert [c.config.seed for c in found.cells] == [0, 3, 0, 3]
    assert found.folder == tmp_path / "runs" / "pair"
    assert found.differing == ("objective.name",)


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        (
            "[{name: A}, {name: B, overrides: [train.samples=64]}]",
            "",
            r"the rows do not share one budget: train\.samples: \d+ \(A\), 64 \(B\)",
        ),
        ("[{name: A}, {name: B, overrides: [model.size=tiny]}]", "", r"model\.size: nano \(A\), tiny \(B\)"),
        ("[{name: A}, {name: B, overrides: [objective.name=nothing]}]", "", "row B: Found 1 error"),
        ("[{name: A}]", "", r"rows = \[.*\]: list of at least 2 times a section of keys"),
        ("[{name: A b}, {name: a-B}]", "", "twice: a-b"),
        (ROWS, "seed: 3", "seed = 3: no such key; did you mean seeds"),
        (ROWS, "differs: 3", "differs"),
        (ROWS, "differs: [mod, optim.learning_rate]", "`differs` names no key: mod, optim.learning_rate"),
    ],
)
def test_what_is_not_a_fair_comparison_is_refused(
    compared: Callable[..., Path], rows: str, more: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(compared(rows, more))


def test_a_difference_that_is_named_is_allowed_and_told(compared: Callable[..., Path]) -> None:
    rows = "[{name: A}, {name: B, overrides: [optim.lr=3e-3, objective.mask_ratio=0.5]}]"
    found = load(compared(rows, "differs: [optim.lr]"))
    assert found.differing == ("objective.mask_ratio", "optim.lr")
    scored(found, {"A": [0.5, 0.6], "B": [0.7, 0.7]})
    told = to_markdown(found, collect(found))
    assert (
        "Rows differ in objective.mask_ratio, optim.lr, and in nothing else; so not in task alone, but in optim.lr"
        in told
    )


def test_values_are_means_over_seeds_and_differences_are_paired(compared: Callable[..., Path], tmp_path: Path) -> None:
    found = load(compared())
    scored(found, {"SAR-JEPA": [0.50, 0.60], "Pixels (raw)": [0.42, 0.51]})
    results = collect(found)
    first, second = results.rows["SAR-JEPA"][0], results.rows["Pixels (raw)"][0]
    assert first.mean == pytest.approx(0.55)
    assert first.difference is None
    assert second.values == (0.42, 0.51)
    assert second.difference is not None
    mean, low, high = second.difference
    assert mean == pytest.approx(-0.085)
    half = 12.706 * math.sqrt(2 * 0.005**2) / math.sqrt(2)  # t of one degree of freedom, deviation of (-0.08, -0.09)
    assert (low, high) == (pytest.approx(-0.085 - half, abs=1e-4), pytest.approx(-0.085 + half, abs=1e-4))
    assert results.controls["random-init"][0].values == (0.10, 0.13)
    assert results.controls["background only"][0].values == (0.2,)
    text = to_markdown(found, results)
    assert "| SAR-JEPA | 55.0 ± " in text
    assert "| *background only* | 20.0 |" in text
    assert comparison_figure(results, tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(json.dumps(results.facts))["seeds"] == [0, 3]


def test_a_row_with_another_network_has_an_untrained_encoder_of_its_own(compared: Callable[..., Path]) -> None:
    found = load(compared())
    scored(found, {"SAR-JEPA": [0.50, 0.60], "Pixels (raw)": [0.42, 0.51]})
    for c in found.of("Pixels (raw)"):
        mark = json.loads((c.config.run_folder / MARK).read_text())
        for row in mark["scores"]:
            row["mean"] = 0.3 if row["encoder"] == "random-init" else row["mean"]
        (c.config.run_folder / MARK).write_text(json.dumps(mark))
    results = collect(found)
    assert [v.values for v in results.controls["random-init"]] == [(0.10, 0.13)]
    assert [v.values for v in results.controls["random-init of Pixels (raw)"]] == [(0.3, 0.3)]
    assert results.rows["Pixels (raw)"][0].untrained == pytest.approx(0.3)


def test_scores_of_other_evaluations_do_not_enter(compared: Callable[..., Path]) -> None:
    found = load(compared())
    scored(found, {"SAR-JEPA": [0.50, 0.60], "Pixels (raw)": [0.42, 0.51]})
    for c in found.cells:  # a later evaluation by hand
        (c.config.run_folder / "scores.json").write_text("[]")
    assert collect(found).rows["SAR-JEPA"][0].values == (0.50, 0.60)


def test_cells_judged_on_different_images_are_not_put_into_one_table(compared: Callable[..., Path]) -> None:
    found = load(compared())
    scored(found, {"SAR-JEPA": [0.50, 0.60], "Pixels (raw)": [0.42, 0.51]}, data="corpora aaaa", train_data="b" * 64)
    mark = found.cells[0].config.run_folder / MARK
    mark.write_text(mark.read_text().replace("aaaa", "cccc"))
    with pytest.raises(DataError, match=r"judged on different images: corpora aaaa, train bbbbbbbb; corpora cccc"):
        collect(found)


def test_a_leak_stands_above_the_numbers(compared: Callable[..., Path], tmp_path: Path) -> None:
    found = load(compared())
    leak = {"verdict": "leaked", "sentence": "3 of the test images were learnt"}
    scored(found, {"SAR-JEPA": [0.50, 0.60], "Pixels (raw)": [0.42, 0.51]}, leakage=leak, shared_groups=2)
    results = collect(found)
    assert caption(found, results)[:2] == [
        "WARNING: 3 of the test images were learnt.",
        "WARNING: train and test share 2 groups.",
    ]
    comparison_figure(results, tmp_path / "figure.png")


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        ((0.02, 0.01, 0.03), "(+2.0, better)"),
        ((-0.02, -0.03, -0.01), "(-2.0, worse)"),
        ((0.02, -0.01, 0.05), "(+2.0)"),
    ],
)
def test_a_verdict_needs_an_interval_without_zero(difference: tuple[float, float, float], words: str) -> None:
    assert cell(Value("B", "knn", 0.5, 0.4, 0.6, (0.5, 0.5, 0.5), difference)) == f"50.0 ± 10.0 {words}"
    two = cell(Value("B", "knn", 0.5, 0.4, 0.6, (0.5, 0.5), difference))
    assert two == f"50.0 ± 10.0 ({100 * difference[0]:+.1f})"  # two seeds are too few for a verdict
    assert cell(Value("B", "knn", math.nan, math.nan, math.nan, ())) == "-"


def test_ranks_are_put_beside_published_ones_where_there_are_four(compared: Callable[..., Path]) -> None:
    rows = "[" + ", ".join(f"{{name: R{i}, published: {70 - i}}}" for i in range(4)) + ", {name: other}]"
    found = load(compared(rows))

    def results(means: list[float]) -> Results:
        values = {f"R{i}": [Value(f"R{i}", "knn", m, m, m, (m,))] for i, m in enumerate(means)}
        return Results(("knn",), values, {}, {}, (), (), (), collect(found).facts)

    assert rank_correlation(found, results([0.4, 0.3, 0.2, 0.1]), "knn") == (1.0, 4)
    assert rank_correlation(found, results([0.4, 0.3, 0.2]), "knn") is None
    lines = caption(found, results([0.1, 0.2, 0.3, 0.4]))
    assert any(
        re.search(r"Spearman's correlation of knn with the published column: -1\.00 over 4 rows", x) for x in lines
    )


def test_the_command_lists_runs_one_cell_and_collects(
    compared: Callable[..., Path], command: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = compared()
    listed = command("compare", path, "--list")
    assert "sbatch --array=0-3 --requeue --signal=USR2@300 --open-mode=append --wrap" in " ".join(listed.out.split())
    assert "no run is finished" in command("compare", path, "--collect").out
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    assert "there is no cell 7" in command("compare", path).err
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    found = load(path)
    scored(found, {"SAR-JEPA": [0.50, 0.60], "Pixels (raw)": [0.42, 0.51]})
    done = command("compare", path)
    assert done.code in (0, None)
    assert "4 of 4 runs are finished" in done.out
    assert (found.folder / "comparison.md").exists()
    assert (found.folder / "comparison.png").exists()
