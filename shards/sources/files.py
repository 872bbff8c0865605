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
from shards.schema import Rejected
from shards.store import Store, filesystem, redact

MAX_BYTES = 8 << 30  # of one file that is read whole


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
        """Archive members that are no plain files with a harmless name, each with the reason."""
        return self._scan[1]

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return self._places[name][1]

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
            what = f"cannot be copied: {redact(str(error))}"
            raise DataError(what, where=name, do="free space, or fetch it again") from error

    def _download(self, name: str, path: Path) -> None:
        fs, base = self._remote_root
        for wait in (1, 5, 25, None):
            try:
                fs.get_file(f"{base}/{name}", str(path))
                return
            except FileNotFoundError:
                raise
            except OSError:
                if wait is None:
                    raise
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
    def _scan(self) -> tuple[dict[str, tuple[int, int]], list[Rejected]]:
        """Name → (offset in its file, size), and what is refused."""
        if self.remote:
            fs, base = self._remote_root
            try:
                found = fs.find(base, detail=True)
            except OSError as error:
                where = redact(self.root)
                raise DataError(f"cannot be listed: {redact(str(error))}", where=where, do="check the URL") from error
            return {path[len(base) :].lstrip("/"): (0, int(info["size"])) for path, info in found.items()}, []
        root = Path(self.root)
        if root.is_dir():
            paths = (p for p in root.rglob("*") if p.is_file())
            return {p.relative_to(root).as_posix(): (0, p.stat().st_size) for p in paths}, []
        if self._is_tar:
            return _scan_tar(root)
        return {root.name: (0, root.stat().st_size)}, []

    @property
    def _places(self) -> dict[str, tuple[int, int]]:
        return self._scan[0]


def _scan_tar(path: Path) -> tuple[dict[str, tuple[int, int]], list[Rejected]]:
    places: dict[str, tuple[int, int]] = {}
    refused = []
    total = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isdir():
                    continue
                name = member.name.removeprefix("./")  # as `tar cf x.tar .` writes them
                if problem := _problem(member, total):
                    refused.append(Rejected(name, "bad", problem))
                    continue
                if name in places:
                    refused.append(Rejected(name, "bad", "a later member of the archive has the same name"))
                places[name] = (member.offset_data, member.size)
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise DataError(f"not a readable plain tar: {error}", where=str(path), do="fetch it again") from error
    return places, refused


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
