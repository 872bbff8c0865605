"""`foundation robustness` and `foundation drift`: parsing and printing only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foundation.cli_evaluate import AllowSharedGroups, SplitFile, check_device, integers, say_leakage
from foundation.cli_text import console, print_table, show, working


def robustness_command(
    checkpoint: Annotated[Path, typer.Argument(help="Run folder or checkpoint folder")],
    data: Annotated[str, typer.Option(help="Catalog (folder or URL) with a train and a test split")],
    test: Annotated[str | None, typer.Option(help="Catalog of the test split, when it is another one")] = None,
    split: SplitFile = None,
    allow_shared_groups: AllowSharedGroups = False,
    corruptions: Annotated[str, typer.Option(help="Which")] = "speckle,resolution,rotation,gain",
    crop: Annotated[int, typer.Option(min=0, help="Centre crop in pixels before resizing, 0: none")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the added speckle")] = 0,
    device: Annotated[str, typer.Option(help="Device, e.g. cpu or cuda")] = "cpu",
    ema: Annotated[bool, typer.Option(help="Take the running average of the weights (optim.ema_half_life)")] = False,
) -> None:
    """Accuracy on corrupted test images of a linear probe learnt on clean ones, beside untrained encoder and pixels."""
    from foundation.evaluation.report import FIGURES
    from foundation.evaluation.robustness import FIGURE, FILE, robustness_run, to_table
    from foundation.evaluation.runs import run_folder

    check_device(device)
    with working("robustness") as tell:
        rows, settings = robustness_run(
            checkpoint,
            data,
            test=test,
            split=split,
            allow_shared_groups=allow_shared_groups,
            kinds=tuple(kind.strip() for kind in corruptions.split(",")),
            crop=crop or None,
            seed=seed,
            device=device,
            averaged=ema,
            tell=tell,
        )
    console.print(to_table(rows, settings))
    say_leakage({settings["leakage"]["sentence"]: settings["leakage"]["verdict"]})
    run = run_folder(checkpoint)
    show("rows", run / FILE)
    show("figure", run / FIGURES / FIGURE)
    show("report", run / "report.html")


def drift_command(
    data: Annotated[str, typer.Option(help="Catalog (folder or URL), all splits")],
    objectives: Annotated[
        str | None, typer.Option(help="Names or YAML files, separated by commas. Default: all with a fixed target")
    ] = None,
    images: Annotated[int, typer.Option(min=2, help="Images, spread over the catalog")] = 300,
    looks: Annotated[str, typer.Option(help="Looks of the added speckle")] = "1,4",
    size: Annotated[int, typer.Option(min=32, help="Side of the images, a multiple of 16 pixels")] = 224,
    crop: Annotated[int, typer.Option(min=0, help="Centre crop in pixels before resizing, 0: none")] = 128,
    only: Annotated[str | None, typer.Option(help="Sources of the catalog, separated by commas. Default: all")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the speckle")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for drift.json and drift.png")] = Path("drift"),
) -> None:
    """How much the target of each objective changes when the same scene gets new speckle."""
    from foundation.evaluation import drift
    from shards.catalog import load

    if size % 16:  # cells of histograms
        raise typer.BadParameter(f"{size} is no multiple of 16", param_hint="--size")
    catalog = load(data)
    catalog = catalog.only(only.split(",")) if only else catalog
    chips = drift.pick(catalog, images)
    targets, skipped = drift.targets(objectives.split(",") if objectives else None, len(chips[0].sample.pixels))
    for line in skipped:
        console.print(line, markup=False, highlight=False)
    with working("drift") as tell:
        rows = drift.drift(targets, chips, size, crop or None, integers(looks, "--looks"), seed, tell)
    print_table(*drift.to_rows(rows))
    settings = {"data": f"{data} {catalog.fingerprint[:8]}", "size": size, "crop": crop or None, "seed": seed}
    show("rows", drift.write(out, rows, settings))
    show("figure", drift.drift_figure(rows, out / "drift.png"))
