"""Many shards, also behind a URL: what stays open, what is fetched ahead, and what is fetched again."""

from __future__ import annotations

import os
import resource
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_shards_stream
from object_store import ObjectServer, until
from test_shards_stream import COMMON

from shards import index as indexes
from shards import reader as reading
from shards import store as stores
from shards.cache import Cache
from shards.catalog import load
from shards.errors import DataError
from shards.pack import Record, SourceSpec, pack
from shards.reader import CorruptSample
from shards.stream import Reader, Stream

catalog = test_shards_stream.catalog


@pytest.fixture
def server(catalog, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(reading, "_renewed", set())
    with ObjectServer({f"/c/{path.name}": path.read_bytes() for path in Path(catalog.root).iterdir()}) as running:
        yield running


@pytest.fixture
def remote(server, tmp_path):
    return load(f"{server.url}/c", cache=Cache(tmp_path / "cache", 10**9))


def cached(catalog, name: str) -> Path:
    return next(catalog.cache.place.glob(f"*/*-{name}"))


def firsts(catalog) -> list[int]:
    """The first sample of each shard."""
    return np.cumsum([0, *(n for source in catalog.sources for n in source.kept)])[:-1].tolist()


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_damaged_copy_in_the_cache_is_fetched_again_but_only_once(catalog, server, remote, caplog):
    tar, expected = remote.sources[0].shards[0].name, Reader(catalog)[1].pixels
    reader, other = Reader(remote), Reader(remote)
    _ = reader[0], other[0]
    offset = int(indexes.read(cached(remote, tar.replace(".tar", ".idx")))[1]["offset"])
    damage(cached(remote, tar), offset)
    assert (reader[1].pixels == expected).all()
    assert [record.message for record in caplog.records] == [
        f"damaged in the cache, fetched again: {server.url}/c/{tar}"
    ]
    assert len(server.gets(tar)) == 2
    reading._renewed.clear()  # as in another process, which had the damaged file open
    assert (other[1].pixels == expected).all()
    assert len(server.gets(tar)) == 2
    damage(cached(remote, tar), offset)
    with pytest.raises(CorruptSample, match=f"its checksum differs\n  where: {server.url}/c/{tar}"):
        _ = reader[1]
    assert len(server.gets(tar)) == 2


def test_threads_that_meet_one_damaged_shard_all_read_the_right_pixels(catalog, server, remote):
    tar, expected, reader = remote.sources[0].shards[0].name, Reader(catalog), Reader(remote)
    opened = reader._shard(0)
    offset = int(opened.index.row(1)["offset"])
    damage(cached(remote, tar), offset)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(reader.__getitem__, [1] * 50))
    assert all((sample.pixels == expected[1].pixels).all() for sample in found)
    assert len(server.gets(tar)) == 2


@pytest.mark.parametrize("at", [0, -1])
def test_a_damaged_index_in_the_cache_is_fetched_again_but_only_once(catalog, server, remote, at):
    name = remote.sources[0].shards[0].name.replace(".tar", ".idx")
    _ = Reader(remote)[0]
    damage(cached(remote, name), at)
    assert (Reader(remote)[0].pixels == Reader(catalog)[0].pixels).all()
    assert len(server.gets(name)) == 2
    damage(cached(remote, name), at)
    with pytest.raises(DataError, match=f"the index [\\s\\S]*where: {server.url}/c/{name}[\\s\\S]*load the catalog"):
        _ = Reader(remote)[0]
    assert len(server.gets(name)) == 2


