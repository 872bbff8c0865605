"""`foundation compare`: several pretrainings under one budget, one table and one figure."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from foundation.cli_text import console, print_table, show

if TYPE_CHECKING:
    from foundation.comparing.cells import Outcome
    from foundation.comparing.plan import Comparison

ARRAY = "SLURM_ARRAY_TASK_ID"


def compare_command(
    comparison: Annotated[Path, typer.Argument(help="YAML file, e.g. configs/compare/objectives-nano.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to keys of every row, e.g. data.catalog=corpora")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at a time; default: one per GPU, one without")] = None,
    cell: Annotated[
        int | None, typer.Option(envvar=ARRAY, help="Do this one run only; a task of a Slurm array takes its own")
    ] = None,
    collect: Annotated[bool, typer.Option("--collect", help="Run nothing; table and figure of what is there")] = False,
    listed: Annotated[bool, typer.Option("--list", help="Show the runs and what is finished; run nothing")] = False,
    device: Annotated[str | None, typer.Option(help="Device of the evaluation; default: that of the training")] = None,
) -> None:
    """Pretrain and judge every row of a comparison under every seed; go on where it was stopped."""
    from foundation import signals

    if cell is not None:
        signals.listen()  # before torch is imported, so that no request is lost
    from foundation.comparing.plan import load

    found = load(comparison, overrides or [])
    if listed:
        show_cells(found, comparison, overrides or [])
    elif cell is not None and not collect:
        one(found, cell, device)
    else:
        failed = [] if collect else everything(found, comparison, overrides or [], jobs, device)
        write_results(found)
        raise typer.Exit(int(bool(failed)))


def show_cells(found: Comparison, path: Path, overrides: list[str]) -> None:
    """The runs by number, and how to start them as an array."""
    from foundation.comparing.cells import finished

    rows = [
        (number, c.row, c.seed, "finished" if finished(found, c) else "", c.config.run_folder)
        for number, c in enumerate(found.cells)
    ]
    print_table(("cell", "row", "seed", "state", "run"), rows)
    command = shlex.join(["foundation", "compare", str(path), *overrides])
    show("Slurm array", array_command(command, len(found.cells)))
    show("then", f"{command} --collect")


def array_command(command: str, cells: int) -> str:
    """Every cell as a task of a Slurm array; one that is asked to stop saves and goes back to the queue."""
    from foundation.signals import STOPPED

    # One task of an array has the number of the array for its own, and that number would requeue all of them.
    task = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    script = f"srun {command}; code=$?; [ $code -ne {STOPPED} ] || scontrol requeue {task}; exit $code"
    return f"sbatch --array=0-{cells - 1} --requeue --signal=USR2@300 --open-mode=append --wrap {shlex.quote(script)}"


def one(found: Comparison, cell: int, device: str | None) -> None:
    """One cell in this process."""
    from foundation import signals
    from foundation.comparing.cells import BUSY, Busy, run_cell
    from foundation.training.stopping import Stopped

    try:
        show("run", run_cell(found, cell, device))
    except (Stopped, signals.Requested):
        raise typer.Exit(signals.STOPPED) from None
    except Busy as busy:
        console.print(escape(str(busy)), highlight=False, soft_wrap=True)
        raise typer.Exit(BUSY) from None


def everything(
    found: Comparison, path: Path, overrides: list[str], jobs: int | None, device: str | None
) -> list[Outcome]:
    """All cells that are not finished, with a line for each that ends; returns those that failed."""
    import torch

    from foundation.comparing.cells import command_line, finished, run_all

    waiting = sum(not finished(found, c) for c in found.cells)
    total, at_once = len(found.cells), min(jobs or max(1, torch.cuda.device_count()), max(1, waiting))
    console.print(f"{total - waiting} of {total} runs are finished; {at_once} at a time", highlight=False)
    ended = 0

    def told(outcome: Outcome) -> None:
        nonlocal ended
        ended += 1
        c = found.cells[outcome.number]
        state = "[green]finished[/]" if outcome.finished else "[bold red]FAILED[/]"
        if outcome.busy:
            state = "[yellow]left to another process[/]"
        name = escape(c.config.name)
        console.print(f"{ended}/{waiting}  {name}  {state} in {outcome.seconds:,.0f} s", highlight=False)
        if not (outcome.finished or outcome.busy):
            console.print(escape(outcome.lines), highlight=False, soft_wrap=True)
            show("log", c.config.run_folder / "cell.log")

    outcomes = run_all(found, command_line(path, overrides, device), at_once, told)
    return [outcome for outcome in outcomes if not (outcome.finished or outcome.busy)]


def write_results(found: Comparison) -> None:
    """Table and figure of the cells that are finished."""
    from foundation.comparing.figure import comparison_figure
    from foundation.comparing.results import collect, to_json
    from foundation.comparing.table import caption, table, to_markdown
    from foundation.files import write_whole

    results, folder = collect(found), found.folder
    if not results.rows:
        console.print("no run is finished: no table", highlight=False)
        return
    print_table(*table(found, results))
    for line in caption(found, results):
        console.print(f"- {line}", highlight=False, markup=False)
    show("table", write_whole(folder / "comparison.md", to_markdown(found, results)))
    show("values", write_whole(folder / "comparison.json", to_json(results)))
    show("figure", comparison_figure(results, folder / "comparison.png"))
