"""The commands under `foundation shards`: parsing and printing only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foundation.cli_text import console, print_table, show, working

if TYPE_CHECKING:
    from shards.catalog import Catalog

shards_app = typer.Typer(no_args_is_help=True, help="Pack, inspect, audit and make shards.")
Root = Annotated[str, typer.Argument(help="Catalog: a folder, its catalog.json, or a URL such as s3://bucket/corpus")]


class OnError(StrEnum):
    """What packing does about a file that cannot be used."""

    stop = "stop"
    skip = "skip"


class Split(StrEnum):
    """What a source is for."""

    pretrain = "pretrain"
    train = "train"
    test = "test"


class Codec(StrEnum):
    """How pixels stand in a shard."""

    raw = "raw"
    zstd = "zstd"


@shards_app.command()
def sources(
    kind: Annotated[str | None, typer.Argument(help="One kind: its layout, options, origin, licence, counts")] = None,
) -> None:
    """Kinds of sources and whether they can be read here; with a KIND everything about it."""
    from shards.sources import facts, rows

    if kind is None:
        print_table(("kind", "what it is", "here"), [(r.kind, r.description, r.reason or "ready") for r in rows()])
        return
    found = facts(kind)
    width = max(len(what) for what, _ in found) + 2
    for what, text in found:
        show(what.ljust(width), " ".join(text.split()))


@shards_app.command()
def pack(
    out: Annotated[str, typer.Argument(help="Catalog folder; sources already there under other names stay")],
    path: Annotated[str, typer.Argument(help="Folder, .tar or file of images, or the URL of a folder")],
    name: Annotated[str, typer.Option(help="Name of the source; published parts become NAME-train, NAME-test, ...")],
    kind: Annotated[str, typer.Option(help="Layout of the source: foundation shards sources")] = "folder",
    split: Annotated[
        Split | None, typer.Option(help="Default: the published splits of the corpus, or pretrain")
    ] = None,
    labels: Annotated[bool, typer.Option(help="Take classes; kind folder: the parent folder of an image")] = True,
    include: Annotated[
        list[str] | None, typer.Option(help="Only files that match, e.g. '*/images/*'; may be repeated")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="No files that match; may be repeated")] = None,
    tile: Annotated[int | None, typer.Option(min=2, help="Cut larger images into tiles of this side, pixels")] = None,
    overlap: Annotated[int, typer.Option(min=0, help="Pixels that neighbouring tiles share")] = 0,
    min_std: Annotated[
        float, typer.Option(min=0, help="Leave out tiles with std / mean below this; 0.6 drops flat sea")
    ] = 0.0,
    max_nodata: Annotated[float, typer.Option(min=0, max=1, help="Largest share of a tile outside the image")] = 0.0,
    min_side: Annotated[int, typer.Option(min=0, help="Leave out images with a shorter side, pixels")] = 0,
    option: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE, an option of this kind: foundation shards sources KIND")
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="Amplitude that becomes 1; default: 255 for 8 bits, else the 99.9 % quantile")
    ] = None,
    decibels: Annotated[
        float, typer.Option(min=0, help="With --scale: a logarithm over this range below it; 0: linear")
    ] = 0.0,
    codec: Annotated[Codec, typer.Option(help="raw, or zstd: smaller by a tenth, slower to read")] = Codec.raw,
    shard_mb: Annotated[int, typer.Option(min=1, help="Size of a shard, MB")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read and write; 0: this one")] = 0,
    on_error: Annotated[OnError, typer.Option(help="skip: list bad files in rejected.jsonl and go on")] = OnError.stop,
    incomplete: Annotated[bool, typer.Option("--incomplete", help="Accept other than the published counts")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not go on from an earlier pack that was stopped")] = False,
) -> None:
    """Pack chips or scenes into WebDataset shards. The same command goes on after it was stopped."""
    from shards.catalog import Amplitude
    from shards.pack import pack as pack_sources
    from shards.pack import published
    from shards.sources.base import Options

    check_tiles(kind, tile, overlap)
    if decibels and scale is None:
        raise typer.BadParameter("needs --scale, the amplitude that becomes 1", param_hint="--decibels")
    chosen = Options(
        labels=labels,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        tile=tile,
        overlap=overlap,
        min_std=min_std,
        max_nodata=max_nodata,
        min_side=min_side,
        extra=pairs(option or []),
    )
    with going_on(), working(f"packing {name}") as tell:
        specs = published(
            kind,
            name,
            path,
            split=split.value if split else None,
            options=chosen,
            amplitude=None if scale is None else Amplitude("given", scale, decibels),
            incomplete=incomplete,
            codec=codec.value,
        )
        catalog = pack_sources(
            out,
            specs,
            shard_bytes=shard_mb << 20,
            on_error=on_error.value,
            workers=workers,
            fresh=fresh,
            progress=lambda source, count: tell(f"packing {source}: {count:,} samples read"),
        )
    print_summary(catalog)
    packed = catalog.only(spec.name for spec in specs).sources
    for note in dict.fromkeys(note for source in packed for note in source.statistics.get("notes", ())):
        show("warning", note)
    show("catalog", f"{Path(out) / 'catalog.json'}  fingerprint {catalog.fingerprint[:12]}")


@shards_app.command()
def inspect(
    catalog: Root,
    sheet: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="PNG to write; default: contact-sheet.png in the catalog folder"),
    ] = None,
) -> None:
    """Show what a catalog holds, with a contact sheet of its chips."""
    from shards.inspect import contact_sheet

    opened = opened_catalog(catalog)
    target = writable(sheet or beside(opened, "contact-sheet.png"), "--sheet")
    print_summary(opened)
    show("contact sheet", contact_sheet(opened, target))


@shards_app.command()
def verify(
    catalog: Root,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Write the sidecar indexes again from the shards")] = False,
) -> None:
    """Read every shard and compare its sha256 with the catalog."""
    from shards.index import rebuild as rebuild_indexes

    opened = opened_catalog(catalog)
    if rebuild:  # first, since a missing index would fail the check
        console.print(f"{rebuild_indexes(opened)} indexes written")
    with working("reading"):
        opened.verify()
    console.print(f"{opened.samples:,} samples as the catalog says")


@shards_app.command()
def audit(
    catalog: Root,
    against: Annotated[
        list[str] | None,
        typer.Option(help="Catalog whose test split counts as tested, or all of it if it has none; may be repeated"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Page to write; default: audit.html in the catalog folder")
    ] = None,
    near: Annotated[bool, typer.Option(help="Also look for near duplicates")] = True,
) -> None:
    """Duplicates, overlap with test data and statistics as one HTML page; exit code 1 when test images are learnt."""
    from shards.audit import audit as audit_catalog
    from shards.audit_page import write_page

    opened, others = opened_catalog(catalog), [opened_catalog(root) for root in against or []]
    page = writable(out or beside(opened, "audit.html"), "--out")
    with working("reading the metadata"):
        findings = audit_catalog(opened, others, near=near)
    print_table(("found", "number"), findings.counts.items())
    show("page", write_page(findings, opened, page, others))
    raise typer.Exit(0 if findings.clean else 1)


@shards_app.command()
def copy(
    catalog: Root,
    target: Annotated[str, typer.Argument(help="Folder or URL, e.g. s3://bucket/corpus; a bucket must exist")],
    again: Annotated[bool, typer.Option("--again", help="Send also what is there under its name and size")] = False,
) -> None:
    """Copy a catalog and its shards, the catalog last. The same command goes on after it was stopped."""
    from shards.transfer import copy as copy_catalog

    with going_on(), working("copying") as tell:
        sent = copy_catalog(opened_catalog(catalog), target, lambda name, _: tell(f"copying: {name}"), again=again)
    console.print(f"{sent} files copied; data.catalog={target}", soft_wrap=True, highlight=False)


@shards_app.command()
def synth(
    out: Annotated[Path, typer.Argument(help="Catalog folder")],
    size: Annotated[int, typer.Option(help="Side of a chip, pixels")] = 96,
    pretrain: Annotated[int, typer.Option(help="Unlabelled chips")] = 4000,
    train_per_class: Annotated[int, typer.Option(help="Labelled training chips per class")] = 200,
    test_per_class: Annotated[int, typer.Option(help="Labelled test chips per class")] = 100,
    seed: Annotated[int, typer.Option(help="Seed")] = 0,
) -> None:
    """Write the embedded synthetic corpus: speckle, clutter, and eight classes of scatterer constellations."""
    from shards.synthetic import write

    with working("writing"):
        catalog = write(out, size, train_per_class, test_per_class, pretrain, seed)
    print_summary(catalog)


@contextmanager
def going_on() -> Iterator[None]:
    """Ctrl-C in a command that goes on where it was: one line, exit status 130 as shells have it."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on where it was", err=True)
        raise typer.Exit(130) from None


