"""The metadata of a source: one Parquet file, row group i = shard i, rows in the order of the shard.

Weights, filters and audits read only this, never pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.catalog import Source
from shards.errors import DataError
from shards.schema import COLUMNS, sha256_of

if TYPE_CHECKING:
    import pyarrow as pa

# What packing knows of every sample; `class` may be missing, `likeness` is shards.likeness.descriptor.
FIXED = {"key": str, "class": str, "sha256": str, "from": str, "height": int, "width": int, "likeness": bytes}


def schema() -> pa.Schema:
    """The columns: FIXED and schema.COLUMNS, which may all be missing in a row."""
    import pyarrow as pa

    types = {str: pa.string(), int: pa.int32(), float: pa.float64(), bytes: pa.binary()}
    known = {**FIXED, **{name: kind for name, (kind, _) in COLUMNS.items()}}
    return pa.schema([(name, types[kind]) for name, kind in known.items()])


def column_values(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of COLUMNS that a sample knows, in their types; raises ValueError for one that has another type."""
    found: dict[str, Any] = {}
    for name, (kind, _) in COLUMNS.items():
        if (value := meta.get(name)) is None:
            continue
        if isinstance(value, bool) or not isinstance(value, str if kind is str else int | float):
            raise ValueError(f"{name} is {value!r}, not a {'text' if kind is str else 'number'}")
        found[name] = kind(value)
    return found


def write(path: Path, tables: Iterable[pa.Table]) -> None:
    """Write one row group per table, whole or not at all; equal tables give equal bytes."""
    import pyarrow.parquet as pq

    part = path.with_name(f".{path.name}.part")
    with pq.ParquetWriter(part, schema(), compression="zstd", write_page_checksum=True) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=max(len(table), 1))
    os.replace(part, path)


def groups(path: Path, source: Source, columns: Sequence[str]) -> Iterator[pa.Table]:
    """These columns of a source, shard by shard; raises DataError for a file that is damaged or not the packed one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    do = "restore the file or pack the source again"
    try:
        stat = path.stat()
        if _sha256(path, stat.st_size, stat.st_mtime_ns) != source.metadata.sha256:
            raise DataError("the metadata have changed: their sha256 is not the packed one", where=str(path), do=do)
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            if rows != [shard.samples for shard in source.shards]:
                raise DataError("the metadata are not those of the shards", where=str(path), do=do)
            if missing := [name for name in columns if name not in file.schema_arrow.names]:
                raise DataError(f"the metadata have no column {missing[0]}", where=str(path), do=do)
            for group in range(len(rows)):
                yield file.read_row_group(group, columns=list(columns))
    except (OSError, pa.ArrowException, ValueError) as error:
        raise DataError(f"the metadata cannot be read: {error}", where=str(path), do=do) from error


@lru_cache
def _sha256(path: Path, size: int, written: int) -> str:
    """Of a file as it is now; Parquet protects its pages, not which column they are."""
    return sha256_of(path)


def read(path: Path, source: Source, columns: Sequence[str] | None = None) -> pa.Table:
    """These columns (or all) of all samples of a source, in shard order; see `groups`."""
    import pyarrow as pa

    return pa.concat_tables(groups(path, source, schema().names if columns is None else columns))
