"""`foundation replay`: one update of a run, taken apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foundation.cli_text import console, print_table, show, working

if TYPE_CHECKING:
    from foundation.replay import Replay


def replay_command(
    run: Annotated[Path, typer.Argument(help="Run folder")],
    at: Annotated[
        int | None, typer.Option(help="Samples at which it began; default: the last that was skipped")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of each table")] = 10,
) -> None:
    """Make one update of a run again, alone, and show which samples, modules and gradients were at fault."""
    from foundation.replay import replay
    from foundation.training.evidence import folder_of

    with working("updates before it") as tell:
        result = replay(run, at, lambda done, of: tell(f"updates before it: {done:,} of {of:,}"))
    _show(result, rows)
    show("replay", folder_of(run, result.position))


def _show(result: Replay, rows: int) -> None:
    """Four short answers: how large, which images, where in the network, which weights."""
    begun = f"from the checkpoint at {result.begun:,}" if result.begun else "from the initial weights"
    above = "" if result.loss <= result.limit else f", above the limit of {result.limit:.4g}"
    console.print(f"update at {result.position:,} samples, {begun}: loss {result.loss:.4g}{above}, ", end="")
    console.print(f"gradient norm {result.grad_norm:.4g}")
    if result.same_batch is not None:
        console.print(
            "images and masks " + ("are those that were kept" if result.same_batch else "DIFFER FROM THOSE KEPT")
        )
    columns = ("loss", "position", "source", "key")
    print_table(columns, [(f"{s['loss']:.4g}", s["position"], s["source"], s["key"]) for s in result.samples[:rows]])
    if result.modules:
        console.print(f"outputs that are not finite begin in: {', '.join(result.modules[:rows])}")
    else:
        console.print("every module gives finite outputs")
    gradients = [(name, f"{norm:.4g}", bad or "") for name, norm, bad in result.parameters[:rows]]
    print_table(("parameter", "gradient norm", "not finite"), gradients)
