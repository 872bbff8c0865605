"""Where the files of a catalog are: a folder, or S3, GCS or HTTP through fsspec and a cache on the node."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib import import_module
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from shards.cache import Cache
from shards.errors import DataError
from shards.redaction import bare
from shards.remote import Attempts, ChangedError, Retry

PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "file": "",
    "memory": "",
}
PIECE, TOGETHER = 8 << 20, 8  # bytes of one request, and how many are under way for one file
WRONG_BYTES = 3  # how often a file may arrive with other bytes than expected
PREFETCH_DEPTH, PREFETCH_THREADS = 32, 2
PREFETCH_TRUST = 60.0  # seconds for which a file that was fetched counts as there
ROUNDS = 8  # how often other processes may take a file away before it could be opened
log = logging.getLogger(__name__)
_filesystems: dict[tuple[object, ...], Any] = {}


class Entry(NamedTuple):
    """A file of a catalog: path below the root, bytes, sha256 in hex."""

    name: str
    size: int
    sha256: str


def filesystem(url: str, retry: Retry | None = None) -> tuple[Any, str]:
    """The fsspec file system of a URL or path, and the path of the URL in it.

    One per process, kind and `retry`. Credentials and endpoints come from the environment of the kind (AWS_*,
    GOOGLE_APPLICATION_CREDENTIALS) or from FSSPEC_* variables. Raises DataError for an unknown kind of URL and for a
    missing package.
    """
    retry = retry or Retry()
    scheme = url.partition("://")[0] if "://" in url else "file"
    if scheme not in PACKAGES:
        raise DataError(f"{scheme}:// is not read here", where=url, do=f"use one of {', '.join(PACKAGES)}")
    # An instance and its event loop do not survive a fork. Those of the parent stay listed: collecting them in a
    # child would close sessions on a loop that no longer runs.
    key = (os.getpid(), scheme, retry)
    if key not in _filesystems:
        try:
            created = _create(scheme, retry)
        except ImportError as error:
            package = PACKAGES[scheme] or "fsspec"
            raise DataError(f"{scheme}:// needs a package: {error}", do=f"pip install {package}") from error
        _filesystems.setdefault(key, created)
    fs = _filesystems[key]
    return fs, fs._strip_protocol(url).rstrip("/")


def _create(scheme: str, retry: Retry) -> Any:
    """Retrying is left to `Attempts`, so that waits do not multiply; listings are never cached."""
    from fsspec import get_filesystem_class

    kind: Any = get_filesystem_class(scheme)
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme == "s3":
        timeouts = {"connect_timeout": retry.connect, "read_timeout": retry.read}
        options["config_kwargs"] = {**timeouts, "retries": {"total_max_attempts": 1}}
    if PACKAGES[scheme] in ("aiohttp", "gcsfs"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=retry.connect, sock_read=retry.read)
    if PACKAGES[scheme] == "gcsfs":
        # The class that gcsfs registers asks what kind of bucket it is, by gRPC, which does not survive a fork.
        kind = import_module("gcsfs.core").GCSFileSystem
        options["requests_timeout"] = timeout
    elif PACKAGES[scheme] == "aiohttp":
        session = {"trust_env": True, "auto_decompress": False, "headers": {"Accept-Encoding": "identity"}}
        options["client_kwargs"] = {**session, "timeout": timeout}
    fs = kind(**options)
    if scheme == "s3":
        fs.retries = 1
    return fs


class Store:
    """The files below `root`, a folder or a URL. Picklable; survives a fork.

    Files of a URL are copied whole into `cache`, once for all processes of the node, and checked on arrival.
    """

    def __init__(self, root: str | Path, cache: Cache | None = None, retry: Retry | None = None) -> None:
        self.root = str(root).removeprefix("file://")
        self.remote = "://" in self.root
        self.cache, self.retry = cache, retry or Retry()
        self._key = bare(self.root).rstrip("/")  # a new token is no new catalog
        self._prefetcher: _Prefetcher | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prefetcher": None}

    def fetch(self, name: str, size: int, sha256: str, *, again: bool = False) -> Path:
        """A complete local file with these bytes; of a local root the file itself, unchecked.

        `again`: from the server even if it is in the cache, whose copy is replaced once the new one is complete.
        Another process may need the room for other files: open it at once, or use `open`. Raises DataError.
        """
        if not self.remote:
            return Path(self.root) / _inside(name)
        if self.cache is None:
            raise DataError("a remote catalog needs a cache", where=self.where(name), do="name a folder of the node")
        path = self.cache.path(self._key, name, sha256)
        if not again and self.cache.hit(path, size):
            return path
        attempts = Attempts(self.retry, self.where(name))
        with self.cache.writing(path, size, attempts.idle, again=again) as file:
            if file is not None:
                self._download(file, Entry(_inside(name), size, sha256), attempts)
        return path

    def open(self, name: str, size: int, sha256: str) -> BinaryIO:
        """The file of `fetch`, unbuffered, open before anybody can delete it from the cache."""
        for _ in range(ROUNDS):
            path = self.fetch(name, size, sha256)
            try:
                return open(path, "rb", buffering=0)
            except FileNotFoundError:
                if not self.remote:
                    raise DataError("no such file", where=str(path), do="complete the catalog") from None
        raise DataError(
            f"other processes took it out of the cache {ROUNDS} times before it could be opened",
            where=self.where(name),
            do="give the cache more room",
        )

    def drop(self, name: str, size: int, sha256: str, seen: os.stat_result) -> None:
        """Take a damaged file out of the cache, unless the one there is no longer the one that was `seen`."""
        if self.remote and self.cache is not None:
            path = self.cache.path(self._key, name, sha256)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), seen):
                    path.unlink()

    def read(self, name: str) -> bytes:
        """The bytes of a small file, not cached. Raises DataError."""
        attempts = Attempts(self.retry, self.where(name))
        fs, base = filesystem(self.root, self.retry)
        path = _join(base, _inside(name))
        while True:
            try:
                return bytes(fs.cat_file(path))
            except Exception as error:
                attempts.failed(error, final=not self.remote)

    def prefetch(self, items: Iterable[tuple[str, int, str]]) -> None:
        """Begin to fetch in the background, the first ones first; errors are left to `fetch`.

        Cheap to call again and again: of what was not fetched lately, a bounded number is remembered.
        """
        if not self.remote or self.cache is None:
            return
        if self._prefetcher is None or self._prefetcher.process != os.getpid():
            filesystem(self.root, self.retry)  # imports and the event loop belong to this thread
            self._prefetcher = _Prefetcher(self.fetch)
        self._prefetcher.add(Entry(*item) for item in items)

    def where(self, name: str) -> str:
        """The path or URL of a file, for messages: without secrets."""
        return _join(bare(self.root.rstrip("/")), name)

    def _download(self, file: BinaryIO, item: Entry, attempts: Attempts) -> None:
        """Write the file, resumed where its kind allows it; raises DataError."""
        fs, base = filesystem(self.root, self.retry)
        url, pieces = _join(base, item.name), _streamed if self.root.startswith("http") else _ranged
        sha, done, wrong = hashlib.sha256(), 0, 0
        while True:
            try:
                for data in pieces(fs, url, done, item.size):
                    _write(file, data)
                    sha.update(data)
                    done += len(data)
                    attempts.reached(done)
                if done == item.size and sha.hexdigest() == item.sha256:
                    return
                found = f"{done:,} bytes, sha256 {sha.hexdigest()[:12]}"
                raise ChangedError(f"{found} instead of {item.size:,}, {item.sha256[:12]}")
            except _Full as error:
                raise error.cause from None
            except Exception as error:
                wrong += isinstance(error, ChangedError)
                attempts.failed(error, final=wrong == WRONG_BYTES)
                if isinstance(error, ChangedError) or pieces is _streamed:
                    sha, done = hashlib.sha256(), 0
                    file.seek(0)


class _Full(Exception):
    """The local disk failed, not the server."""

    def __init__(self, cause: OSError) -> None:
        self.cause = cause


def _write(file: BinaryIO, data: bytes) -> None:
    try:
        file.write(data)
    except OSError as error:
        raise _Full(error) from error


def _ranged(fs: Any, path: str, start: int, stop: int) -> Iterator[bytes]:
    """Bytes [start, stop) of a remote file by requests for parts, several at a time."""
    for at in range(start, stop, PIECE * TOGETHER):
        starts = range(at, min(at + PIECE * TOGETHER, stop), PIECE)
        ends = [min(begin + PIECE, stop) for begin in starts]
        for begin, end, data in zip(starts, ends, fs.cat_ranges([path] * len(ends), list(starts), ends), strict=True):
            if isinstance(data, BaseException):
                raise data
            yield data
            if len(data) < end - begin:
                return


def _streamed(fs: Any, url: str, start: int, stop: int) -> Iterator[bytes]:
    """A remote file from its beginning in one request, for servers that may not know ranges; at most stop + 1 bytes."""
    with fs.open(url, block_size=0, size=stop or 1) as file:
        left = stop + 1
        while left and (data := file.read(min(PIECE, left))):
            left -= len(data)
            yield data


def _inside(name: str) -> str:
    """`name`, when it stays below the root."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not name:
        raise DataError(f"{name!r} is no path inside a catalog", do="do not use this catalog: it was tampered with")
    return name


