"""`foundation track`: parsing and printing only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from foundation.cli_text import show


def track_command(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; those that a process trains are passed over")],
    uri: Annotated[str | None, typer.Option(help="Another MLflow server or store; default: the one of the run")] = None,
) -> None:
    """Send to MLflow what it lacks of runs: after an outage, from nodes without a network, or after a kill.

    A run that was killed and not started again becomes FAILED.
    """
    from foundation.errors import ExplainedError, LaunchError
    from foundation.evaluation.artifacts import catch_up

    others = {run for run in runs if _is_something_else(run)}
    others = others if others < set(runs) else set()  # where nothing is a run, each says so as an error
    failed = False
    for run in runs:
        if run in others:
            show("no run", run)
            continue
        try:
            show("MLflow run", f"{catch_up(run, uri)}  {run}")
        except LaunchError as error:  # its own process sends
            show("passed over", f"{run}: {error.what}")
        except ExplainedError as error:
            failed = True
            text = f"[bold red]{type(error).__name__}[/]: {escape(str(error))}"
            Console(stderr=True).print(text, highlight=False, soft_wrap=True)
    if failed:
        raise typer.Exit(2)


def _is_something_else(folder: Path) -> bool:
    """Whether it is there and no run: `runs/*` names the files of a store as well. What is not there is a mistake."""
    try:
        (folder / "config.yaml").stat()
    except (FileNotFoundError, NotADirectoryError):
        return os.path.lexists(folder)
    except OSError:
        return False  # who reads it says why
    return False
