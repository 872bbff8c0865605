"""The stream gives the same global batches for any number of processes and workers, and a restart is a seek."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from object_store import ObjectServer, until

from shards import index as indexes
from shards import reader as reading
from shards import store as stores
from shards.cache import Cache
from shards.catalog import load
from shards.errors import DataError
from shards.pack import Record, SourceSpec, pack
from shards.reader import CorruptSample
from shards.stream import Batch, Reader, Stream, in_order

COMMON = {"seed": 3, "lanes": 4, "block_shards": 2, "global_batch": 16}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    rng = np.random.default_rng(0)

    def chips(count: int, dtype: str) -> list[Record]:
        return [
            Record(rng.integers(1, 250, (5 + i % 4, 6 + i % 3)).astype(dtype), str(i), f"c{i % 3}")
            for i in range(count)
        ]

    sources = [
        SourceSpec("bytes", records=chips(41, "uint8")),
        SourceSpec("floats", records=chips(17, "float32")),
        SourceSpec("words", records=chips(30, "uint16")),
    ]
    return pack(tmp_path_factory.mktemp("data"), sources, shard_bytes=4000)


def global_batches(catalog, world_size: int, workers: int = 0, micro_batch: int = 4, start: int = 0, stop: int = 160):
    """position → (sample id, label, dtype, pixels) over all ranks, and the positions of each rank in their order."""
    seen, ranks = {}, []
    for rank in range(world_size):
        place = {"rank": rank, "world_size": world_size, "workers": workers, "start": start, "stop": stop}
        ranks.append([])
        for batch in Stream(catalog, **COMMON, micro_batch=micro_batch, **place):
            assert len(batch) == micro_batch
            ranks[-1] += batch.position.tolist()
            for i, position in enumerate(batch.position.tolist()):
                pixels = batch.pixels[i]
                facts = (int(batch.sample_id[i]), int(batch.label[i]), pixels.dtype, float(batch.scale[i]))
                seen[position] = (*facts, tuple(pixels.shape), pixels.numpy().tobytes())
    return seen, ranks


def test_global_batches_do_not_depend_on_the_number_of_processes_or_workers(catalog):
    expected, _ = global_batches(catalog, 1)
    assert sorted(expected) == list(range(160))
    for world_size, workers, micro_batch in ((2, 0, 8), (4, 0, 4), (1, 1, 16), (1, 2, 4), (2, 2, 2)):
        assert global_batches(catalog, world_size, workers, micro_batch)[0] == expected


def test_a_rank_never_touches_the_lanes_of_another_rank_and_positions_rise(catalog):
    _, ranks = global_batches(catalog, 4)
    for rank, positions in enumerate(ranks):
        assert {p % 4 for p in positions} == {rank}
        assert positions == sorted(positions)


def test_the_batch_holds_what_the_reader_holds(catalog):
    reader = Reader(catalog)
    for batch in Stream(catalog, **COMMON, micro_batch=8, stop=64):
        for pixels, label, scale, i in zip(batch.pixels, batch.label, batch.scale, batch.sample_id, strict=True):
            sample = reader[int(i)]
            assert pixels.numpy().dtype == sample.pixels.dtype
            assert (pixels.numpy() == sample.pixels).all()
            assert (int(label), float(scale)) == (sample.label, sample.scale)


def test_after_two_passes_every_sample_has_been_seen_about_twice(catalog):
    seen, _ = global_batches(catalog, 1, stop=176)
    counts = Counter(facts[0] for facts in seen.values())
    assert sorted(counts) == list(range(88))
    assert max(counts.values()) <= 3  # lanes do not reach the end of a pass at the same moment


def test_weights_decide_what_is_read_and_0_leaves_a_source_out(catalog):
    stream = Stream(catalog, **COMMON, micro_batch=16, weights={"bytes": 3, "floats": 0, "words": 1}, stop=1600)
    ids = torch.cat([batch.sample_id for batch in stream])
    assert abs(int((ids < 41).sum()) - 1200) <= 16
    assert not ((ids >= 41) & (ids < 58)).any()
    with pytest.raises(DataError, match=r"did you mean words"):
        Stream(catalog, **COMMON, micro_batch=16, weights={"bytes": 1, "floats": 1, "wordz": 1})


@pytest.fixture
def corrupt(catalog, tmp_path):
    """A copy of the catalog in which one byte of one sample is flipped, and the id of that sample."""
    copy = Path(shutil.copytree(catalog.root, tmp_path / "copy"))
    shard = catalog.sources[0].shards[0]
    flip(copy / shard.name, 3)
    return load(copy), 3


def flip(tar: Path, row: int) -> None:
    """Damage the pixels of one sample of a shard."""
    offset = int(indexes.read(indexes.path_of(tar))[row]["offset"])
    with open(tar, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 255]))


def test_a_corrupt_sample_has_a_name_and_its_neighbours_can_be_read(corrupt):
    damaged, number = corrupt
    reader = Reader(damaged)
    message = r"^sample bytes-\d+ is not what was packed[\s\S]*bytes-00000-.*tar[\s\S]*restore"
    with pytest.raises(CorruptSample, match=message):
        _ = reader[number]
    assert reader[number + 1].source == "bytes"


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 1)])
def test_a_corrupt_sample_is_replaced_from_its_block_and_listed_and_nothing_else_moves(
    catalog, corrupt, world_size, workers
):
    damaged, number = corrupt
    expected, _ = global_batches(catalog, 1)
    seen, listed = {}, []
    for rank in range(world_size):
        place = {"rank": rank, "world_size": world_size, "workers": workers, "stop": 160}
        for batch in Stream(damaged, **COMMON, micro_batch=4, **place):
            seen |= dict(zip(batch.position.tolist(), batch.sample_id.tolist(), strict=True))
            listed += batch.replaced
    wanted = {p: facts[0] for p, facts in expected.items()}
    moved = {p for p in wanted if wanted[p] != seen[p]}
    assert moved == {p for p in wanted if wanted[p] == number} == {r.position for r in listed}
    order = Stream(damaged, **COMMON, micro_batch=4).order
    for r in listed:
        assert (r.corrupt, r.used) == (number, seen[r.position])
        assert r.used == order.neighbours(r.position).tolist()[0]
        assert "its checksum differs" in r.reason


def test_a_block_without_a_single_readable_sample_is_an_error(catalog, tmp_path):
    copy = Path(shutil.copytree(catalog.root, tmp_path / "copy"))
    for source in catalog.sources:
        for shard in source.shards:
            for row in range(shard.samples):
                flip(copy / shard.name, row)
    with pytest.raises(DataError, match=r"no sample of a whole block can be read[\s\S]*restore the shards"):
        next(iter(Stream(load(copy), **COMMON, micro_batch=4)))


def test_complex_pixels_arrive_as_amplitudes_and_stay_complex_in_the_shard(tmp_path):
    rng = np.random.default_rng(0)
    single = rng.normal(size=(6, 7)).astype(np.float32) + 1j * rng.normal(size=(6, 7)).astype(np.float32)
    pairs = rng.integers(-300, 300, (2, 6, 7, 2)).astype(np.int16)
    specs = [
        SourceSpec("complex", records=[Record(single, "a")]),
        SourceSpec("pairs", records=[Record(pairs, "b")]),
    ]
    reader = Reader(pack(tmp_path, specs))
    assert (reader.native(0) == single).all()
    assert (reader.native(1) == pairs).all()
    np.testing.assert_allclose(reader[0].pixels[0], np.abs(single), rtol=1e-6)
    np.testing.assert_allclose(reader[1].pixels, np.hypot(pairs[..., 0], pairs[..., 1]), rtol=1e-6)
    assert reader[1].pixels.shape == (2, 6, 7)
    assert {reader[i].pixels.dtype.name for i in (0, 1)} == {"float32"}


def test_a_shard_that_is_deleted_while_it_is_open_stays_readable(catalog, tmp_path):
    copy = Path(shutil.copytree(catalog.root, tmp_path / "copy"))
    reader = Reader(load(copy))
    _ = reader[0]
    for file in copy.iterdir():
        file.unlink()
    assert (reader[1].pixels == Reader(catalog)[1].pixels).all()


def test_a_restart_in_the_middle_goes_on_as_if_nothing_had_happened(catalog):
    expected, _ = global_batches(catalog, 1)
    for start in (16, 96, 144):
        rest, _ = global_batches(catalog, 2, start=start)
        assert rest == {p: v for p, v in expected.items() if p >= start}


@pytest.mark.parametrize("workers", [0, 2])
def test_without_a_stop_the_stream_goes_on_and_can_start_anywhere(catalog, workers):
    far = 16 * 10**9
    batches = list(islice(Stream(catalog, **COMMON, micro_batch=8, workers=workers, start=far), 20))
    assert batches[-1].position.tolist() == list(range(far + 152, far + 160))


def test_reading_does_not_draw_from_the_global_generator(catalog):
    state = torch.get_rng_state()
    list(Stream(catalog, **COMMON, micro_batch=16, workers=1, stop=16))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_tasks_are_answered_in_their_order_and_an_error_comes_where_its_task_stood(workers):
    def square(n: int) -> int:
        time.sleep(0.01 * (n % 3 == 0))  # later tasks are done first
        if n == 20:
            raise DataError("the twentieth")
        return n * n

    answers = in_order(square, iter(range(100)), workers)
    assert list(islice(answers, 20)) == [n * n for n in range(20)]
    with pytest.raises(DataError, match="the twentieth"):
        next(answers)


def test_readers_stop_when_nobody_listens_any_more_and_read_only_a_little_ahead():
    asked: list[int] = []
    answers = in_order(asked.append, iter(range(10**9)), 2)
    for _ in range(10):
        next(answers)
    time.sleep(0.05)
    assert len(asked) <= 14
    answers.close()
    deadline = time.monotonic() + 5
    while any(thread.name == "reader" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_after_the_last_answer_no_reader_is_left():
    assert list(in_order(str, iter(range(20)), 3)) == [str(n) for n in range(20)]
    assert not any(thread.name == "reader" for thread in threading.enumerate())


def test_readers_make_no_tensors_so_that_the_end_of_the_process_never_meets_one_inside_of_torch(catalog, monkeypatch):
    seen: list[bool] = []
    monkeypatch.setattr(Batch, "of", lambda *_: seen.append(threading.current_thread() is threading.main_thread()))
    monkeypatch.setattr("shards.stream.replace", lambda *_, **__: None)
    assert len(list(Stream(catalog, **COMMON, micro_batch=16, workers=2, stop=64))) == len(seen) > 1
    assert all(seen)


def test_a_reader_that_waits_for_ever_does_not_keep_the_process_from_ending():
    code = """
