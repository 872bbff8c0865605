"""Where checkpoints are: a folder, or a URL of an object store. Both with the same few operations.

A folder can be renamed, which makes a finished checkpoint appear at once. An object store cannot: there a checkpoint
appears with the last of its objects. The two drafts of `begin` and `publish` are the only difference.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from foundation.config import Config
from shards.redaction import redact
from shards.remote import Retry, insist
from shards.store import filesystem

TEMPORARY = ".tmp-"
OURS = r"samples-\d{12,}"  # names of checkpoints; a bucket may hold other samples-...
RETRY = Retry()
BATCH = 64 << 20  # bytes that are asked for at once
Bytes = bytes | memoryview
Span = tuple[int, int]  # from, to


class Url(str):
    """The text of a URL, with what callers use of a path."""

    @property
    def name(self) -> str:
        """The last part."""
        return self.rstrip("/").rpartition("/")[2]

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.rstrip('/')}/{name}")


Location = Path | Url


class Place(ABC):
    """A file or a folder of files. Raises OSError, or DataError when an object store cannot be used."""

    name: str
    location: Location

    @abstractmethod
    def __truediv__(self, name: str) -> Place:
        """What is called `name` below this place."""

    @abstractmethod
    def names(self) -> list[str]:
        """What lies directly in this folder; nothing when there is no such folder."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Bytes of every file below this folder, by its path from here; nothing when there is no such folder."""

    @abstractmethod
    def spans(self, spans: Sequence[Span]) -> Iterator[bytes]:
        """These parts of this file, in this order. Raises OSError when the file ends before."""

    @abstractmethod
    def read(self) -> bytes:
        """All of this file."""

    @abstractmethod
    def write(self, parts: Sequence[Bytes]) -> None:
        """Make this file of these parts; when it returns, a power cut does not take them away."""

    @abstractmethod
    def remove(self) -> None:
        """Take this file or folder away, at once or with its COMMIT marker first: a half-removed checkpoint is none."""

    @abstractmethod
    def begin(self, name: str) -> tuple[Place, str]:
        """Where the files of a new checkpoint `name` are to be written, and what is to be added to their names."""

    @abstractmethod
    def publish(self, draft: Place, name: str) -> None:
        """Let a draft that holds its COMMIT marker appear as `name`."""

    @abstractmethod
    def point(self, name: str) -> None:
        """Let the file `latest` name this checkpoint, for people."""

    @abstractmethod
    def clear(self) -> None:
        """Remove what interrupted saves have left in this folder of checkpoints."""

    def interrupted(self) -> list[str]:
        """Names of drafts that were never published."""
        return []

    def digest(self) -> str:
        """The sha256 of this file."""
        size, sha = self.size(), hashlib.sha256()
        for data in self.spans([(at, min(at + BATCH, size)) for at in range(0, size, BATCH)]):
            sha.update(data)
        return sha.hexdigest()

    @abstractmethod
    def size(self) -> int:
        """Bytes of this file."""

    def exists(self) -> bool:
        """Whether there is anything in this folder."""
        return bool(self.names())

    def __str__(self) -> str:
        return str(self.location)


