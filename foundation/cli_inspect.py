"""`foundation inspect` and `foundation profile`: parsing and printing only."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from foundation.cli_text import console, print_table, show


def inspect_command(
    run: Annotated[Path, typer.Argument(help="Run folder, of a run that goes on as well")],
    data: Annotated[bool, typer.Option(help="Open the catalog, to count what was seen of each source")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output, with every line and event")] = False,
) -> None:
    """What happened to a run: curve, speed, time, restarts, events, checkpoints, data, stragglers, standstill."""
    from foundation.inspecting.inspection import inspect
    from foundation.inspecting.text import sections

    found = inspect(run, data)
    if as_json:
        sys.stdout.write(json.dumps(found.to_json(), indent=1) + "\n")
        return
    for section in sections(found):
        console.print(f"\n[bold]{section.title}[/]")
        if section.rows:
            print_table(section.header, section.rows)
        for note in section.notes:
            console.print(note, markup=False, highlight=False, soft_wrap=True)


def profile_command(
    config: Annotated[Path, typer.Argument(help="YAML file of the run")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to keys, e.g. model.size=large")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Updates of each of the three measurements")] = 10,
    warmup: Annotated[int, typer.Option(min=1, help="Updates before the first of them")] = 5,
) -> None:
    """Trace and time a few updates of a run, from its first samples; nothing is learnt. Writes RUN/profile."""
    from foundation.config import load
    from foundation.profiling.profile import profile
    from foundation.profiling.summary import tables

    found = profile(load(config, overrides or []), steps, warmup)
    if found is None:  # on other ranks
        return
    for table in tables(found):
        console.print(f"\n[bold]{table.title}[/]")
        print_table(table.header, table.rows)
    for file in found.files:
        show("profile", file)
