"""The command line: parsing and printing only."""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from enum import StrEnum
from importlib.metadata import entry_points
from pathlib import Path
from types import TracebackType
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from foundation.cli_bench import bench_app
from foundation.cli_compare import compare_command
from foundation.cli_evaluate import evaluate_command, paired_command, splits_command
from foundation.cli_export import export_command
from foundation.cli_figures import curves_command
from foundation.cli_help import EPILOG, HELP, Page
from foundation.cli_inspect import inspect_command, profile_command
from foundation.cli_plan import plan_command
from foundation.cli_replay import replay_command
from foundation.cli_robustness import drift_command, robustness_command
from foundation.cli_shards import shards_app
from foundation.cli_text import console, print_table, show
from foundation.cli_track import track_command
from shards.errors import ExplainedError
from shards.redaction import redact, redacted

# Before torch loads its OpenMP runtime: threads that spin while they wait make a CPU run many times slower as soon as
# anything else wants the cores, its own readers included.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    cls=Page, help=HELP, epilog=EPILOG, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich"
)
app.add_typer(shards_app, name="shards")
app.add_typer(bench_app, name="bench")
app.command("plan")(plan_command)
app.command("inspect")(inspect_command)
app.command("profile")(profile_command)
app.command("compare")(compare_command)
app.command("curves")(curves_command)
app.command("replay")(replay_command)
app.command("robustness")(robustness_command)
app.command("drift")(drift_command)
app.command("export")(export_command)
app.command("evaluate")(evaluate_command)
app.command("splits")(splits_command)
app.command("paired")(paired_command)
app.command("track")(track_command)

Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to keys, e.g. optim.lr=3e-4 train.samples=100000")]


class Listed(StrEnum):
    """What `foundation list` knows."""

    models = "models"
    objectives = "objectives"
    engines = "engines"
    attention = "attention"
    sources = "sources"
    config = "config"


def main() -> None:
    """Entry point: errors meant for people are printed without a traceback, exit status 2. Nothing prints a secret."""
    sys.excepthook = _unexpected
    with redirect_stdout(redacted(sys.stdout)), redirect_stderr(redacted(sys.stderr)):
        try:
            extend()
            app()
        except ExplainedError as error:
            # soft_wrap: a broken path or command cannot be copied.
            text = f"[bold red]{type(error).__name__}[/]: {escape(str(error))}"
            Console(stderr=True).print(text, highlight=False, soft_wrap=True)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)


def _unexpected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As Python prints it."""
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def extend() -> None:
    """Add the commands of packages above this one: entry points of the group `foundation.commands`."""
    known = {command.name for command in app.registered_commands}
    for entry in entry_points(group="foundation.commands"):
        if entry.name not in known:
            app.command(entry.name)(entry.load())


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file, e.g. configs/sar-jepa-tiny.yaml")],
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option(help="Refuse to resume; error when the run folder holds checkpoints")] = False,
) -> None:
    """Pretrain. Resumes from the newest valid checkpoint of the run folder by itself."""
    from foundation import signals

    signals.listen()  # before torch is imported, so that no request is lost
    from foundation.config import load
    from foundation.training.run import train as run_training
    from foundation.training.stopping import Stopped

    try:
        run = run_training(load(config, overrides or []), resume=not fresh)
    except Stopped:
        raise typer.Exit(signals.STOPPED) from None
    if os.environ.get("RANK", "0") == "0":
        show("run", run)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder")],
    data: Annotated[
        str | None, typer.Option(help="Catalog for the pictures; default: the one it was trained on")
    ] = None,
) -> None:
    """Draw the report of a run again: one self-contained HTML page."""
    from foundation.config import load
    from foundation.evaluation.artifacts import publish_report
    from foundation.evaluation.panels import write_run_report
    from foundation.training.data import training_catalog
    from shards.catalog import load as load_catalog

    catalog = load_catalog(data) if data else training_catalog(load(run / "config.yaml"))
    show("report", write_run_report(run, catalog, catalog))
    publish_report(run)


@app.command("import")
def import_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(help="Published checkpoint (.pth)")],
    out: Annotated[Path, typer.Argument(help="Run folder to make; of SARATR-X a folder for load_export")],
) -> None:
    """Turn a published checkpoint (SAR-JEPA, LoMaR, MAE, FG-MAE, I-JEPA, SARATR-X) into one of this trainer."""
    from foundation.interchange import import_published

    show("checkpoint", import_published(checkpoint, out))


@app.command()
def parity(
    folder: Annotated[Path, typer.Argument(help="Folder with reference values (*.npz, *.json)")],
    attention: Annotated[
        list[str] | None, typer.Option(help="Attention backend to compare; again for more. Default: those of any CPU")
    ] = None,
) -> None:
    """Compare this installation with reference values; exit code 1 when a tolerance is exceeded."""
    from foundation.parity import ATTENTION, compare

    failed = False
    for line in compare(folder, attention or ATTENTION):
        failed |= line.status == "FAILED"
        colour = {"ok": "green", "FAILED": "bold red"}.get(line.status, "yellow")
        error = "-" if line.error is None else f"{line.error:.1e}"
        tolerance = "-" if line.tolerance is None else f"{line.tolerance:.0e}"
        note = f"  {line.note}" if line.note else ""
        text = f"{line.file}: {line.item}  error {error}  tolerance {tolerance}{note}"
        console.print(f"[{colour}]{line.status:<16}[/]{escape(text)}", highlight=False, soft_wrap=True)
    raise typer.Exit(int(failed))


@app.command()
def demo(root: Annotated[Path, typer.Option(help="Folder for everything that is written")] = Path("runs")) -> None:
    """Synthetic corpus, pretraining, probe and report on a laptop CPU."""
    from foundation.demo import demo as run_demo

    raise typer.Exit(0 if run_demo(root, console) else 1)


@app.command("list")
def list_parts(what: Annotated[Listed, typer.Argument(help="Which parts; config: every key")]) -> None:
    """What exists and, for what cannot run here, why."""
    from foundation.listing import rows

    print_table(*rows(what.value))