import threading
from shards.stream import in_order
answers = in_order(lambda n: threading.Event().wait() if n else n, iter(range(9)), 2)
print(next(answers))
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


def test_a_batch_moves_whole_and_keeps_dtypes_and_shapes(catalog):
    batch = next(iter(Stream(catalog, **COMMON, micro_batch=16)))
    assert len({p.dtype for p in batch.pixels}) > 1
    moved = batch.to("cpu")
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(batch.pixels, moved.pixels, strict=True))
    assert {p.device.type for p in batch.to("meta").pixels} == {"meta"}


def test_a_reader_survives_pickling_and_knows_its_bounds(catalog):
    reader = Reader(catalog)
    first = reader[0]
    again = pickle.loads(pickle.dumps(reader))
    assert (again[0].pixels == first.pixels).all()
    assert (again[0].key, again[0].source, len(again)) == (first.key, "bytes", 88)
    with pytest.raises(IndexError, match="sample 88 of 88"):
        _ = reader[88]


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_found_while_reading_names_the_file_also_from_a_worker(catalog, tmp_path, workers):
    copy = shutil.copytree(catalog.root, tmp_path / "copy")
    stream = Stream(load(copy), **COMMON, micro_batch=16, workers=workers, stop=160)
    for tar in copy.glob("*.tar"):
        os.truncate(indexes.path_of(tar), 50)
    with pytest.raises(DataError, match=r"^the index cannot be read[^\n]*\n  where: .*idx\n  do:    rebuild it"):
        list(stream)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": 8}, r"start = 8 samples is not a whole number of global batches of 16[\s\S]*use 0 or 16"),
        ({"stop": 100}, r"stop = 100 samples is not a whole number[\s\S]*use 96 or 112"),
        ({"micro_batch": 5}, r"micro batch 5 does not divide the 16 samples[\s\S]*micro batch of 4"),
        ({"world_size": 3}, "4 lanes cannot be shared evenly by 3 processes"),
        ({"global_batch": 18}, "global batch 18 is not a multiple of 4 lanes"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_before_reading(catalog, change, message):
    with pytest.raises(DataError, match=message):
        Stream(catalog, **(COMMON | {"micro_batch": 4} | change))


# ---- shards behind a URL, and many of them


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
