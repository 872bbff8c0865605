"""The findings of an audit as one HTML page that needs no other file: numbers, pictures, and leaks in red on top."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from shards.addressed import permutation
from shards.audit import Findings, Pair, SourceFacts, facts
from shards.catalog import Catalog, Source
from shards.inspect import readable, source_sheet, summary, thumbnail, values
from shards.reader import Reader

SHOWN = 12  # of each finding so many have their pictures side by side; the others are named
_NAMED = 200
_SIDE = 168
_BINS = 64
_CHIPS = 128  # of a source that its histogram is drawn from


def write_page(findings: Findings, catalog: Catalog, path: Path | str, against: Sequence[Catalog] = ()) -> Path:
    """Write the page of `audit(catalog, against)`; returns its path. Reads the pixels of what it shows, and no more.

    Damaged samples are shown as such. Raises DataError when a shard cannot be read.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    readers = [Reader(one) for one in (catalog, *against)]
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    exact = [Pair(group[0], group[1], None) for group in findings.exact]
    html = pages.get_template("audit.html.j2").render(
        findings=findings,
        catalog=catalog,
        against=against,
        summary=summary(catalog),
        sources=list(_sources(findings.sources, catalog, readers[0])),
        tested=[list(_sources(facts(one), one, reader)) for one, reader in zip(against, readers[1:], strict=True)],
        leaked=_shown(findings.leaked, readers),
        leaked_near=_shown(findings.leaked_near, readers),
        exact=_shown(exact, readers),
        copies={str(pair.first): len(group) for pair, group in zip(exact, findings.exact, strict=True)},
        near=_shown(findings.near, readers),
        named=_NAMED,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")
    return path


def _shown(pairs: Sequence[Pair], readers: Sequence[Reader]) -> list[dict[str, Any]]:
    """The first pairs with their pictures as data URIs."""
    return [
        {
            "pair": pair,
            "pictures": [
                (place, _uri(thumbnail(readable(readers[place.catalog], place.number), _SIDE)))
                for place in (pair.first, pair.second)
            ],
        }
        for pair in pairs[:SHOWN]
    ]


def _sources(found: Iterable[SourceFacts], catalog: Catalog, reader: Reader) -> Iterable[Mapping[str, Any]]:
    """What the page shows of each source: its facts, amplitude histogram and contact sheet."""
    first = 0
    for one, source in zip(found, catalog.sources, strict=True):
        yield {
            "facts": one,
            "source": source,
            "known": {name: column for name, column in one.columns.items() if column.filled},
            "unknown": [name for name, column in one.columns.items() if not column.filled],
            "histogram": _histogram(reader, source, first),
            "sheet": _uri(source_sheet(reader, source, first, columns=10)),
        }
        first += source.samples


def _histogram(reader: Reader, source: Source, first: int) -> str:
    """How the values a model is given are spread, over up to _CHIPS chips: a data URI."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    order = permutation(0, "histogram", torch.zeros(1, dtype=torch.int64), source.samples)[0, :_CHIPS]
    counts, zero, full = np.zeros(_BINS), 0, 0
    for sample in filter(None, (readable(reader, first + number) for number in order.tolist())):
        found = values(sample)
        counts += np.histogram(found, _BINS, (0, 1))[0]
        zero, full = zero + int((found <= 0).sum()), full + int((found >= 1).sum())
    total = max(counts.sum(), 1)
    figure = Figure((4.6, 2.1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.stairs(counts / total, np.linspace(0, 1, _BINS + 1), fill=True, color="#33658a")
    axes.set(yscale="log", xlim=(0, 1))
    axes.set_xlabel("value, as a model is given it", fontsize=8)
    axes.set_ylabel("share of pixels", fontsize=8)
    axes.set_title(f"{zero / total:.1%} are 0, {full / total:.2%} are 1", fontsize=8, loc="left", color="#555")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return _data(file.getvalue())


def _uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return _data(file.getvalue())


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