def check_tiles(kind: str, tile: int | None, overlap: int) -> None:
    """Refuse an overlap that means nothing."""
    from shards.sources import corpus
    from shards.sources.scenes import TILE, Scenes

    side = tile or (TILE if issubclass(corpus(kind), Scenes) else None)
    if overlap and side is None:
        raise typer.BadParameter(f"needs --tile: kind {kind} takes images whole", param_hint="--overlap")
    if side and overlap >= side:
        raise typer.BadParameter(f"{overlap} leaves nothing of tiles of {side} pixels", param_hint="--overlap")


def beside(catalog: Catalog, name: str) -> Path:
    """A file in the folder of a catalog, here for one of a URL."""
    return (Path() if "://" in catalog.root else Path(catalog.root)) / name


def writable(path: Path, option: str) -> Path:
    """The path, before any work is done for it, when a file can be written there."""
    folder = next(p for p in path.absolute().parents if p.exists())
    if not (folder.is_dir() and os.access(path if path.exists() else folder, os.W_OK)):
        raise typer.BadParameter(f"{path} cannot be written; name another file", param_hint=option)
    return path


def opened_catalog(root: str) -> Catalog:
    """The catalog, with the default cache for shards of a URL."""
    from foundation.config import DataConfig
    from foundation.training.data import cache
    from shards.catalog import load

    return load(root, cache=cache(DataConfig()))


def print_summary(catalog: Catalog) -> None:
    """The table of a catalog's sources."""
    from shards.inspect import summary

    found = summary(catalog)
    print_table(tuple(found[0]), [tuple(row.values()) for row in found])


def pairs(options: list[str]) -> dict[str, str]:
    """`key=value` arguments as a dictionary."""
    split = [option.partition("=") for option in options]
    if wrong := [key for key, equals, _ in split if not equals or not key]:
        raise typer.BadParameter(f"{wrong[0]!r} is not KEY=VALUE", param_hint="--option")
    return {key: value for key, _, value in split}
