"""A folder on the node that keeps fetched files below a limit, shared by all processes of the node."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from shards.errors import DataError

FULL = (errno.ENOSPC, errno.EDQUOT)
_HEX = "[0-9a-f]" * 16
OURS = f"{_HEX}/{_HEX}-*"  # the names of a cache; whatever else lies in its folder is never touched
PART = ".part"  # a file being written: locked by its writer, as large as it will be; unlocked, its writer is dead


@dataclass(frozen=True)
class Cache:
    """Files in `folder`/foundation-shards, at most `limit_bytes` together; the least recently used go first. Picklable.

    A file appears under its name complete or not at all. One that is deleted while somebody reads it stays readable
    through the open descriptor, and occupies the disk as long. `folder` has to be on a file system with working flock:
    a disk of the node.
    """

    folder: Path
    limit_bytes: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder).absolute())

    @property
    def place(self) -> Path:
        """The folder of the cache's own that `folder` may share with anything else."""
        return self.folder / "foundation-shards"

    def path(self, root: str, name: str, sha256: str) -> Path:
        """Where the file `name` of the catalog at `root` is kept; its hash tells apart what changes under one name."""
        return Path(f"{self.place}/{_digest(root)}/{_digest(sha256)}-{name.rpartition('/')[2]}")

    def hit(self, path: Path, size: int) -> bool:
        """Whether the complete file is there, and note its use. Costs a stat and a utime."""
        try:
            if os.stat(path).st_size != size:
                return False
            os.utime(path)
        except OSError:  # not there, or `writing` explains
            return False
        return True

    @contextmanager
    def writing(
        self, path: Path, size: int, idle: Callable[[object], None], *, again: bool = False
    ) -> Iterator[BinaryIO | None]:
        """A file to write the `size` bytes of `path` into; it takes its name when the block ends without an exception.

        None when another process has brought it meanwhile, unless it is wanted `again`. `idle(sign)` is called to wait,
        with a value that changes while others make progress; what it raises ends the wait. Raises DataError: no room,
        folder not usable.
        """
        if size > self.limit_bytes:
            raise DataError(
                f"a file of {size:,} bytes does not fit a cache of {self.limit_bytes:,}",
                where=str(path),
                do="raise the limit of the cache to several times its largest file",
            )
        part = path.with_name(path.name + PART)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            while (descriptor := _own(part)) is None:
                idle(_sign(part))
            try:
                if not again and self.hit(path, size):
                    part.unlink()
                    yield None
                    return
                self._reserve(descriptor, size, idle)
                with open(descriptor, "wb", closefd=False) as file:
                    yield file
                os.fsync(descriptor)  # a power cut must not leave the name on a file of zeros
                part.rename(path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            finally:
                # A forked child may hold the descriptor too: closing alone would not let go of the lock.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
                os.close(descriptor)
        except OSError as error:
            raise self._explained(error, size) from error

    def _reserve(self, descriptor: int, size: int, idle: Callable[[object], None]) -> None:
        """Give the file of `descriptor` its size once there is room for it, so that others count with it."""
        os.ftruncate(descriptor, 0)  # whatever a dead writer left
        while True:
            gate = os.open(self.place / "lock", os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(gate, fcntl.LOCK_EX)
                if (sign := self._make_room(size)) is None:
                    os.ftruncate(descriptor, size)
                    return
            finally:
                fcntl.flock(gate, fcntl.LOCK_UN)
                os.close(gate)
            idle(sign)

    def _make_room(self, size: int) -> object:
        """Delete until `size` bytes more fit; otherwise a sign of the progress of the files that are being written."""
        kept: list[tuple[int, int, Path]] = []
        used = owed = 0  # owed: what the file system has still to find for files being written
        signs = []
        for path in self.place.glob(OURS):
            with suppress(FileNotFoundError):
                stat = path.stat()
                if path.suffix != PART:
                    kept.append((stat.st_mtime_ns, stat.st_size, path))
                elif (stale := _own(path, create=False)) is not None:
                    path.unlink()
                    fcntl.flock(stale, fcntl.LOCK_UN)
                    os.close(stale)
                    continue
                else:
                    owed += max(stat.st_size - 512 * stat.st_blocks, 0)
                    signs.append((path.name, stat.st_mtime_ns))
                used += stat.st_size
        for _, bytes_, path in sorted(kept):
            if used + size <= self.limit_bytes and size <= self._free() - owed:
                break
            path.unlink(missing_ok=True)
            used -= bytes_
        free = self._free() - owed
        if size > free:
            raise OSError(errno.ENOSPC, f"{max(free, 0):,} bytes free")
        return sorted(signs) if used + size > self.limit_bytes else None

    def _free(self) -> int:
        """Bytes; asked after each deletion, since a file that somebody has open gives none back."""
        return shutil.disk_usage(self.place).free

    def _explained(self, error: OSError, size: int) -> DataError:
        if error.errno in FULL:
            what = f"the disk of the cache is full: no room for a file of {size:,} bytes ({error.strerror})"
            do = "free space there, or give the cache a larger disk and a limit below what is free"
        elif error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            what, do = f"file locks do not work there ({error.strerror})", "put the cache on a disk of the node"
        else:
            what, do = f"the cache cannot be written: {error}", "choose a folder that this user may write"
        return DataError(what, where=str(self.folder), do=do)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _own(part: Path, *, create: bool = True) -> int | None:
    """A locked descriptor of the file at `part`; None when somebody else has it or it has just gone."""
    descriptor = os.open(part, os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The holder may have renamed or deleted it between open and lock.
        if os.path.samestat(os.fstat(descriptor), os.stat(part)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _sign(part: Path) -> object:
    try:
        return os.stat(part).st_mtime_ns
    except FileNotFoundError:
        return None
