"""`foundation bench`: parsing and printing only."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foundation.cli_text import console, print_table, show, working
from shards.redaction import redact

if TYPE_CHECKING:
    from foundation.bench_loader import Table

bench_app = typer.Typer(invoke_without_command=True)

Repeats = Annotated[int, typer.Option(min=1, help="Timed repetitions; the median is printed")]
Out = Annotated[Path | None, typer.Option(help="Folder for tables (Markdown), all figures (JSON) and the picture")]
Budget = Annotated[float, typer.Option(min=1, help="Seconds after which nothing new is begun")]
Quick = Annotated[bool, typer.Option(help="Rehearse with small inputs; the figures mean nothing")]


@bench_app.callback()
def bench(context: typer.Context, out: Out = None, quick: Quick = False) -> None:
    """Time the parts of the trainer against their alternatives; without a name: kernels, then step."""
    if context.invoked_subcommand is None:
        bench_kernels(out=out, budget=270.0, quick=quick)  # together they end within eight minutes on a GPU
        bench_step(out=out, budget=150.0, quick=quick)
    elif out or quick:
        raise typer.BadParameter(
            f"give --out and --quick after the name: foundation bench {context.invoked_subcommand}"
        )


def _command() -> str:
    """As it was typed, for the pages."""
    return redact(" ".join(["foundation", *sys.argv[1:]]))


def _show(*parts: str | Iterable[Table]) -> None:
    """Lines, and tables with their titles."""
    for part in parts:
        if isinstance(part, str):
            console.print(part, markup=False)
            continue
        for table in part:
            console.print(f"\n{table.title}", markup=False)
            print_table(table.header, table.rows)


@bench_app.command("kernels")
def bench_kernels(
    out: Out = None,
    repeats: Repeats = 30,
    budget: Budget = 420.0,
    quick: Quick = False,
    tune: Annotated[bool, typer.Option(help="Only: time warps and stages of the Triton kernels of windows")] = False,
) -> None:
    """Time both operators, every backend, beside their published definitions and against the measured roofline."""
    if tune:
        from kernels.bench_tune import rows

        print_table(("direction", "warps", "stages", "ms", "chosen"), rows(repeats))
        return
    from foundation.bench import environment_line, roof_line
    from foundation.bench_kernels import measure, save, tables

    with working("measuring") as tell:
        report = measure(repeats, quick, budget, tell)
    _show(environment_line(report.environment), roof_line(report.roof), tables(report))
    for path in save(report, out, _command()) if out else ():
        show("written", path)


@bench_app.command("step")
def bench_step(
    out: Out = None,
    repeats: Repeats = 5,
    budget: Budget = 420.0,
    sizes: Annotated[
        str, typer.Option(help="Model sizes, e.g. tiny,small,base; default: what the device can do in minutes")
    ] = "",
    batch: Annotated[int | None, typer.Option(min=1, help="Images of a step; default: by size and device")] = None,
    quick: Quick = False,
) -> None:
    """Time the whole training step, by part, against its published definition: ratios in one run, and MFU."""
    from foundation.bench import environment_line, roof_line
    from foundation.bench_step import measure, save, tables

    with working("measuring") as tell:
        report = measure([size for size in sizes.split(",") if size], repeats, batch, budget, quick, tell)
    _show(environment_line(report.environment), roof_line(report.roof), tables(report))
    for path in save(report, out, _command()) if out else ():
        show("written", path)


@bench_app.command("loader")
def bench_loader(
    repeats: Repeats = 3,
    python: Annotated[str | None, typer.Option(help="Interpreter that has the peers; default: this one")] = None,
    passes: Annotated[int, typer.Option(min=0, help="Also: memory over so many passes of a million samples")] = 0,
    out: Annotated[Path | None, typer.Option(help="Markdown file for the tables")] = None,
) -> None:
    """Time the loader against a file per chip, plain WebDataset, and MosaicML streaming and LitData where installed."""
    from foundation.bench_loader import run, write_markdown

    with working("measuring"):
        found = run(repeats, python, large=passes)
    _show(found)
    if out:
        write_markdown(out, f"`foundation bench loader --repeats {repeats}`", found)
        show("written", out)


@bench_app.command("order")
def bench_order(
    lanes: Annotated[int, typer.Option(min=1, help="Lanes of the order")] = 960,
    sources: Annotated[int, typer.Option(min=1, help="Sources that are mixed")] = 4,
) -> None:
    """Cost of the order of a billion samples: time per sample, memory, and a seek to anywhere."""
    from shards.simulation import simulate

    with working("measuring"):
        found = simulate(lanes=lanes, sources=sources)
    print_table(("figure", "value"), ((name, f"{value:,.4g}") for name, value in found.items()))


@bench_app.command("checkpoint")
def bench_checkpoint(repeats: Repeats = 5) -> None:
    """Time checkpoints of ViT-B: stall beside the training and in the foreground, and the restart of a process."""
    from foundation.bench_checkpoint import rows

    print_table(("what", "seconds", "ratio"), rows(repeats))
