"""The files of a source, read in place: a folder, a plain tar, a single file, or a folder in a bucket.

Names are only text: nothing is ever extracted to a path that an archive names.
"""

from __future__ import annotations

import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from shards.errors import DataError
from shards.remote import explained
from shards.schema import Rejected
from shards.store import Store, filesystem

MAX_BYTES = 8 << 30  # of one file that is read whole
MAX_HEADER = 1 << 20  # of what describes an archive member
_DESCRIBING = b"xgXLK"  # types of pax headers and of GNU's long names
# Where fsspec's file systems say what changes when a file is written anew, the surest first.
STAMPS = ("ETag", "etag", "LastModified", "updated", "last_modified", "mtime", "created")


class Files:
    """The regular files under `root`: a folder, a .tar, one file, or an fsspec URL of a folder. Picklable.

    Raises DataError when `root` cannot be read at all.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)
        self.remote = "://" in self.root
        if not self.remote and not Path(self.root).exists():
            raise DataError("no such folder or file", where=self.root, do="check the path of the source")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_remote_root"}

    @cached_property
    def names(self) -> list[str]:
        """Paths inside the source, with '/', sorted."""
        return sorted(self._places)

    @cached_property
    def refused(self) -> list[Rejected]:
        """What is no plain file with a harmless name, and the place where an archive is damaged."""
        return self._scan[1]

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return self._places[name][1]

    def stamp(self, name: str) -> str:
        """Changes when the file is written anew: what a bucket says of it, else its time of writing in ns."""
        if self.remote:
            return self._scan[2][name]
        return str(Path(self._file(name)).stat().st_mtime_ns)

    def read(self, name: str) -> bytes:
        """The bytes of a file; raises DataError when it cannot be read."""
        offset, size = self._places[name]
        if size > MAX_BYTES:
            raise DataError(f"a file of {size:,} bytes is not read whole", where=name, do="cut it into tiles first")
        try:
            if self.remote:
                return Store(self.root).read(name)
            with open(self._file(name), "rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise DataError(f"cannot be read: {error}", where=name, do="fetch it again or exclude it") from error

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """A real file with these bytes, for libraries that want a path; a copy unless the source is a folder."""
        if not self.remote and (Path(self.root).is_dir() or not self._is_tar):
            yield Path(self._file(name))
            return
        with tempfile.TemporaryDirectory(prefix="foundation-") as scratch:
            path = Path(scratch) / ("file" + PurePosixPath(name).suffix)
            self._copy(name, path)
            yield path

    def _copy(self, name: str, path: Path) -> None:
        """Bring a file that may be larger than memory to `path`."""
        offset, size = self._places[name]
        try:
            if self.remote:
                self._download(name, path)
                return
            with open(self.root, "rb") as source, open(path, "wb") as target:
                source.seek(offset)
                while size and (data := source.read(min(size, 8 << 20))):
                    target.write(data)
                    size -= len(data)
        except OSError as error:
            what = f"cannot be copied: {error}"
            raise DataError(what, where=name, do="free space, or fetch it again") from error

    def _download(self, name: str, path: Path) -> None:
        fs, base = self._remote_root
        for wait in (1, 5, 25, None):
            try:
                fs.get_file(f"{base}/{name}", str(path))
                return
            except Exception as error:  # of fsspec's libraries, which are not all OSError
                if wait is None or isinstance(error, FileNotFoundError):
                    url = f"{self.root}/{name}"
                    raise explained(error, "cannot be fetched", url, "see whether it can be reached") from None
                time.sleep(wait)

    @property
    def _is_tar(self) -> bool:
        return Path(self.root).is_file() and self.root.lower().endswith(".tar")

    def _file(self, name: str) -> str:
        return str(Path(self.root) / name) if Path(self.root).is_dir() else self.root

    @cached_property
    def _remote_root(self) -> tuple[Any, str]:
        return filesystem(self.root)

    @cached_property
    def _scan(self) -> tuple[dict[str, tuple[int, int]], list[Rejected], dict[str, str]]:
        """Name → (offset in its file, size), what is refused, and the stamps of remote files."""
        if self.remote:
            fs, base = self._remote_root
            try:
                listed = fs.find(base, detail=True)
            except Exception as error:  # of fsspec's libraries, which are not all OSError
                raise explained(error, "cannot be listed", self.root, "check the URL") from None
            if not listed or base in listed:
                what = "a file; of a URL only folders are read" if listed else "no such folder, or nothing in it"
                raise DataError(what, where=self.root, do="check the URL")
            named = {path[len(base) :].lstrip("/"): info for path, info in listed.items()}
            stamps = {name: str(next(filter(None, map(info.get, STAMPS)), "")) for name, info in named.items()}
            return {name: (0, int(info["size"])) for name, info in named.items()}, [], stamps
        root = Path(self.root)
        if root.is_dir():
            found = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if not p.is_dir()}
            places = {name: (0, path.stat().st_size) for name, path in found.items() if path.is_file()}
            others = sorted(found.keys() - places)
            return places, [Rejected(name, "bad", "a broken link, device or pipe") for name in others], {}
        if self._is_tar:
            return *_scan_tar(root), {}
        return {root.name: (0, root.stat().st_size)}, [], {}

    @property
    def _places(self) -> dict[str, tuple[int, int]]:
        return self._scan[0]


class _Member(tarfile.TarInfo):
    """A member whose size leads neither back in the archive nor into the memory."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:  # the hook that tarfile has for subclasses
        if self.size < 0 or (self.type in _DESCRIBING and self.size > MAX_HEADER):
            raise _unreadable(str(archive.name), f"a header announces {self.size:,} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]


def _unreadable(path: str, problem: object) -> DataError:
    return DataError(f"not a readable plain tar: {problem}", where=path, do="fetch it again")


def _scan_tar(path: Path) -> tuple[dict[str, tuple[int, int]], list[Rejected]]:
    places: dict[str, tuple[int, int]] = {}
    refused = []
    total, end = path.stat().st_size, 0
    try:
        with tarfile.open(path, "r:", tarinfo=_Member) as archive:
            for member in archive:
                if member.size < 0:  # by a pax header: the next member would be this one again, without end
                    raise _unreadable(str(path), f"{member.name} has {member.size} bytes")
                end = min(archive.offset, total)
                if member.isdir():
                    continue
                name = member.name.removeprefix("./")  # as `tar cf x.tar .` writes them
                if problem := _problem(member, total):
                    refused.append(Rejected(name, "bad", problem))
                    continue
                if name in places:
                    refused.append(Rejected(name, "bad", "a later member of the archive has the same name"))
                places[name] = (member.offset_data, member.size)
    except (tarfile.TarError, ValueError, OverflowError, OSError, RecursionError) as error:
        if not places:
            raise _unreadable(str(path), error) from error
    if not _ends(path, end):  # at a header that is damaged or cut, tarfile stops as it does at the end
        refused.append(Rejected(path.name, "bad", f"the archive is damaged at byte {end}: what follows is lost"))
    return places, refused


def _ends(path: Path, offset: int) -> bool:
    """Whether an archive ends there as it should: a block of zeros, and nothing but zeros after it."""
    with open(path, "rb") as file:
        file.seek(offset)
        first = data = file.read(tarfile.BLOCKSIZE)
        while data and not data.strip(b"\0"):
            data = file.read(1 << 20)
    return len(first) == tarfile.BLOCKSIZE and not data


def _problem(member: tarfile.TarInfo, total: int) -> str:
    """Why an archive member is not read, or nothing."""
    name = PurePosixPath(member.name)
    if not member.isreg() or member.issparse():
        return "a link, device or sparse file in an archive"
    if name.is_absolute() or ".." in name.parts or "\x00" in member.name:
        return "its name points outside the archive"
    if member.offset_data + member.size > total:
        return f"cut off: it ends at byte {member.offset_data + member.size} of {total}"
    return ""
