"""`foundation plan`: parsing and printing only."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Gpu(StrEnum):
    """Devices whose data sheet is known."""

    h100 = "h100"
    h200 = "h200"
    a100 = "a100"
    cpu = "cpu"


def plan_command(
    config: Annotated[Path, typer.Argument(help="YAML file, e.g. configs/sar-jepa.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to keys, e.g. model.size=giant")] = None,
    world: Annotated[int, typer.Option(min=1, help="Processes, one GPU each")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node")] = 8,
    gpu: Annotated[Gpu, typer.Option(help="Which GPU")] = Gpu.h100,
    nic: Annotated[float | None, typer.Option(min=1e-3, help="GB/s of all network cards of a node")] = None,
    nvlink: Annotated[
        float | None, typer.Option(min=1e-3, help="GB/s between GPUs of a node, as a ring sees it")
    ] = None,
    mfu: Annotated[
        float | None, typer.Option(min=1e-3, max=1, help="Share of the dense peak while computing (0.4)")
    ] = None,
    overlap: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of communication that computing hides (0.5)")
    ] = None,
    mtbf_hours: Annotated[float | None, typer.Option(min=1e-3, help="Hours between failures of the cluster")] = None,
    disk: Annotated[float, typer.Option(min=1e-3, help="GB/s with which a node writes checkpoints")] = 2.0,
    data: Annotated[bool, typer.Option(help="Open the catalog; without, plan before the data are there")] = True,
    figure: Annotated[Path | None, typer.Option(help="PNG file: learning rate, and memory by engine")] = None,
    validation: Annotated[bool, typer.Option(help="Show every published number beside the planner's")] = False,
    shard_check: Annotated[
        bool, typer.Option(help="Shard the model as so many processes would, without memory or network")
    ] = False,
    order_check: Annotated[bool, typer.Option(help="Deal out batches to so many ranks and compare with one")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output")] = False,
) -> None:
    """Memory, speed, schedule and data of a run on a cluster, without one. Exit code 1 when it could not start."""
    from foundation.cli_plan_text import show_checks, show_plan
    from foundation.cli_text import show
    from foundation.config import load
    from foundation.planning.checks import order_check as check_order
    from foundation.planning.checks import shard_check as check_shards
    from foundation.planning.cluster import Cluster
    from foundation.planning.picture import draw
    from foundation.planning.plan import plan

    run = load(config, overrides or [])
    options = {"nic": (nic, 1e9), "nvlink": (nvlink, 1e9), "mfu": (mfu, 1.0), "overlap": (overlap, 1.0)}
    given = {name: value * unit for name, (value, unit) in options.items() if value is not None}
    cluster = Cluster.of(world, gpus_per_node, gpu.value, given)
    found = plan(run, cluster, data=data, mtbf_hours=mtbf_hours, disk=disk * 1e9)
    if not as_json:
        show_plan(found, validation)
    checks = [check_shards(run, cluster, found)] if shard_check else []
    checks += [check_order(run, cluster, data)] if order_check else []
    if as_json:
        sys.stdout.write(json.dumps({**found.to_json(), "checks": [c.to_json() for c in checks]}, indent=1) + "\n")
    else:
        show_checks(checks)
    if figure:
        written = draw(run, cluster, found, figure)
        if not as_json:
            show("figure", written)
    raise typer.Exit(int(bool(found.problems) or not all(check.passed for check in checks)))
