"""Copy a catalog with its shards to a folder or URL; the catalog comes last, so that a stop leaves no half one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shards import catalog as catalogs
from shards import index as indexes
from shards.catalog import Catalog
from shards.errors import DataError
from shards.store import filesystem, redact

Progress = Callable[[str, int], None]


def copy(catalog: Catalog, target: str, progress: Progress | None = None) -> int:
    """Copy every file of `catalog` below `target`; returns how many were not there yet.

    A file that is there with the right size is kept: names end in their hash. A catalog that is already there must
    hold no other sources. `progress(name, bytes)` is called after each file. Raises DataError.
    """
    fs, base = filesystem(target)
    kept = _refuse_strangers(fs, base, catalog, target)
    sent = 0
    try:
        fs.makedirs(base, exist_ok=True)
        for source, name, size, sha256 in _files(catalog):
            path = f"{base}/{name}"
            if not (fs.exists(path) and fs.info(path)["size"] == size):
                local = catalog.store(source).fetch(name, size, sha256)
                fs.put_file(str(local), path)
                sent += 1
            if progress:
                progress(name, size)
        if not kept:
            fs.pipe_file(f"{base}/{catalogs.FILE_NAME}", catalogs.text(catalog).encode())
    except OSError as error:
        what = f"copying stopped after {sent} files: {redact(str(error))}"
        raise DataError(what, where=redact(target), do="run the command again; it goes on") from error
    return sent


def _files(catalog: Catalog) -> Iterator[tuple[Any, str, int, str]]:
    """Source, name, bytes and sha256 of every file but the catalog."""
    for source in catalog.sources:
        yield source, *asdict(source.metadata).values()
        for shard in source.shards:
            yield source, indexes.path_of(Path(shard.name)).name, shard.index_bytes, shard.index_sha256
            yield source, shard.name, shard.bytes, shard.sha256


def _refuse_strangers(fs: Any, base: str, catalog: Catalog, target: str) -> bool:
    """Raise DataError when a catalog there holds sources that would be lost; whether it is this catalog already."""
    if not fs.exists(f"{base}/{catalogs.FILE_NAME}"):
        return False
    there = catalogs.load(target, cache=catalog.cache)
    if lost := sorted({s.name for s in there.sources} - {s.name for s in catalog.sources}):
        raise DataError(
            f"a catalog there holds other sources: {', '.join(lost)}",
            where=redact(target),
            do="choose another target; several catalogs can be read as one",
        )
    return there.fingerprint == catalog.fingerprint
