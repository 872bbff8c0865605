"""`foundation export`: parsing and printing only."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from foundation.cli_text import show


class Form(StrEnum):
    """Formats of an export."""

    timm = "timm"
    timm_stock = "timm-stock"
    torch = "torch"
    onnx = "onnx"
    huggingface = "huggingface"


class Pool(StrEnum):
    """How tokens become one vector."""

    token = "token"  # noqa: S105 - a class token
    avg = "avg"


def export_command(
    run: Annotated[Path, typer.Argument(help="Run folder or checkpoint folder")],
    out: Annotated[Path, typer.Argument(help="Folder to make")],
    form: Annotated[Form, typer.Option("--format", help="Who shall read it")],
    average: Annotated[bool, typer.Option("--average", "--ema", help="The running average of the weights")] = False,
    best: Annotated[bool, typer.Option("--best", help="The checkpoint that the online probe found best")] = False,
    pool: Annotated[
        Pool | None,
        typer.Option(help="Features: class token, or mean of the patch tokens; default: token if there is one"),
    ] = None,
    register: Annotated[
        str | None, typer.Option(metavar="NAME", help="Also register it in MLflow under this name, with its card")
    ] = None,
) -> None:
    """Write an encoder for timm, PyTorch, ONNX or the Hugging Face hub, load it again and compare its features."""
    from foundation.interchange import registration
    from foundation.interchange.export import export

    if register:
        registration.check(form.value, register)
    chosen = pool.value if pool else None
    made = export(run, out, form.value, averaged=average, best=best, pool=chosen)
    show("export", f"{made.path}, features differ by {made.gap:.1e} after loading it again")
    if register:
        kept = registration.register(run, made.path, register, averaged=average, best=best, pool=chosen)
        show(
            "registered",
            f"models:/{kept.name}/{kept.version}, features differ by {kept.gap:.1e} after loading it again",
        )
