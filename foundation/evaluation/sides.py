"""Which images are learnt from and tested: those of a split file, or a catalog's own splits; either way, on record."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from foundation.config import DataConfig
from foundation.errors import DataError
from foundation.evaluation import splits
from foundation.evaluation.draws import Draws
from foundation.evaluation.features import Listing, listing
from foundation.files import write_whole
from foundation.training.data import cache, ruled
from shards.catalog import Catalog
from shards.catalog import load as load_catalog
from shards.reader import Reader
from shards.redaction import redact

FOLDER = "splits"


@dataclass(frozen=True)
class Chosen:
    """The listings, the split they are, and the catalog of the tested images."""

    train: Listing
    test: Listing
    split: splits.Split
    tested: Catalog
    train_data: str
    """names the training images: the catalog's fingerprint, or the sha256 of a split file"""
    draws: Path | None = None
    """folder of draws that came with a split file"""

    def file(self, run: Path) -> Path:
        """Where a run keeps this split."""
        return run / FOLDER / f"{self.split.sha256[:12]}.json"

    def keep(self, run: Path) -> tuple[Path, Draws]:
        """Write the split into `RUN/splits`; the file, and where few-shot draws of it are kept."""
        path = splits.write(self.split, self.file(run))
        folder = path.with_suffix(".draws")
        if self.draws is not None:  # what came with the split stands above what was drawn here before
            for file in sorted(self.draws.glob("*.json")):
                write_whole(folder / file.name, file.read_bytes())
        return path, Draws(self.split.sha256, folder, self.draws)


def only(catalog: Catalog, ids: Collection[int]) -> Catalog:
    """The samples of a catalog with these ids."""
    wanted, sources, start = np.array(sorted(ids)), [], 0
    for source in catalog.sources:
        rows = []
        for count in source.kept:
            rows.append((wanted[(wanted >= start) & (wanted < start + count)] - start).astype(np.int32))
            start += count
        if source.rows is not None:
            rows = [old[new] for old, new in zip(source.rows, rows, strict=True)]
        if sum(map(len, rows)):
            sources.append(replace(source, rows=tuple(rows)))
    return replace(catalog, sources=tuple(sources))


def own(catalog: Catalog, other: Catalog) -> tuple[Listing, Listing]:
    """The labelled train samples of one catalog and test samples of another. Raises DataError when there are none."""
    parts = []
    for split, source in (("train", catalog), ("test", other)):
        if not any(s.split == split for s in source.sources):
            raise DataError(
                f"the catalog has no {split} split",
                where=source.root,
                do=f"pack labelled images with --split {split}, name another catalog (--data for train, --test for "
                "test), or list the images in a split file (--split)",
            )
        parts.append((source.select(split), f"{split} split of {redact(source.root)}"))
    (learnt, here), (tested, there) = parts
    train = listing(Reader(learnt), learnt.classes, where=here)
    return train, listing(Reader(tested), tested.classes, train.classes, where=there)


def choose(
    data: str,
    test: str | None,
    rules: DataConfig,
    split: Path | None = None,
    column: str | None = None,
    allow_shared_groups: bool = False,
) -> Chosen:
    """The images of the split file, sought in both catalogs, or the own splits of the catalogs `data` and `test`.

    `rules` are the amplitude rules of the encoder. Raises DataError as `splits.read`, `splits.check` and
    `splits.listings` do, and for own splits that share known groups, unless that is allowed.
    """
    known = cache(rules)
    if split is not None:
        wanted = splits.read(split)
        splits.check(wanted, str(split), allow_shared_groups)
        pool = ruled(load_catalog(*dict.fromkeys((data, test or data)), cache=known), rules, known=True)
        train, tested = splits.listings(wanted, pool, str(split))
        draws = split.with_suffix(".draws")
        there = only(pool, tested.ids)
        return Chosen(train, tested, wanted, there, wanted.sha256, draws if draws.is_dir() else None)
    catalog, other = (ruled(load_catalog(root, cache=known), rules, known=True) for root in (data, test or data))
    train, tested = own(catalog, other)
    column = column or "scene"
    known_groups = [splits.groups(part, column) for part in (catalog.select("train"), other.select("test"))]
    found = splits.of_listings(train, tested, known_groups, column)
    splits.check_groups(found, " and ".join(dict.fromkeys(map(redact, (data, test or data)))), allow_shared_groups)
    return Chosen(train, tested, found, other.select("test"), catalog.select("train").fingerprint)
