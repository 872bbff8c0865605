"""`foundation track`: parsing and printing only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foundation.cli_text import show


def track_command(
    runs: Annotated[list[Path], typer.Argument(help="Run folders that no process trains any more")],
    uri: Annotated[str | None, typer.Option(help="Another MLflow server or store; default: the one of the run")] = None,
) -> None:
    """Send to MLflow what it lacks of runs: after an outage, from nodes without a network, or after a kill.

    A run that was killed and not started again becomes FAILED.
    """
    from foundation.evaluation.artifacts import catch_up

    for run in runs:
        show("MLflow run", f"{catch_up(run, uri)}  {run}")
