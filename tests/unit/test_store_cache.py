"""The cache of a node: what it promises whatever other processes and the disk do."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import test_store
from object_store import DATA, FORK, STEADY, ObjectServer, fetch_all, item, kept, until

from shards import store as module
from shards.cache import OURS, Cache
from shards.errors import DataError
from shards.remote import Retry
from shards.store import Store

no_proxy, server = test_store.no_proxy, test_store.server
cache, store = test_store.cache, test_store.store


def put(cache: Cache, name: str, size: int, idle: Callable[[object], None] = lambda sign: time.sleep(0.01)) -> Path:
    path = cache.path("root", name, "0" * 64)
    if not cache.hit(path, size):
        with cache.writing(path, size, idle) as file:
            if file:
                file.write(b"x" * size)
    return path


def noting(waited: threading.Event) -> Callable[[object], None]:
    def idle(sign: object) -> None:
        waited.set()
        time.sleep(0.01)

    return idle


# ---- processes that share a cache


def test_processes_that_want_the_same_files_download_each_once(server: ObjectServer, store: Store) -> None:
    assert store.read("5.tar") == DATA["5.tar"]  # the loop of the parent runs before it forks
    server.always, server.slow = "slow", 0.2
    results = FORK.Queue()
    names = ["0.tar", "1.tar"]
    processes = [FORK.Process(target=fetch_all, args=(store, names, results)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [results.get(timeout=120) for _ in processes] == [[True, True]] * 4
    for process in processes:
        process.join()
    assert [len(server.gets(name)) for name in names] == [1, 1]


def test_a_process_killed_in_the_middle_leaves_nothing_that_harms(server: ObjectServer, store: Store) -> None:
    server.faults.append("hang")
    server.slow = 30
    slow = Store(store.root, store.cache, Retry(patience=60, read=60))
    process = FORK.Process(target=fetch_all, args=(slow, ["0.tar"], FORK.Queue()))
    process.start()
    assert store.cache
    until(lambda: len(server.gets()) == 1 and list(store.cache.place.glob("*/*.part")))  # type: ignore[union-attr]
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert kept(store.cache) == {"0.tar.part"}
    assert store.fetch(*item("0.tar")).read_bytes() == DATA["0.tar"]
    assert kept(store.cache) == {"0.tar"}
    assert len(server.gets()) == 2


def test_a_waiter_takes_over_from_one_that_fails(cache: Cache) -> None:
    path, waited = cache.path("root", "a", "0" * 64), threading.Event()
    waiter = threading.Thread(target=put, args=(cache, "a", 10, noting(waited)))
    with suppress(ZeroDivisionError), cache.writing(path, 10, lambda sign: None):
        waiter.start()
        assert waited.wait(120)
        assert not path.exists()
        raise ZeroDivisionError
    waiter.join()
    assert path.read_bytes() == b"x" * 10
    assert kept(cache) == {"a"}


def test_waiting_for_a_process_that_does_nothing_ends(server: ObjectServer, cache: Cache) -> None:
    store = Store(f"{server.url}/c", cache, Retry(patience=0.3))
    name, size, sha256 = item("0.tar")
    with cache.writing(cache.path(store._key, name, sha256), size, lambda sign: None):  # noqa: SIM117
        with pytest.raises(DataError, match="another process of this node has been at it for"):
            store.fetch(name, size, sha256)
    assert server.gets() == []


# ---- the limit


def test_the_least_recently_used_files_go_first(cache: Cache) -> None:
    small = Cache(cache.folder, 35)
    for name in "abcadeaf":  # a is used again and again
        put(small, name, 10)
        time.sleep(0.01)  # file systems keep times in ticks of some milliseconds
    assert kept(small) == {"e", "a", "f"}
    assert put(small, "large", 30).stat().st_size == 30
    assert kept(small) == {"large"}


def test_a_reader_keeps_what_is_evicted(server: ObjectServer, store: Store) -> None:
    small = Store(store.root, Cache(Path(store.cache.folder), 150_000), STEADY)  # type: ignore[union-attr]
    with small.open(*item("0.tar")) as file:
        small.fetch(*item("1.tar"))
        assert kept(small.cache) == {"1.tar"}  # type: ignore[arg-type]
        assert file.read() == DATA["0.tar"]
    assert small.fetch(*item("0.tar")).read_bytes() == DATA["0.tar"]
    assert len(server.gets("0.tar")) == 2


def open_at_random(store: Store, seed: int, results: Any) -> None:
    names = [f"{number}.tar" for number in random.Random(seed).choices(range(len(DATA)), k=40)]
    results.put([store.open(*item(name)).read() == DATA[name] for name in names])


def test_processes_that_evict_each_others_files_all_read_the_right_bytes(server: ObjectServer, store: Store) -> None:
    small = Store(store.root, Cache(Path(store.cache.folder), 250_000), STEADY)  # type: ignore[union-attr]
    results = FORK.Queue()
    processes = [FORK.Process(target=open_at_random, args=(small, seed, results)) for seed in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=30) for _ in processes] == [[True] * 40] * 3
    for process in processes:
        process.join()
    assert len(kept(small.cache)) == 2  # type: ignore[arg-type]


def test_what_is_being_written_counts_and_is_never_evicted(cache: Cache) -> None:
    small, waited = Cache(cache.folder, 25), threading.Event()
    put(small, "old", 10)
    other = threading.Thread(target=put, args=(small, "b", 20, noting(waited)))
    with small.writing(small.path("root", "a", "0" * 64), 15, lambda sign: None) as file:
        assert file
        other.start()
        assert waited.wait(120)
        assert kept(small) == {"a.part", "b.part"}
        file.write(b"x" * 15)
    other.join()
    assert kept(small) == {"b"}


def test_what_is_not_the_caches_own_is_never_touched(cache: Cache) -> None:
    small = Cache(cache.folder, 25)
    put(small, "a", 10)
    own = next(small.place.glob("*/*-a")).parent
    foreign = [cache.folder / "results" / "best.pt", small.place / "notes" / "x", own / "y.txt", own / "z.part"]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 100)
        os.utime(path, (0, 0))
    for name in "bcd":
        put(small, name, 20)
    assert all(path.stat().st_size == 100 for path in foreign)
    assert [path.name[17:] for path in own.iterdir() if path not in foreign] == ["d"]


@pytest.mark.parametrize("sha256", ["../../../../x", "/etc", ""])
def test_no_hash_leads_out_of_the_cache(cache: Cache, sha256: str) -> None:
    path = cache.path("root", "a", sha256)
    assert path.resolve() == path
    assert path.match(f"{cache.place}/{OURS}")


def test_room_that_an_open_file_still_occupies_is_not_counted_as_free(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk(_: object) -> Any:
        paths = [path for path in cache.place.glob("*/*") if path.suffix != ".part"]
        in_use = sum(path.stat().st_size for path in paths) + 10 * (not held.exists())
        return type("Usage", (), {"free": 35 - in_use})

    held = put(cache, "a", 10)
    for name in "bc":
        time.sleep(0.01)
        put(cache, name, 10)
    with held.open("rb"):
        monkeypatch.setattr("shards.cache.shutil.disk_usage", disk)
        put(cache, "d", 10)
    assert kept(cache) == {"c", "d"}


def test_what_dead_writers_left_is_removed(cache: Cache) -> None:
    put(cache, "a", 10)
    left = next(cache.place.glob("*/*-a")).with_name("0123456789abcdef-b.part")
    left.write_bytes(b"x" * 10)
    put(Cache(cache.folder, 20), "c", 10)
    assert kept(cache) == {"a", "c"}


def test_a_limit_below_one_file_is_refused(server: ObjectServer, store: Store) -> None:
    with pytest.raises(DataError, match=r"100,000 bytes does not fit a cache of 99,999[\s\S]*raise the limit"):
        Store(store.root, Cache(store.cache.folder, 99_999), STEADY).fetch(*item("0.tar"))  # type: ignore[union-attr]
    assert server.gets() == []


def test_a_full_disk_is_explained_before_and_during_a_download(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    message = f"the disk of the cache is full: [\\s\\S]*where: {tmp_path}/cache[\\s\\S]*free space there"
    with pytest.raises(DataError, match=message):
        Store(store.root, Cache(tmp_path / "cache", 10**16), STEADY).fetch("0.tar", 10**15, "0" * 64)

    def full(file: object, data: bytes) -> None:
        raise module._Full(OSError(28, "No space left on device"))

    monkeypatch.setattr(module, "_write", full)
    with pytest.raises(DataError, match=message):
        store.fetch(*item("0.tar"))
    assert store.cache
    assert kept(store.cache) == set()


def test_a_cache_that_cannot_be_a_folder_is_explained(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"the cache cannot be written: [\s\S]*choose a folder"):
        Store(store.root, Cache(tmp_path / "file" / "cache", 10**6)).fetch(*item("0.tar"))
