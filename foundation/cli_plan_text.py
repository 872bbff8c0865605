"""A plan as tables."""

from __future__ import annotations

from collections.abc import Iterable

from foundation.cli_text import console, print_table
from foundation.planning.checks import Checked
from foundation.planning.engines import GB
from foundation.planning.figures import Figure
from foundation.planning.plan import Plan
from foundation.planning.validation import Check, scaling_checks, table_checks


def shown(value: float | str) -> str:
    """A number with three digits that count, whole and large ones whole."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 1000 else f"{value:.3g}"


def figure_rows(figures: Iterable[Figure]) -> list[tuple[str, ...]]:
    """(section, figure, value, how it is known, note); a section is named once."""
    rows: list[tuple[str, ...]] = []
    before = ""
    for f in figures:
        rows.append(
            ("" if f.section == before else f.section, f.name, f"{shown(f.value)} {f.unit}".strip(), f.tag, f.note)
        )
        before = f.section
    return rows


def engine_rows(plan: Plan) -> list[tuple[str, ...]]:
    """One row per engine that this world can start."""
    return [
        (
            c.engine + (" *" if c.engine == plan.engine else ""),
            f"{c.memory.total / GB:.1f}",
            f"{c.memory.state / GB:.1f}",
            "yes" if c.fits else "no",
            f"{c.communication * 1e3:.1f}",
            f"{c.step * 1e3:.1f}",
            f"{c.images_per_s:,.0f}",
        )
        for c in plan.candidates
    ]


def check_rows(checks: Iterable[Check]) -> list[tuple[str, ...]]:
    """Predicted beside published."""
    return [
        (
            c.name,
            f"{shown(c.published)} {c.unit}".strip(),
            f"{shown(c.predicted)} {c.unit}".strip(),
            f"{c.deviation:+.1%}",
            c.note,
        )
        for c in checks
    ]


def show_plan(plan: Plan, validation: bool) -> None:
    """Print everything; problems last, where they are seen."""
    print_table(("part", "figure", "value", "known", "note"), figure_rows(plan.figures))
    header = ("engine (* planned)", "GB / process", "of it state", "fits", "comm. ms", "update ms", "images/s")
    print_table(header, engine_rows(plan))
    for what, checks in (("published values for 512 GPUs", table_checks()), ("measured scalings", scaling_checks())):
        worst = max(checks, key=lambda c: abs(c.deviation))
        console.print(
            f"validation: {len(checks)} {what}, worst {worst.deviation:+.1%} ({worst.name})",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        if validation:
            print_table(("published point", "published", "predicted", "deviation", "note"), check_rows(checks))
    for word, lines, colour in (("warning", plan.warnings, "yellow"), ("problem", plan.problems, "bold red")):
        for text in lines:
            console.print(f"[{colour}]{word}[/] ", end="")
            console.print(text, markup=False, highlight=False, soft_wrap=True)


def show_checks(checks: Iterable[Checked]) -> None:
    """Print the checks beyond formulas."""
    for check in checks:
        console.print(f"\n{check.title}", markup=False, highlight=False, soft_wrap=True)
        if check.rows:
            print_table(check.header, check.rows)
        word = "[green]agrees[/]" if check.passed else "[bold red]differs[/]" if check.rows else "[bold red]failed[/]"
        console.print(f"{word}: {check.cost}", highlight=False, soft_wrap=True)
