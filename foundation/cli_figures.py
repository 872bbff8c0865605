"""`foundation curves`: parsing and printing only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foundation.cli_text import show


def curves_command(
    runs: Annotated[
        list[str] | None, typer.Argument(help="Run folders; with --experiment names of its runs (default: all)")
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="Metric to draw, again for more; default: loss and online monitors")
    ] = None,
    experiment: Annotated[str | None, typer.Option(help="MLflow experiment to read instead of folders")] = None,
    uri: Annotated[str, typer.Option(help="MLflow server or store of the experiment")] = "sqlite:///runs/mlflow.db",
    out: Annotated[Path, typer.Option(help="PNG file to write")] = Path("curves.png"),
    log: Annotated[
        bool | None, typer.Option("--log/--linear", help="Scale of the values; default: --log for losses and norms")
    ] = None,
    log_samples: Annotated[bool, typer.Option(help="Logarithmic scale of the samples seen")] = False,
    smooth: Annotated[
        int | None,
        typer.Option(min=1, help="Points of the running mean, 1: none; default: a twentieth of them from 60 on"),
    ] = None,
) -> None:
    """Training curves of several runs on the same axes, as PNG."""
    from foundation.evaluation.figures.curves import MONITORS, curves_figure
    from foundation.evaluation.histories import chosen, from_folders, from_mlflow

    default = ("loss", *MONITORS)
    if experiment:
        histories = from_mlflow(uri, experiment, runs or [])
    elif runs:
        histories = from_folders(map(Path, runs))
    else:
        raise typer.BadParameter("name run folders, or an MLflow --experiment", param_hint="RUN...")
    keys = chosen(histories, metric or [], default)
    pairs = [(history.name, history.rows) for history in histories]
    show("figure", curves_figure(pairs, keys, out, log=log, log_x=log_samples, width=smooth))