def _join(base: str, name: str) -> str:
    """`name` below a path or URL; the query of an HTTP URL stays at its end."""
    if not base.startswith("http"):
        return f"{base}/{name}"
    place, mark, query = base.partition("?")
    return f"{place.rstrip('/')}/{name}{mark}{query}"


class _Prefetcher:
    """A bounded list of files to fetch, and the daemon threads of this process that live while it is not empty."""

    def __init__(self, fetch: Callable[[str, int, str], object]) -> None:
        self.process, self.fetch = os.getpid(), fetch
        self.lock = threading.Lock()
        self.waiting: deque[Entry] = deque()
        self.busy: set[Entry] = set()
        self.known: set[Entry] = set()  # tried lately
        self.until = 0.0  # when that is forgotten, since other processes delete files
        self.threads = 0

    def add(self, items: Iterable[Entry]) -> None:
        with self.lock:
            if time.monotonic() > self.until:
                self.known, self.until = self.busy.copy(), time.monotonic() + PREFETCH_TRUST
            # What is asked for now is needed before what was asked for earlier and still waits.
            wanted = dict.fromkeys(item for item in chain(items, self.waiting) if item not in self.known)
            self.waiting = deque(islice(wanted, PREFETCH_DEPTH))
            start = min(PREFETCH_THREADS - self.threads, len(self.waiting))
            self.threads += start
        for _ in range(start):
            threading.Thread(target=self._work, name="prefetch", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self.lock:
                if not self.waiting:
                    self.threads -= 1
                    return
                item = self.waiting.popleft()
                self.known.add(item)
                self.busy.add(item)
            try:
                self.fetch(*item)
            except Exception as error:  # the fetch that needs the file reports it
                log.debug("prefetch: %s", error)
            with self.lock:
                self.busy.discard(item)
