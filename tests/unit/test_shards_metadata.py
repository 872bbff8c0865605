"""The metadata of a source lie row by row beside its shards; what is not theirs is refused."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import test_shards_index
from hypothesis import given, settings
from test_shards_index import EDITS, ENDS, mutate

from shards import catalog as catalogs
from shards import index as indexes
from shards import metadata
from shards.catalog import Catalog, Sidecar, Source
from shards.errors import DataError
from shards.pack import Record, SourceSpec, pack

packed, catalog = test_shards_index.packed, test_shards_index.catalog


@settings(max_examples=150, deadline=None)
@given(edits=EDITS, end=ENDS)
def test_no_change_of_metadata_makes_reading_fail_in_another_way(
    packed: tuple[Source, Path], edits: list[tuple[float, int]], end: float
) -> None:
    source, tar = packed
    changed = tar.with_name("changed.parquet")
    changed.write_bytes(mutate((tar.parent / source.metadata.name).read_bytes(), edits, end))
    try:
        table = metadata.read(changed, source)
    except DataError:
        return
    assert len(table) == source.samples


def test_metadata_have_a_row_group_per_shard_in_the_order_of_its_samples(catalog: Catalog) -> None:
    source, root = catalog.sources[0], Path(catalog.root)
    table = metadata.read(root / source.metadata.name, source)
    keys = [key.decode() for s in source.shards for key in indexes.read(indexes.path_of(root / s.name))["key"].tolist()]
    assert table["key"].to_pylist() == keys
    assert set(table["class"].to_pylist()) == {"a", "b"}
    assert set(table["width"].to_pylist()) == {9}
    assert {len(x) for x in table["likeness"].to_pylist()} == {128}
    assert table["sensor"].null_count == len(table)
    only = metadata.read(root / source.metadata.name, source, ["sha256", "from"])
    assert only.column_names == ["sha256", "from"]
    assert len(set(only["from"].to_pylist())) == 24


def test_columns_of_the_schema_are_stored_and_others_stay_in_the_json(tmp_path: Path) -> None:
    pixels = np.ones((9, 9), np.uint8)
    meta = {"sensor": "Sentinel-1", "spacing": 10, "wind": 3}
    source = pack(tmp_path, [SourceSpec("s", records=[Record(pixels, "k", None, meta)])]).sources[0]
    table = metadata.read(tmp_path / source.metadata.name, source)
    assert table.select(["sensor", "spacing", "class"]).to_pylist() == [
        {"sensor": "Sentinel-1", "spacing": 10.0, "class": None}
    ]
    assert "wind" not in table.column_names
    wrong = [Record(pixels, "x", None, {"spacing": "fine"}), Record(pixels, "y", None, {"note": float("nan")})]
    with pytest.raises(DataError, match=r"x: its metadata cannot be stored: spacing is 'fine', not a number\n.*y: its"):
        pack(tmp_path, [SourceSpec("t", records=wrong)])


def test_metadata_that_are_not_those_of_the_shards_are_refused(catalog: Catalog, tmp_path: Path) -> None:
    source = catalog.sources[0]
    path = Path(catalog.root) / source.metadata.name
    fewer = replace(source, shards=source.shards[1:])
    with pytest.raises(DataError, match=r"the metadata are not those of the shards[\s\S]*restore"):
        metadata.read(path, fewer)
    with pytest.raises(DataError, match="the metadata have no column colour"):
        metadata.read(path, source, ["colour"])
    whole = path.read_bytes()
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="their sha256 is not the packed one"):
        metadata.read(cut, source)
    claimed = replace(source, metadata=Sidecar(cut.name, cut.stat().st_size, sha256(cut.read_bytes()).hexdigest()))
    with pytest.raises(DataError, match="the metadata cannot be read"):
        metadata.read(cut, claimed)
    assert catalogs.load(catalog.root).sources[0].metadata.bytes == len(whole)
