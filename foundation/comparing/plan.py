"""What is compared: rows (one configuration each) x seeds = cells (one run each), and the proof that rows are alike.

A comparison is a YAML file. `config` is the budget that all rows share: data, encoder, length, batch, optimiser. A row
changes what the comparison is about with `overrides`, or brings a configuration of its own. Rows may differ in FREE
keys and in those that the file names under `differs`; any other difference is an error, so that a table cannot compare
two budgets without saying so. What differs stands under the table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from foundation import config as configs
from foundation.config import Config, flatten
from foundation.config_section import Section
from foundation.config_text import Problem, field_problems, known_paths, read_tree, summary
from foundation.errors import ConfigError

FREE = ("name", "seed", "run_root", "objective.", "model.positions", "model.decoder.")
"""Keys, and beginnings of keys, in which rows may always differ: the task, and the frame that it brings."""


class RowSpec(Section):
    """One row of the table."""

    name: str = Field(min_length=1, description="what the table calls it")
    config: str | None = Field(default=None, description="YAML of its own, relative to this file; null: the budget")
    overrides: tuple[str, ...] = Field(default=(), description="changes of this row, e.g. objective.name=mae")
    published: float | None = Field(default=None, description="a published score beside which ours is put, %")


class EvaluateSpec(Section):
    """How every cell is judged: the same for all."""

    data: str | None = Field(
        default=None, min_length=1, description="catalog with a train and a test split; null: that of the runs"
    )
    protocols: tuple[Literal["knn", "linear", "attentive", "fewshot"], ...] = Field(
        default=("knn", "linear", "fewshot"), min_length=1, description="protocols of `foundation evaluate`"
    )
    mode: Literal["linear", "finetune"] = Field(default="linear", description="what the few-shot protocol trains")
    recipe: Literal["published", "improved"] = Field(default="published", description="how it trains it")
    shots: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(10, 20, 40), description="images per class")
    draws: int = Field(default=5, ge=1, description="draws of shots")
    crop: int | None = Field(default=None, ge=1, description="centre crop before resizing, pixels; null: none")


class ComparisonSpec(Section):
    """The file."""

    name: str = Field(pattern=r"^\w[\w.+-]*$", description="name of the comparison, also of its folder in run_root")
    config: str = Field(min_length=1, description="YAML of the budget, relative to this file")
    overrides: tuple[str, ...] = Field(default=(), description="changes of every row")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0, 1, 2), min_length=1, description="pretrainings")
    differs: tuple[str, ...] = Field(
        default=(), description="further keys in which rows may differ, and the table says so"
    )
    rows: tuple[RowSpec, ...] = Field(min_length=2, description="the first one is what the others are compared with")
    evaluate: EvaluateSpec = Field(default=EvaluateSpec(), description="how every cell is judged")

    @field_validator("rows")
    @classmethod
    def _told_apart(cls, rows: tuple[RowSpec, ...]) -> tuple[RowSpec, ...]:
        slugs = [slug(row.name) for row in rows]
        if twice := sorted({s for s in slugs if slugs.count(s) > 1}):
            raise ValueError(f"names that make different folders; twice: {', '.join(twice)}")
        return rows


@dataclass(frozen=True)
class Cell:
    """One run: a row under one seed, and the configuration that both make."""

    row: str
    seed: int
    config: Config


@dataclass(frozen=True)
class Comparison:
    """A comparison that was read and found fair. `cells` row by row; `differing` keys in which rows differ."""

    spec: ComparisonSpec
    cells: tuple[Cell, ...]
    differing: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """`run_root/NAME`: the runs and the results."""
        return Path(self.cells[0].config.run_root)

    def of(self, row: str) -> list[Cell]:
        """The cells of a row, one per seed."""
        return [cell for cell in self.cells if cell.row == row]


def slug(name: str) -> str:
    """A row's name as part of a folder's name."""
    return re.sub(r"[^a-z0-9.+]+", "-", name.lower()).strip("-")


def load(path: Path, overrides: Sequence[str] = ()) -> Comparison:
    """Read a comparison; `overrides` change every row, after those of the file and of the row.

    Raises ConfigError with every error of the file, then of the rows, then when rows are not alike.
    """
    spec = _spec(path)
    cells, problems = [], []
    for row in spec.rows:
        given = (*spec.overrides, *row.overrides, *overrides)
        for seed in spec.seeds:
            try:
                config = configs.load(path.parent / (row.config or spec.config), (*given, f"seed={seed}"))
            except ConfigError as error:
                problems.append(f"row {row.name}: {error.what}")
                break
            name, root = f"{slug(row.name)}-seed{seed}", f"{config.run_root}/{spec.name}"
            cells.append(Cell(row.name, seed, config.model_copy(update={"name": name, "run_root": root})))
    if problems:
        raise ConfigError("\n".join(problems), where=str(path), do="correct these rows")
    return Comparison(spec, tuple(cells), _alike(spec, cells, path))


def _spec(path: Path) -> ComparisonSpec:
    tree, problems = read_tree(path, ())
    known = known_paths(ComparisonSpec)
    try:
        spec = ComparisonSpec.model_validate(tree)
    except ValidationError as error:
        raise summary([*problems, *(_named(p) for p in field_problems(error, known))], str(path)) from error
    if problems:
        raise summary(problems, str(path))
    return spec


def _named(problem: Problem) -> Problem:
    return problem if problem.path else problem._replace(path="the file")


def _alike(spec: ComparisonSpec, cells: Sequence[Cell], path: Path) -> tuple[str, ...]:
    """The keys in which rows differ. Raises ConfigError for one in which they may not."""
    flat = {cell.row: flatten(cell.config) for cell in cells if cell.seed == spec.seeds[0]}
    first = flat[spec.rows[0].name]
    differing = tuple(key for key in first if any(other[key] != first[key] for other in flat.values()))
    if unknown := [key for key in spec.differs if key not in first]:
        raise ConfigError(f"`differs` names no key: {', '.join(unknown)}", where=str(path), do="name whole keys")
    unfair = [key for key in differing if not key.startswith(FREE) and key not in spec.differs]
    if unfair:
        shown = "; ".join(f"{key}: {_values(flat, key)}" for key in unfair)
        raise ConfigError(
            f"the rows do not share one budget: {shown}",
            where=str(path),
            do="give all rows the same values, or list the keys under `differs`, which the table will say",
        )
    return tuple(key for key in differing if key not in ("name", "seed", "run_root"))


def _values(flat: Mapping[str, Mapping[str, Any]], key: str) -> str:
    """Which rows have which value."""
    rows: dict[str, list[str]] = {}
    for row, keys in flat.items():
        rows.setdefault(str(keys[key]), []).append(row)
    return ", ".join(f"{value} ({', '.join(names)})" for value, names in rows.items())
