"""Commands that pyproject's `foundation.commands` adds to the command line: parsing and printing only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foundation.cli import Overrides
from foundation.cli_evaluate import Protocol
from foundation.cli_text import console, show


def submit(
    config: Annotated[Path, typer.Argument(help="YAML file of the run")],
    cluster: Annotated[Path, typer.Option(help="YAML file of the cluster, e.g. launch/slurm/gpu.yaml")],
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the job script; write and send nothing")] = False,
    evaluate: Annotated[
        str | None, typer.Option(help="Catalog: instead of training, score every checkpoint of the run on it")
    ] = None,
    protocol: Annotated[list[Protocol] | None, typer.Option(help="With --evaluate; may be repeated")] = None,
) -> None:
    """Send a run, or the evaluation of its checkpoints, to Slurm. It requeues itself as long as it makes progress."""
    from launch import submit as submission

    protocols = [each.value for each in protocol or []]
    job = submission.prepare(config, cluster, overrides or [], evaluate, protocols)
    for path in submission.unseen(job):
        typer.echo(f"warning: {path} does not exist here; without it on the nodes the job fails", err=True)
    if dry_run:
        script = submission.render(job, job.next_folder())
        console.print(script, markup=False, highlight=False, soft_wrap=True, end="")
        return
    number, folder = submission.submit(job)
    show("job", number)
    show("folder", folder)
    show("log", folder / f"job-{number}{'-*' if job.tasks else ''}.log")


def doctor(
    folder: Annotated[
        Path | None, typer.Option(help="Look also at this folder, which all nodes should share: that of the runs")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="About as long the all-reduce is measured")] = 5.0,
    wait: Annotated[float, typer.Option(min=1, help="Seconds to wait for a process before it counts as missing")] = 120,
    strict: Annotated[bool, typer.Option("--strict", help="Exit code 1 for warnings too")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output, with all facts")] = False,
) -> None:
    """Look at every node before a run: one table. Exit code 1 when something failed.

    Alone, or started like the training: torchrun ... -m foundation doctor.
    """
    from launch.doctor.examine import examine
    from launch.doctor.report import show_json, show_table

    raise typer.Exit(examine(folder, seconds, wait, strict, show_json if as_json else show_table))
