"""`foundation evaluate`, `splits` and `paired`: parsing and printing only."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from foundation.cli_text import console, print_table, show, working

SplitFile = Annotated[
    Path | None, typer.Option(help="Split file (foundation splits): exactly these train and test images")
]
AllowSharedGroups = Annotated[bool, typer.Option(help="Go on where groups lie on both sides; every score says so")]


class Protocol(StrEnum):
    """Evaluation protocols; `all`: every frozen one."""

    knn = "knn"
    linear = "linear"
    attentive = "attentive"
    fewshot = "fewshot"
    finetune = "finetune"
    all = "all"


class Mode(StrEnum):
    """What the few-shot protocol trains."""

    linear = "linear"
    finetune = "finetune"


class Named(StrEnum):
    """Few-shot recipes."""

    published = "published"
    improved = "improved"


def evaluate_command(
    checkpoint: Annotated[Path, typer.Argument(help="Run folder or checkpoint folder")],
    data: Annotated[str, typer.Option(help="Catalog (folder or URL) with a train and a test split")],
    protocol: Annotated[
        Protocol, typer.Option(help="How the features are judged; all: knn, linear, attentive and linear few-shot")
    ] = Protocol.linear,
    test: Annotated[str | None, typer.Option(help="Catalog of the test split, when it is another one")] = None,
    split: SplitFile = None,
    allow_shared_groups: AllowSharedGroups = False,
    mode: Annotated[Mode, typer.Option(help="fewshot: frozen encoder or fine-tuning")] = Mode.linear,
    recipe: Annotated[Named, typer.Option(help="fewshot: how the classifier is learnt")] = Named.published,
    shots: Annotated[str, typer.Option(help="fewshot: images per class, e.g. 10,20,40")] = "10,20,40",
    seeds: Annotated[int, typer.Option(min=1, help="fewshot: number of draws")] = 5,
    epochs: Annotated[int, typer.Option(min=1, help="finetune: passes over the training images")] = 20,
    crop: Annotated[
        int, typer.Option(min=0, help="Centre crop in pixels before resizing; 128 as published, 0: none")
    ] = 128,
    device: Annotated[str, typer.Option(help="Device, e.g. cpu or cuda")] = "cpu",
    ema: Annotated[bool, typer.Option(help="Take the running average of the weights (optim.ema_half_life)")] = False,
    best: Annotated[bool, typer.Option("--best", help="The checkpoint that the online probe found best")] = False,
) -> None:
    """Score an encoder, beside the untrained encoder, the pixels and the background-only control."""
    from foundation.evaluation.leakage import verdicts
    from foundation.evaluation.protocols import Options
    from foundation.evaluation.runs import evaluate_run
    from foundation.evaluation.scores import to_table

    check_device(device)
    counts = integers(shots, "--shots")
    with working("reading the images") as tell:
        scores = evaluate_run(
            checkpoint,
            data,
            protocol.value,
            Options(mode.value, recipe.value, counts, range(seeds), epochs),
            test=test,
            split=split,
            allow_shared_groups=allow_shared_groups,
            crop=crop or None,
            device=device,
            averaged=ema,
            best=best,
            progress=lambda what, done, total: tell(f"{what}: {done:,} of {total:,}" if done else what),
        )
    console.print(to_table(scores))
    if protocol.value == "all" and (few := set(counts) - {score.settings.get("shots") for score in scores}):
        show("left out", f"{', '.join(map(str, sorted(few)))} shots: a class has fewer training images")
    say_leakage(verdicts(scores))


def say_leakage(verdict_by_sentence: Mapping[str, str]) -> None:
    """Whether test images were learnt, in red where they were."""
    for sentence, verdict in verdict_by_sentence.items():
        style = "bold red" if verdict == "leaked" else ""
        console.print(escape(f"leakage       {sentence}"), style=style, highlight=False, soft_wrap=True)


def splits_command(
    catalog: Annotated[str, typer.Argument(help="Catalog (folder or URL) with labelled train and test images")],
    out: Annotated[Path, typer.Option(help="File to write (JSON, one image a line)")],
    test: Annotated[str | None, typer.Option(help="Catalog of the test split, when it is another one")] = None,
    group: Annotated[str, typer.Option(help="Metadata column whose values may not lie on both sides")] = "scene",
) -> None:
    """Write the splits of a catalog as a file: every train and test image by hash, with class and group."""
    from foundation.config import DataConfig
    from foundation.evaluation import splits
    from foundation.evaluation.sides import choose

    with working("reading the images"):
        split = choose(catalog, test, DataConfig(), column=group, allow_shared_groups=True).split
    show("split", splits.write(split, out))
    show("sha256", split.sha256)
    counts = split.counts()
    names = sorted({*counts["train"], *counts["test"]})
    rows = [(name, *(counts[side].get(name, 0) for side in splits.SIDES)) for name in names]
    known = [len({row.group for row in split.side(side) if row.group}) for side in splits.SIDES]
    rows += [("all", *(len(split.side(side)) for side in splits.SIDES)), (f"groups ({group})", *known)]
    print_table(("class", *splits.SIDES), rows)
    if shared := split.shared_groups():
        text = f"{len(shared):,} groups ({group}) lie on both sides: evaluate will refuse this file"
        console.print(f"[bold red]{text}[/]", highlight=False)


def paired_command(
    first: Annotated[Path, typer.Argument(help="Run folder whose encoder was evaluated")],
    second: Annotated[Path, typer.Argument(help="Another, or the same with scores of two checkpoints")],
    protocol: Annotated[
        list[str] | None, typer.Option(help='As in the table of scores, e.g. knn or "10-shot linear"; may be repeated')
    ] = None,
) -> None:
    """Is the second encoder better than the first? Paired tests on the same test images."""
    from foundation.evaluation.paired import HEADER, compare_runs

    found = compare_runs(first, second, protocol or ())
    print_table(HEADER, [each.cells() for each in found])
    for each in found:
        if each.differing:
            show("NOT ALIKE", f"{each.protocol}, {each.first} and {each.second}: {each.differing}")


def check_device(device: str) -> None:
    """Refuse a device that torch does not know or this machine does not have."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise typer.BadParameter(f"{device!r} cannot be used here: {reason}", param_hint="--device") from error


def integers(text: str, option: str) -> tuple[int, ...]:
    """`10,20,40` as positive numbers."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
        if min(numbers) < 1:
            raise ValueError(text)
        return numbers
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is not a list of whole numbers such as 10,20,40", param_hint=option
        ) from error