def test_a_cache_with_room_for_a_single_shard_is_enough(catalog, remote):
    largest = max(shard.bytes for source in remote.sources for shard in source.shards)
    small = Reader(replace(remote, cache=Cache(remote.cache.folder, largest)))
    for i in firsts(catalog):
        assert (small[i].pixels == Reader(catalog)[i].pixels).all()


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Two sources of many small shards."""
    chips = [Record(np.full((8, 8), i + 1, np.uint8), str(i)) for i in range(160)]
    specs = [SourceSpec(name, records=chips) for name in ("a", "b")]
    return pack(tmp_path_factory.mktemp("many"), specs, shard_bytes=2000)


def test_every_shard_of_the_next_blocks_arrives_in_the_background(many, server, tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "PREFETCH_DEPTH", 3)
    server.files |= {f"/many/{path.name}": path.read_bytes() for path in Path(many.root).iterdir()}
    remote = load(f"{server.url}/many", cache=Cache(tmp_path / "cache", 10**9)).only(["a"])
    stream = Stream(remote, seed=3, lanes=1, block_shards=4, global_batch=1, micro_batch=1)
    ahead, used = (set(found([0])) for found in (stream.order.shards_ahead, stream.order.shards_at))
    waiting = {file.name for part in ahead - used for file in stream.reader._files(part)}
    assert len(waiting) > 2 * stores.PREFETCH_DEPTH
    for batch in stream:
        assert set(stream.order.shards_at(batch.position)) <= used, "the block ended before the next one was there"
        until(lambda: stream.reader._stores[remote.root]._prefetcher.threads == 0)
        if waiting <= {path.name[17:] for path in remote.cache.place.glob("*/*")}:
            break
    assert max(Counter(request.path for request in server.gets("tar")).values()) == 1


def test_as_many_shards_stay_open_as_a_run_reads_at_a_time(many, monkeypatch):
    monkeypatch.setattr(reading, "KEEP_OPEN", 1)
    opened: list[str] = []
    real = stores.Store.open
    monkeypatch.setattr(stores.Store, "open", lambda self, *item: opened.append(item[0]) or real(self, *item))
    place = {"seed": 3, "lanes": 4, "world_size": 2, "block_shards": 2, "global_batch": 4, "micro_batch": 2}
    starts, count = firsts(many), len(many.sources[0].shards)
    for weights, working in (
        (None, [*starts[:4], *starts[count : count + 4]]),  # 2 sources, 2 lanes a rank, 2 shards a lane
        ({"a": 1, "b": 0}, starts[:4]),
    ):
        opened.clear()
        reader = Stream(many, **place, weights=weights).reader
        for i in [*working, *working]:
            _ = reader[i]
        assert len(opened) == len(set(opened)) == len(working)


def test_an_index_is_compared_with_its_shard_once_as_long_as_it_is_the_same_file(catalog, tmp_path, monkeypatch):
    copy = load(shutil.copytree(catalog.root, tmp_path / "copy"))
    compared: list[Path] = []
    real = indexes.compare
    monkeypatch.setattr(reading, "KEEP_OPEN", 1)
    monkeypatch.setattr(indexes, "compare", lambda file, *rest: compared.append(file.path) or real(file, *rest))
    reader, (a, b, *_) = Reader(copy), firsts(catalog)
    for i in (a, b, a, b):
        _ = reader[i]
    assert len(compared) == len(set(compared)) == 2
    rows = indexes.read(compared[0]).copy()
    rows["label"] = rows["label"][::-1]
    rows["offset"] = 0
    indexes.write(rows, compared[0].with_suffix(".tar"))
    with pytest.raises(DataError, match="the index disagrees with its shard"):
        _ = reader[a]


def test_the_limit_of_open_files_is_raised_only_when_needed_and_as_far_as_allowed():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (600, hard))
        assert reading._descriptors(500) == 500
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 600
        assert reading._descriptors(700) == resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 700
        if hard != resource.RLIM_INFINITY:
            assert reading._descriptors(hard + 1) == resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_cache_that_is_too_small_for_a_run_is_named_before_it_starts(catalog, remote):
    def advice(of, limit: int, readers: int = 1) -> str:
        of = replace(of, cache=Cache(remote.cache.folder, limit))
        return Stream(of, **COMMON, micro_batch=4, world_size=4).reader.advice(readers)

    sizes = [sorted((shard.bytes for shard in s.shards), reverse=True) for s in remote.sources]
    now, ahead = (sum(sum(each[:count]) for each in sizes) for count in (2, 4))
    assert advice(remote, ahead) == advice(catalog, 1) == ""
    assert "they will often not be fetched ahead" in advice(remote, ahead - 1)
    assert "they will be fetched again and again" in advice(remote, now - 1)
    assert "they will be fetched again and again" in advice(remote, ahead - 1, readers=2)


def test_shards_in_use_count_as_recent_and_deleted_ones_are_closed_when_not_in_use(catalog, remote, monkeypatch):
    monkeypatch.setattr(reading, "_SWEEP", -1.0)
    reader, starts = Reader(remote), firsts(remote)
    for i in starts[:3]:
        _ = reader[i]
    names = [shard.name for shard in remote.sources[0].shards]
    os.utime(cached(remote, names[0]), (0, 0))
    for name in names[1:3]:
        cached(remote, name).unlink()
    reader.prefetch([0, 1])
    assert cached(remote, names[0]).stat().st_mtime > 0
    assert list(reader._open) == [0, 1]
    local = Reader(catalog)
    _ = local[0]
    before = (Path(catalog.root) / names[0]).stat().st_mtime_ns
    local.prefetch([0])
    assert (Path(catalog.root) / names[0]).stat().st_mtime_ns == before


def test_indexes_behind_a_url_are_not_rebuilt(catalog):
    sources = tuple(replace(source, root="https://me:hunter2@host/c") for source in catalog.sources)
    message = r"only rebuilt in a folder[\s\S]*where: https://\*\*\*@host/c\n[\s\S]*copy it to a folder"
    with pytest.raises(DataError, match=message):
        indexes.rebuild(replace(catalog, sources=sources))
