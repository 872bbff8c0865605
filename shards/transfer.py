"""Copy a catalog with its shards to a folder or URL; the catalog comes last, so that a stop leaves no half one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from shards import catalog as catalogs
from shards import index as indexes
from shards.catalog import Catalog, Source
from shards.errors import DataError
from shards.remote import explained
from shards.schema import sha256_of
from shards.store import Entry, Store, filesystem

Progress = Callable[[str, int], None]


def copy(catalog: Catalog, target: str, progress: Progress | None = None, *, again: bool = False) -> int:
    """Copy every file of `catalog` below `target`; returns how many were written.

    Nothing is sent whose sha256 is not the catalog's. A file that is there with the right size is kept, since names end
    in their hash, unless `again`. A catalog that is already there must hold no other sources. A bucket must exist.
    `progress(name, bytes)` is called after each file. Raises DataError.
    """
    if target.startswith("http"):
        raise DataError("http:// is only read", where=target, do="copy to a folder, s3:// or gs://")
    catalog.check()
    fs, base = filesystem(target)
    sent = 0
    try:
        same = fs.exists(f"{base}/{catalogs.FILE_NAME}") and _refuse_strangers(catalog, target)
        if "://" not in target.removeprefix("file://"):
            fs.makedirs(base, exist_ok=True)
        for source, file in _files(catalog):
            path = f"{base}/{file.name}"
            if again or not (fs.exists(path) and fs.info(path)["size"] == file.size):
                fs.put_file(str(_checked(catalog.store(source), file)), path)
                sent += 1
            if progress:
                progress(file.name, file.size)
        if again or not same:
            fs.pipe_file(f"{base}/{catalogs.FILE_NAME}", catalogs.text(catalog).encode())
    except DataError:
        raise
    except Exception as error:  # of fsspec's libraries, which are not all OSError
        do = "make the folder or bucket, see whether it can be reached, and run the command again; it goes on"
        raise explained(error, f"copying stopped after {sent} files", target, do) from None
    return sent


def _checked(store: Store, file: Entry) -> Path:
    """The local file with these bytes; of a URL once more from there when the cached copy is damaged."""
    for again in (False, True) if store.remote else (False,):
        path = store.fetch(*file, again=again)
        if not path.is_file():
            raise DataError(f"{file.name} is missing", where=str(path), do="restore it, or pack the source again")
        if sha256_of(path) == file.sha256:
            return path
    raise DataError(
        f"{file.name} is damaged: its sha256 is not the catalog's",
        where=str(path),
        do="restore it, or pack the source again; foundation shards verify names all damaged files",
    )


def _files(catalog: Catalog) -> Iterator[tuple[Source, Entry]]:
    """Every file but the catalog, with its source."""
    for source in catalog.sources:
        yield source, Entry(*asdict(source.metadata).values())
        for shard in source.shards:
            yield source, Entry(indexes.path_of(Path(shard.name)).name, shard.index_bytes, shard.index_sha256)
            yield source, Entry(shard.name, shard.bytes, shard.sha256)


def _refuse_strangers(catalog: Catalog, target: str) -> bool:
    """Raise DataError when the catalog there holds sources that would be lost; whether it is this catalog already."""
    there = catalogs.load(target, cache=catalog.cache)
    if lost := sorted({s.name for s in there.sources} - {s.name for s in catalog.sources}):
        raise DataError(
            f"a catalog there holds other sources: {', '.join(lost)}",
            where=target,
            do="choose another target; several catalogs can be read as one",
        )
    return there.fingerprint == catalog.fingerprint
