"""Overlap between catalogs: the same pixels on both sides of a split make a score mean nothing."""

from __future__ import annotations

import json

from shards.catalog import Catalog
from shards.errors import DataError
from shards.reader import Reader


def hashes(catalog: Catalog) -> dict[str, str]:
    """Content hash of every sample → its key, from the samples' metadata; pixels are not read."""
    reader = Reader(catalog)
    found = {}
    for number in range(len(reader)):
        meta = json.loads(reader.meta(number))
        found[meta["sha256"]] = f"{meta['source']}: {meta['from']}"
    return found


def overlap(learnt: Catalog, tested: Catalog) -> list[str]:
    """«learnt = tested» for every pair of identical images in the two catalogs."""
    test = hashes(tested)
    return [f"{name} = {test[digest]}" for digest, name in hashes(learnt).items() if digest in test]


def refuse_overlap(learnt: Catalog, tested: Catalog) -> None:
    """Raise DataError when an image to learn from is also a test image."""
    if pairs := overlap(learnt, tested):
        raise DataError(
            f"{len(pairs)} images to learn from are also test images",
            where="; ".join(pairs[:3]) + ("; ..." if len(pairs) > 3 else ""),
            do="leave them out of one side and pack it again; scores on images seen in pretraining mean nothing",
        )