class Folder(Place):
    """A path of this machine, or of a disk that all machines share."""

    def __init__(self, path: Path) -> None:
        self.path, self.location, self.name = path, path, path.name

    def __truediv__(self, name: str) -> Folder:
        return Folder(self.path / name)

    def names(self) -> list[str]:
        """In alphabetical order."""
        return sorted(os.listdir(self.path)) if self.path.is_dir() else []

    def sizes(self) -> dict[str, int]:
        """Of a tree that nobody changes meanwhile."""
        files = (path for path in self.path.rglob("*") if path.is_file())
        return {path.relative_to(self.path).as_posix(): path.stat().st_size for path in files}

    def size(self) -> int:
        """As the system says."""
        return self.path.stat().st_size

    def exists(self) -> bool:
        """Also when it is empty."""
        return self.path.is_dir()

    def spans(self, spans: Sequence[Span]) -> Iterator[bytes]:
        """By `pread`."""
        with self.path.open("rb", buffering=0) as file:
            for start, stop in spans:
                data = os.pread(file.fileno(), stop - start, start)
                while len(data) < stop - start:  # the system gives at most 2 GB at once
                    more = os.pread(file.fileno(), stop - start - len(data), start + len(data))
                    if not more:
                        raise OSError(f"{self.name} ends after {start + len(data)} bytes")
                    data += more
                yield data

    def read(self) -> bytes:
        """At once."""
        return self.path.read_bytes()

    def write(self, parts: Sequence[Bytes]) -> None:
        """Flushed to the disk, its folder (made if need be) not yet."""
        if not self.path.parent.is_dir():
            self.path.parent.mkdir(exist_ok=True)
        with self.path.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """By a new name first: a half-removed checkpoint is none. A file at once."""
        if self.path.is_file():
            self.path.unlink()
            return
        gone = self.path.with_name(f"{TEMPORARY}removed-{self.name}")
        shutil.rmtree(gone, ignore_errors=True)
        self.path.rename(gone)
        shutil.rmtree(gone)

    def begin(self, name: str) -> tuple[Folder, str]:
        """A hidden folder."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.clear()  # before writing: an interrupted save may hold the space that this one needs
        draft = self / f"{TEMPORARY}{name}"
        draft.path.mkdir()
        return draft, ""

    def publish(self, draft: Place, name: str) -> None:
        """Flush the names, then rename."""
        assert isinstance(draft, Folder)
        for folder in (*(path for path in draft.path.iterdir() if path.is_dir()), draft.path):
            flush(folder)
        final = self.path / name
        if final.exists():
            # A crash between these two names leaves the draft, which holds its COMMIT: `adopt` finishes it.
            final.rename(self.path / f"{TEMPORARY}replaced-{name}")
        draft.path.rename(final)
        flush(self.path)

    def point(self, name: str) -> None:
        """By a rename."""
        draft = self.path / f"{TEMPORARY}latest"
        draft.write_text(f"{name}\n", encoding="utf-8")
        draft.replace(self.path / "latest")

    def interrupted(self) -> list[str]:
        """Hidden folders."""
        return [name for name in self.names() if name.startswith(f"{TEMPORARY}samples-")]

    def clear(self) -> None:
        """Everything of ours that is hidden and can be removed."""
        for name in self.names():
            if re.fullmatch(rf"{re.escape(TEMPORARY)}(latest|(removed-|replaced-)?{OURS})", name):
                shutil.rmtree(self.path / name, ignore_errors=True)
                with suppress(OSError):
                    (self.path / name).unlink()


class Bucket(Place):
    """A URL of an object store: files appear whole or not at all, and nothing is renamed."""

    def __init__(self, url: str) -> None:
        self.url = Url(url.rstrip("/"))
        self.location, self.name = self.url, self.url.name

    def __truediv__(self, name: str) -> Bucket:
        return Bucket(self.url / name)

    def __str__(self) -> str:
        return redact(self.url)

    def names(self) -> list[str]:
        """By one listing."""
        fs, path = self._store()
        with suppress(FileNotFoundError):
            found = self._insist("the list of files cannot be read", lambda: fs.ls(path, detail=False))
            return sorted(name.rstrip("/").rpartition("/")[2] for name in found)
        return []

    def sizes(self) -> dict[str, int]:
        """By one listing."""
        fs, path = self._store()
        with suppress(FileNotFoundError):
            found = self._insist("the list of files cannot be read", lambda: fs.find(path, detail=True))
            files = {name[len(path) + 1 :]: int(facts["size"]) for name, facts in found.items()}
            return {name: size for name, size in files.items() if name}
        return {}

    def size(self) -> int:
        """As the store says."""
        fs, path = self._store()
        return int(self._insist("the file cannot be found", lambda: fs.info(path)["size"]))

    def spans(self, spans: Sequence[Span]) -> Iterator[bytes]:
        """Several requests at a time."""
        fs, path = self._store()
        for batch in batches(spans):
            starts, stops = zip(*batch, strict=True)

            def ask(starts: Sequence[int] = starts, stops: Sequence[int] = stops) -> list[bytes]:
                return list(fs.cat_ranges([path] * len(starts), list(starts), list(stops), on_error="raise"))

            for (start, stop), data in zip(batch, self._insist("the file cannot be read", ask), strict=True):
                if len(data) != stop - start:
                    raise OSError(f"{self.name} ends after {start + len(data)} bytes")
                yield bytes(data)

    def read(self) -> bytes:
        """By one request."""
        fs, path = self._store()
        return bytes(self._insist("the file cannot be read", lambda: fs.cat_file(path)))

    def write(self, parts: Sequence[Bytes]) -> None:
        """In one upload, or several parts of one."""
        fs, path = self._store()
        self._insist("the file cannot be written", partial(fs.pipe_file, path, b"".join(parts)))

    def remove(self) -> None:
        """COMMIT first: a half-removed checkpoint is none."""
        fs, path = self._store()
        names = sorted(self.sizes(), key=lambda name: name != "COMMIT") or [""]
        for name in names:
            with suppress(FileNotFoundError):
                self._insist("the file cannot be removed", partial(fs.rm_file, f"{path}/{name}".rstrip("/")))

    def begin(self, name: str) -> tuple[Bucket, str]:
        """The final name, with new names for the files in it."""
        self.clear()
        # Names of their own: a checkpoint that is there already stays whole until the new manifest takes its place.
        return self / name, f"-{secrets.token_hex(4)}"

    def publish(self, draft: Place, name: str) -> None:
        """It has appeared with its COMMIT."""

    def point(self, name: str) -> None:
        """By replacing the object."""
        (self / "latest").write([f"{name}\n".encode()])

    def clear(self) -> None:
        """Everything of checkpoints without COMMIT."""
        files = self.sizes()
        committed = {name.partition("/")[0] for name in files if name.endswith("/COMMIT")}
        tops = {name.partition("/")[0] for name in files if "/" in name}
        for name in {top for top in tops if re.fullmatch(OURS, top)} - committed:
            (self / name).remove()

    def _store(self) -> tuple[Any, str]:
        return filesystem(self.url, RETRY)

    def _insist(self, what: str, action: Any) -> Any:
        return insist(action, what, self.url, RETRY)


def home(config: Config) -> Location:
    """Where the checkpoints of a run are: `train.checkpoints`, or a folder of the run folder."""
    chosen = config.train.checkpoints
    return config.run_folder / "checkpoints" if chosen is None else place(chosen).location


def place(location: Path | str | Place) -> Place:
    """The place of a path or URL."""
    if isinstance(location, Place):
        return location
    if isinstance(location, str) and "://" in location and not location.startswith("file://"):
        return Bucket(location)
    return Folder(Path(str(location).removeprefix("file://")))


def batches(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """The spans in groups of about BATCH bytes."""
    group: list[Span] = []
    for span in spans:
        group.append(span)
        if sum(stop - start for start, stop in group) >= BATCH:
            yield group
            group = []
    if group:
        yield group


def flush(folder: Path) -> None:
    """Write a folder's list of names to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
