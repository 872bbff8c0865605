"""A catalog in a bucket of a real S3 server, behind a proxy that injects what goes wrong between a job and its data."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from object_store import DATA, FORK, HASTY, STEADY, ObjectServer, item, point_to
from torch.utils.data import DataLoader, Dataset

from shards import store as module
from shards.cache import Cache
from shards.errors import DataError
from shards.remote import Retry
from shards.store import Store, filesystem

pytest.importorskip("moto.server", reason="moto[server] is not installed")
pytest.importorskip("s3fs", reason="s3fs is not installed")

SHUT = Retry(patience=0.2, first=0.01, longest=0.05, connect=1, read=0.5)


@pytest.fixture
def server(upstream: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    """The proxy; the environment points every client to it."""
    with ObjectServer(upstream=upstream, slow=2.5 * HASTY.read) as proxy:
        fs = point_to(proxy, monkeypatch)
        fs.pipe({f"bucket/c/{name}": data for name, data in DATA.items()})
        proxy.requests.clear()
        yield proxy


@pytest.fixture
def store(server: ObjectServer, tmp_path: Path) -> Store:
    return Store("s3://bucket/c", Cache(tmp_path / "cache", 10_000_000), STEADY)


def test_files_of_a_bucket_are_listed_read_and_fetched(server: ObjectServer, store: Store) -> None:
    fs, base = filesystem(store.root)
    fs.pipe(f"{base}/new.tar", b"new")
    assert sorted(fs.find(base)) == sorted(f"bucket/c/{name}" for name in [*DATA, "new.tar"])
    fs.rm(f"{base}/new.tar")
    assert sorted(fs.find(base)) == sorted(f"bucket/c/{name}" for name in DATA)
    server.requests.clear()
    for _ in range(2):
        for name, data in DATA.items():
            assert store.fetch(*item(name)).read_bytes() == data
    assert len(server.gets()) == len(DATA)
    assert store.read("0.tar") == store.open(*item("0.tar")).read() == DATA["0.tar"]


@pytest.mark.parametrize("fault", [500, 503, "truncate", "short", "hang", "slow", "other"])
def test_a_passing_fault_costs_one_more_request(server: ObjectServer, store: Store, fault: str | int) -> None:
    store.retry = HASTY if fault in ("hang", "slow") else STEADY
    server.faults.append(fault)
    assert store.fetch(*item("0.tar")).read_bytes() == DATA["0.tar"]
    assert len(server.gets("0.tar")) == 2
    server.faults.append(503)
    assert store.read("1.tar") == DATA["1.tar"]
    assert len(server.gets("1.tar")) == 2


def test_a_large_file_goes_on_where_it_was_interrupted(
    server: ObjectServer, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE", 20_000)
    monkeypatch.setattr(module, "TOGETHER", 2)
    server.faults.extend(["", "", "", "", 503, 503])
    assert store.fetch(*item("0.tar")).read_bytes() == DATA["0.tar"]
    asked = [request.range for request in server.gets()]
    assert set(asked[:4]) == {f"bytes={at}-{at + 19_999}" for at in (0, 20_000, 40_000, 60_000)}
    assert len(asked) >= 5 + 2  # a client of a busy machine may ask once more for what did not come
    assert not set(asked[4:]) & set(asked[:4])


def test_what_no_retry_can_cure_fails_at_once(server: ObjectServer, store: Store) -> None:
    for name, root, status, message in (
        ("none.tar", store.root, "", "there is no such file"),
        ("none.tar", "s3://no-such-bucket", "", "there is no such file"),
        ("0.tar", store.root, 403, "access denied"),
        ("0.tar", store.root, 400, "the request was refused"),
    ):
        server.requests.clear()
        server.faults.extend([status])
        with pytest.raises(DataError, match=f"{message}[\\s\\S]*where: {root}/{name}") as caught:
            Store(root, retry=STEADY).read(name)
        assert "hunter2" not in str(caught.value)
        assert len(server.gets()) == 1
    with pytest.raises(DataError, match=r"changed on the server: [\s\S]*load the catalog again"):
        store.fetch("0.tar", len(DATA["0.tar"]) + 1, "0" * 64)
    assert list(store.cache.place.glob("*/*")) == []  # type: ignore[union-attr]


def test_missing_credentials_are_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(DataError, match=r"no credentials [\s\S]*set those of the provider in the environment"):
        store.read("0.tar")


def test_a_server_that_goes_away_and_comes_back_only_costs_time(server: ObjectServer, store: Store) -> None:
    assert store.fetch(*item("0.tar")).read_bytes() == DATA["0.tar"]
    server.down()
    with pytest.raises(DataError, match=r"given up after \d+ tries [\s\S]*Could not connect"):
        Store(store.root, store.cache, SHUT).fetch(*item("1.tar"))
    assert store.fetch(*item("0.tar")).read_bytes() == DATA["0.tar"]  # the cache needs no server
    got: list[bytes] = []
    waiting = threading.Thread(target=lambda: got.append(store.fetch(*item("2.tar")).read_bytes()))
    waiting.start()
    time.sleep(0.3)
    assert waiting.is_alive()
    server.up()
    waiting.join()
    assert got == [DATA["2.tar"]]


def prefetch_and_fetch(store: Store, results: Any) -> None:
    store.prefetch(item(name) for name in DATA)
    results.put([store.fetch(*item(name)).read_bytes() == data for name, data in DATA.items()])


def test_forked_children_share_what_each_downloads(server: ObjectServer, store: Store) -> None:
    store.prefetch([item("0.tar")])
    assert store.read("0.tar") == DATA["0.tar"]  # session and event loop exist, and do not survive the fork
    store.fetch(*item("0.tar"))
    server.requests.clear()
    server.faults.extend([503, "truncate"])
    results = FORK.Queue()
    children = [FORK.Process(target=prefetch_and_fetch, args=(store, results)) for _ in range(3)]
    for child in children:
        child.start()
    assert [results.get(timeout=120) for _ in children] == [[True] * len(DATA)] * 3
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert len(server.gets("0.tar")) == 0
    assert len(server.gets()) == len(DATA) - 1 + 2
    assert store.read("1.tar") == DATA["1.tar"]


class Shards(Dataset[str]):
    def __init__(self, store: Store) -> None:
        self.store = store

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> str:
        name = f"{index % len(DATA)}.tar"
        self.store.prefetch([item(f"{(index + 1) % len(DATA)}.tar")])
        return f"{name} {hashlib.sha256(self.store.open(*item(name)).read()).hexdigest()}"


def test_workers_of_a_data_loader_fetch_through_one_cache(server: ObjectServer, store: Store) -> None:
    assert store.fetch(*item("5.tar")).exists()
    loader = DataLoader(Shards(store), batch_size=None, num_workers=2, multiprocessing_context=FORK, timeout=120)
    assert list(loader) == [f"{name} {item(name)[2]}" for name in [*DATA, *DATA]]
    assert [len(server.gets(name)) for name in DATA] == [1] * len(DATA)
