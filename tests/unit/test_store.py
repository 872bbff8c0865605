"""The store: where files are, what bad servers cost, and what happens in the background."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from object_store import DATA, FORK, HASTY, STEADY, ObjectServer, fetch_all, item, kept, until
from processes import ROOT

from shards import store as module
from shards.cache import Cache
from shards.errors import DataError
from shards.redaction import redact
from shards.remote import Retry
from shards.store import Store, filesystem


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[ObjectServer]:
    with ObjectServer({f"/c/{name}": data for name, data in DATA.items()}) as running:
        yield running


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 10_000_000)


@pytest.fixture
def store(server: ObjectServer, cache: Cache) -> Store:
    return Store(f"{server.url}/c", cache, STEADY)


# ---- where files are


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_local_catalog_is_used_in_place(tmp_path: Path, cache: Cache, prefix: str) -> None:
    (tmp_path / "a.tar").write_bytes(b"abc")
    local = Store(f"{prefix}{tmp_path}", cache)
    local.prefetch([("a.tar", 3, "")])
    assert (local.remote, local.root) == (False, str(tmp_path))
    assert local.fetch("a.tar", 3, "") == tmp_path / "a.tar"
    assert local.open("a.tar", 3, "").read() == local.read("a.tar") == b"abc"
    assert not cache.folder.exists()
    with pytest.raises(DataError, match="there is no such file"):
        local.read("b.tar")
    with pytest.raises(DataError, match="no such file"):
        local.open("b.tar", 3, "")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", ""])
@pytest.mark.parametrize("root", ["/data", "memory://data"])
def test_no_name_leads_out_of_a_catalog(tmp_path: Path, root: str, name: str) -> None:
    store = Store(root, Cache(tmp_path, 100))
    for call in (lambda: store.fetch(name, 1, "0" * 64), lambda: store.read(name)):
        with pytest.raises(DataError, match="is no path inside a catalog"):
            call()


@given(data=st.binary(max_size=400), piece=st.integers(1, 50), together=st.integers(1, 5))
def test_any_bytes_arrive_in_parts_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, piece: int, together: int
) -> None:
    fs, base = filesystem("memory://bucket/c")
    fs.pipe_file(f"{base}/a.tar", data)
    store = Store("memory://bucket/c", Cache(tmp_path_factory.mktemp("cache"), 1000), STEADY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", piece)
        patch.setattr(module, "TOGETHER", together)
        assert store.fetch(*item("a.tar", data)).read_bytes() == data
    assert store.read("a.tar") == data


def test_equal_names_of_two_catalogs_and_two_versions_do_not_meet(server: ObjectServer, cache: Cache) -> None:
    server.files |= {"/a/0.tar": b"of a", "/b/0.tar": b"of b"}
    for _ in range(2):
        for root in "ab":
            data = f"of {root}".encode()
            assert Store(f"{server.url}/{root}", cache, STEADY).fetch(*item("0.tar", data)).read_bytes() == data
    server.files["/a/0.tar"] = b"repacked"
    assert Store(f"{server.url}/a", cache, STEADY).fetch(*item("0.tar", b"repacked")).read_bytes() == b"repacked"
    assert len(server.gets()) == 3


def test_a_query_goes_to_the_server_and_does_not_part_the_cache(server: ObjectServer, cache: Cache) -> None:
    for token in ("one", "two"):
        store = Store(f"{server.url}/c/?token={token}", cache, STEADY)
        assert store.fetch(*item("0.tar")).read_bytes() == DATA["0.tar"]
    assert len(server.gets("/c/0.tar")) == 1


def test_an_unknown_kind_of_url_and_a_missing_package_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"ftp:// is not read here\n  where: ftp://\*\*\*@host/x"):
        filesystem("ftp://me:secret@host/x")
    from fsspec.registry import _registry

    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    monkeypatch.setattr(module, "_filesystems", {})
    with pytest.raises(DataError, match=r"s3:// needs a package[\s\S]*pip install s3fs"):
        Store("s3://bucket/c").read("catalog.json")


def test_a_remote_catalog_without_a_cache_is_refused() -> None:
    with pytest.raises(DataError, match="a remote catalog needs a cache"):
        Store("memory://bucket").fetch("a.tar", 1, "")


def test_a_file_is_fetched_again_on_demand_and_only_a_good_one_replaces_it(server: ObjectServer, store: Store) -> None:
    path = store.fetch(*item("0.tar"))
    path.write_bytes(bytes(len(DATA["0.tar"])))
    assert store.fetch(*item("0.tar")).read_bytes() != DATA["0.tar"]
    assert store.fetch(*item("0.tar"), again=True).read_bytes() == DATA["0.tar"]
    assert len(server.gets("0.tar")) == 2
    server.always = "other"
    with pytest.raises(DataError, match="changed on the server"):
        store.fetch(*item("0.tar"), again=True)
    assert path.read_bytes() == DATA["0.tar"]


def test_a_file_that_others_take_away_again_and_again_is_given_up(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "fetch", lambda *_: tmp_path / "gone")
    with pytest.raises(DataError, match=r"8 times before it could be opened[\s\S]*0.tar[\s\S]*more room"):
        store.open(*item("0.tar"))


# ---- bad servers


@pytest.mark.parametrize("fault", [500, 503, 429, "truncate", "short", "hang", "slow", "other"])
def test_a_passing_fault_costs_one_more_request(server: ObjectServer, store: Store, fault: str | int) -> None:
    server.slow = 2.5 * HASTY.read
    store.retry = HASTY if fault in ("hang", "slow") else STEADY
    server.faults.append(fault)
    assert store.fetch(*item("0.tar")).read_bytes() == DATA["0.tar"]
    assert len(server.gets("0.tar")) == 2
    assert store.fetch(*item("0.tar")).read_bytes() == DATA["0.tar"]
    assert len(server.gets("0.tar")) == 2


@pytest.mark.parametrize(
    ("status", "message"),
    [(404, "there is no such file"), (403, "access denied"), (401, "access denied"), (400, "the request was refused")],
)
def test_what_no_retry_can_cure_fails_at_once(server: ObjectServer, store: Store, status: int, message: str) -> None:
    for call in (lambda: store.fetch(*item("0.tar")), lambda: store.read("0.tar")):
        server.requests.clear()
        server.faults.append(status)
        with pytest.raises(DataError, match=f"{message}[\\s\\S]*where: {server.url}/c/0.tar"):
            call()
        assert len(server.gets()) == 1
    assert kept(store.cache) == set()  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [50_000, 100_000, 200_000])
def test_other_bytes_than_listed_mean_that_the_server_changed(server: ObjectServer, store: Store, size: int) -> None:
    with pytest.raises(DataError, match=r"changed on the server: [\s\S]*load the catalog again"):
        store.fetch("0.tar", size, "0" * 64)
    assert len(server.gets()) == module.WRONG_BYTES


def test_patience_ends_with_what_was_tried(server: ObjectServer, cache: Cache) -> None:
    hasty = Store(f"{server.url}/c", cache, Retry(patience=1, first=0.01, longest=0.05))
    server.always = 503
    with pytest.raises(DataError, match=r"given up after \d+ tries [\s\S]*503[\s\S]*see whether it can be reached"):
        hasty.fetch(*item("0.tar"))
    assert len(server.gets()) > 1
    server.down()
    with pytest.raises(DataError, match=r"given up after \d+ tries [\s\S]*Cannot connect"):
        hasty.read("0.tar")


def test_a_server_that_comes_back_is_used_again(server: ObjectServer, store: Store) -> None:
    server.down()
    got: list[bytes] = []
    waiting = threading.Thread(target=lambda: got.append(store.fetch(*item("0.tar")).read_bytes()))
    waiting.start()
    time.sleep(0.3)
    assert waiting.is_alive()
    server.up()
    waiting.join()
    assert got == [DATA["0.tar"]]
    assert store.read("1.tar") == DATA["1.tar"]


SECRET = st.text("abcXYZ019-._~%+", min_size=6).map("S3CR3T".__add__)


@given(user=SECRET, password=SECRET, token=SECRET)
def test_secrets_of_a_url_are_never_shown(user: str, password: str, token: str) -> None:
    url = f"https://{user}:{password}@host/c/0.tar?sig={token}"
    for text in (url, f"Cannot reach '{url}'", f"404, url={url!r}, and {url}"):
        assert "S3CR3T" not in redact(text)
        assert "://***@host/c/0.tar?***" in redact(text)
    assert redact("s3://bucket/a@b/c") == "s3://bucket/a@b/c"


@pytest.mark.parametrize("fault", [403, 404, 503])
def test_errors_and_their_tracebacks_show_no_secrets(server: ObjectServer, cache: Cache, fault: int) -> None:
    server.always = fault
    root = f"http://me:hunter2@{server.address}/c?sig=hunter2"
    with pytest.raises(DataError) as caught:
        Store(root, cache, Retry(patience=0.1, first=0.01)).fetch(*item("0.tar"))
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))
    assert f"http://***@{server.address}/c/0.tar?***" in str(caught.value)


def test_google_buckets_are_read_before_and_after_a_fork(
    server: ObjectServer, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec = pytest.importorskip("fsspec")
    pytest.importorskip("gcsfs", reason="gcsfs is not installed")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})  # as FSSPEC_GS_TOKEN=anon does
    monkeypatch.setattr(module, "_filesystems", {})
    place = "/download/storage/v1/b/bucket/o/c%2F"
    server.files = {f"{place}{name}": data for name, data in DATA.items()}
    store = Store("gs://bucket/c", cache, STEADY)
    assert store.fetch(*item("0.tar")).read_bytes() == store.read("0.tar") == DATA["0.tar"]
    results = FORK.Queue()
    child = FORK.Process(target=fetch_all, args=(store, ["1.tar"], results))
    child.start()
    assert results.get(timeout=120) == [True]
    child.join()
    for status, message in ((403, "access denied"), (404, "there is no such file"), (416, "changed on the server")):
        server.faults.append(status)
        with pytest.raises(DataError, match=f"{message}[\\s\\S]*where: gs://bucket/c/2.tar"):
            store.fetch(*item("2.tar"))
    assert [len(server.gets(name)) for name in ("0.tar", "1.tar", "2.tar")] == [2, 1, 3]


# ---- in the background


def test_what_was_prefetched_is_downloaded_once_and_is_there(server: ObjectServer, store: Store) -> None:
    server.always, server.slow = "slow", 0.05
    for _ in range(3):
        store.prefetch(item(name) for name in DATA)
    for name in DATA:
        assert store.fetch(*item(name)).read_bytes() == DATA[name]
    assert [len(server.gets(name)) for name in DATA] == [1] * len(DATA)
    assert store._prefetcher
    until(lambda: store._prefetcher and store._prefetcher.threads == 0)


def test_prefetch_remembers_no_more_than_its_depth_and_keeps_quiet(
    server: ObjectServer, store: Store, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "PREFETCH_DEPTH", 3)
    store.prefetch((f"missing-{i}", 1, "0" * 64) for i in range(100))
    until(lambda: store._prefetcher and store._prefetcher.threads == 0)
    assert len(server.gets()) == 3
    assert capfd.readouterr() == ("", "")
    with pytest.raises(DataError, match="there is no such file"):
        store.fetch("missing-0", 1, "0" * 64)


def prefetch_in_child(store: Store, results: Any) -> None:
    store.prefetch([item("2.tar")])
    until(lambda: store.cache and "2.tar" in kept(store.cache))
    fetch_all(store, ["1.tar"], results)


def test_a_store_works_after_a_fork_and_after_pickling(server: ObjectServer, store: Store) -> None:
    store.prefetch([item("0.tar")])
    assert store.fetch(*item("0.tar")).exists()
    results = FORK.Queue()
    child = FORK.Process(target=prefetch_in_child, args=(store, results))
    child.start()
    assert results.get(timeout=120) == [True]
    child.join()
    copy = pickle.loads(pickle.dumps(store))
    assert (copy.root, copy.cache, copy.retry) == (store.root, store.cache, store.retry)
    copy.prefetch([item("3.tar")])
    assert copy.fetch(*item("3.tar")).read_bytes() == DATA["3.tar"]
    assert [len(server.gets(name)) for name in DATA] == [1, 1, 1, 1, 0, 0]


def test_a_process_ends_quietly_in_the_middle_of_a_prefetch(server: ObjectServer, tmp_path: Path) -> None:
    server.always, server.slow = "hang", 30
    program = f"""
import time
from pathlib import Path
from shards.cache import Cache
from shards.store import Store
store = Store("{server.url}/c", Cache(Path("{tmp_path}"), 10**6))
store.prefetch([{item("0.tar")}])
while not any(any(part.read_bytes()) for part in store.cache.place.glob("*/*.part")):
    time.sleep(0.01)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(server.gets()) == 1
