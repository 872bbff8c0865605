"""What the tests of the store share: some files, and a web server that counts requests and misbehaves on demand.

It goes away and comes back, and serves a dict of bytes, or stands as a proxy before a real S3 server.
"""

from __future__ import annotations

import hashlib
import http.client
import multiprocessing
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from shards import store
from shards.cache import Cache
from shards.remote import Retry
from shards.store import Store

STEADY = Retry(patience=120, first=0.01, longest=0.05, connect=30, read=30)  # a busy machine is no fault
HASTY = replace(STEADY, read=2)  # for servers that are silent longer than that
FORK = multiprocessing.get_context("fork")
DATA = {f"{i}.tar": random.Random(i).randbytes(100_000) for i in range(6)}


def item(name: str, data: bytes | None = None) -> tuple[str, int, str]:
    data = DATA[name] if data is None else data
    return name, len(data), hashlib.sha256(data).hexdigest()


def kept(cache: Cache) -> set[str]:
    """Names in the cache, without hashes."""
    return {path.name.partition("-")[2] for path in cache.place.glob("*/*")}


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it never happens"
        time.sleep(0.005)


def fetch_all(source: Store, names: list[str], results: Any) -> None:
    results.put([source.fetch(*item(name)).read_bytes() == DATA[name] for name in names])


class Request(NamedTuple):
    """What a client asked for: GET or another method, path without its query, its Range header."""

    method: str
    path: str
    range: str | None


class ObjectServer:
    """`files` (path → bytes, without ranges) or what the server at `upstream` ("host:port") answers, on loopback.

    `faults` are used up one per GET: a number is that HTTP status; "truncate" sends half of the body and hangs up;
    "short" does so without having said how long it is; "hang" sends half and then nothing for `slow` seconds;
    "slow" waits that long before the answer; "other" sends other bytes of the same length. "" is no fault.
    """

    def __init__(self, files: Mapping[str, bytes] | None = None, upstream: str = "", slow: float = 2) -> None:
        self.files, self.upstream, self.slow = dict(files or {}), upstream, slow
        self.requests: list[Request] = []
        self.faults: deque[str | int] = deque()
        self.always: str | int = ""  # the fault of every GET once `faults` is empty
        self.refuse: Callable[[Request], int] = lambda _: 0  # the HTTP status of requests that are refused, else 0
        self.port = 0
        self._server: ThreadingHTTPServer | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def gets(self, path: str = "") -> list[Request]:
        """The GETs so far of paths that end like this."""
        return [request for request in self.requests if request.method == "GET" and request.path.endswith(path)]

    def up(self) -> None:
        """Listen, on the same port as before."""
        handler = type("Handler", (_Handler,), {"store": self})
        self._server = _Server(("127.0.0.1", self.port), handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def down(self) -> None:
        """Refuse connections."""
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def __enter__(self) -> ObjectServer:
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()


def point_to(proxy: ObjectServer, monkeypatch: Any) -> Any:
    """Let the environment point every S3 client to `proxy`; the file system, in which a bucket named `bucket` is."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    nowhere = {"AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "no_proxy": "127.0.0.1"}
    known = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "hunter2", "AWS_EC2_METADATA_DISABLED": "true"}
    for name, value in {**nowhere, **known, "AWS_ENDPOINT_URL": proxy.url, "AWS_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(store, "_filesystems", {})  # one reads its environment when it is made
    fs, _ = store.filesystem("s3://bucket")
    fs.call_s3("create_bucket", Bucket="bucket")
    return fs


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64


class _Handler(BaseHTTPRequestHandler):
    store: ObjectServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def handle(self) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # the client was killed, or had enough
            super().handle()

    def do_GET(self) -> None:
        served, path = self.store, self.path.partition("?")[0]
        served.requests.append(Request(self.command, path, self.headers.get("Range")))
        if status := served.refuse(served.requests[-1]):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._answer(status, {}, b"injected")
            return
        fault: Any = ""
        if self.command == "GET":
            fault = served.faults.popleft() if served.faults else served.always
        if isinstance(fault, int):
            self._answer(fault, {}, b"injected")
            return
        if fault == "slow":
            time.sleep(served.slow)
        if served.upstream:
            self._answer(*self._forwarded(), fault)
        elif path in served.files:
            self._answer(200, {}, served.files[path], fault)
        else:
            self._answer(404, {}, b"no such file")

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _forwarded(self) -> tuple[int, dict[str, str], bytes]:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        connection = http.client.HTTPConnection(self.store.upstream, timeout=30)
        connection.request(self.command, self.path, body, dict(self.headers.items()))
        response = connection.getresponse()
        data = response.read()
        connection.close()
        kept = {k: v for k, v in response.getheaders() if k.lower() not in ("connection", "transfer-encoding", "date")}
        return response.status, kept, data

    def _answer(self, status: int, headers: dict[str, str], data: bytes, fault: str = "") -> None:
        if fault == "other":
            data = bytes(len(data))
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() != "content-length":
                self.send_header(name, value)
        if fault != "short":
            length = headers.get("Content-Length", str(len(data))) if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length)
        self.send_header("Connection", "close")  # `down` must not leave connections behind
        self.end_headers()
        self.close_connection = True
        if self.command == "HEAD":
            return
        half = fault in ("truncate", "short", "hang")
        self.wfile.write(data[: len(data) // 2] if half else data)
        self.wfile.flush()
        if fault == "hang":
            time.sleep(self.store.slow)
