"""The stream gives the same global batches for any number of processes and workers, and a restart is a seek."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from shards import index as indexes
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
            raise DataError("the twentieth", do="nothing")
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
