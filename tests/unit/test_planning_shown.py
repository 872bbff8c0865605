"""A plan as people and programs see it: every figure says how it is known, every problem is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from shards_samples import small
from test_planning import RECIPE, recipe
from typer.testing import CliRunner

from foundation.cli_plan import plan_command
from foundation.cli_plan_text import show_plan
from foundation.cli_text import console
from foundation.config import Config, from_dict
from foundation.errors import StorageError
from foundation.planning.cluster import Cluster
from foundation.planning.picture import draw
from foundation.planning.plan import Plan, plan
from foundation.planning.validation import scaling_checks, table_checks

app = typer.Typer()
app.command()(plan_command)


def test_every_figure_says_how_it_is_known(tmp_path: Path) -> None:
    small(tmp_path)
    found = plan(from_dict({"data": {"catalog": str(tmp_path)}}), Cluster(60))
    assert {f.tag for f in found.figures} == {"measured", "derived", "assumed"}
    assumed = {f.name for f in found.figures if f.tag == "assumed"}
    assert {"MFU while computing", "overlap", "NVLink", "network", "margin", "stall", "between failures"} <= assumed
    sections = list(dict.fromkeys(f.section for f in found.figures))
    assert sections == ["model", "batch", "memory", "speed", "checkpoint", "engine", "schedule", "data"]


def run_cli(*arguments: str) -> Any:
    return CliRunner().invoke(app, [*arguments])


def test_the_command_answers_in_json_with_the_published_points() -> None:
    result = run_cli(RECIPE, "train.precision=bf16", "--world", "60", "--json", "--no-data", "--gpu", "h200")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert set(found) == {"engine", "figures", "candidates", "problems", "warnings", "validation", "checks"}
    assert found["problems"] == []
    assert len(found["validation"]) == len(table_checks()) + len(scaling_checks())
    assert {c["engine"] for c in found["candidates"]} == {"ddp", "zero1", "zero2", "fsdp2", "zero3"}
    assert all(c["memory"]["total"] > 0 for c in found["candidates"])


def test_the_command_shows_problems_and_fails(tmp_path: Path) -> None:
    png = tmp_path / "lr.png"
    result = run_cli(RECIPE, "--world", "64", "--figure", str(png))
    assert result.exit_code == 1
    assert png.read_bytes().startswith(b"\x89PNG")


def test_the_tables_show_the_plan_the_published_points_and_every_problem() -> None:
    run = recipe("7b", batch=600, lanes=60)
    found = plan(run, Cluster(64), data=False)
    with console.capture() as capture:
        show_plan(Plan(found.engine, found.figures, found.candidates, found.problems, ["a warning"]), True)
    text = capture.get()
    for word in (
        "activations",
        "hsdp *",
        "44 published values",
        "8 measured scalings",
        "giant fsdp2",
        "KempnerForge",
        "a warning",
    ):
        assert word in text
    assert "Young interval" not in text  # without whole batches no update is timed
    assert text.count("problem ") == len(found.problems) == 1
    assert all(problem in text for problem in found.problems)


def test_a_figure_that_cannot_be_written_is_an_explained_error(tmp_path: Path) -> None:
    found = plan(Config(), Cluster(1), data=False)
    with pytest.raises(StorageError, match="cannot be written"):
        draw(Config(), Cluster(1), found, tmp_path / "missing" / "lr.png")
