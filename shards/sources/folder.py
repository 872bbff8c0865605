"""The generic source: a folder or a tar of images in ImageFolder layout (the parent folder names the class).

A tar is read in place and its member names are only text: nothing is ever extracted. Order is by name.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import numpy as np

from shards.errors import DataError
from shards.formats import IMAGE_SUFFIXES, SIDE_SUFFIXES, decode
from shards.schema import Record, Rejected


def read(
    path: Path,
    *,
    labels: bool = True,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    tile: int | None = None,
    min_std: float = 0.0,
    min_side: int = 0,
) -> Iterator[Record | Rejected]:
    """Every image under `path` (or its tiles), in order of name; what cannot be used comes as Rejected.

    `include` and `exclude` are globs over the path inside the source (`*` also matches `/`). An image in no folder has
    no class. Side files (csv, txt, json, xml, md) and hidden files are passed over. Chips with a side below `min_side`
    are rejected. Images larger than `tile` are cut into tile × tile pieces, the last row and column aligned to the
    border; a tile is flat, and rejected, when std < min_std · mean or when it is all zero. Speckle alone has
    std / mean = 0.52 (single look, amplitude) or less, so 0.6 keeps the tiles that hold more than sea. Raises DataError
    when `path` cannot be read at all.
    """
    for name, load in _files(path):
        if not _wanted(name, include, exclude):
            continue
        if PurePosixPath(name).suffix.lower() not in IMAGE_SUFFIXES:
            yield Rejected(name, "bad", "not an image format that is read here (exclude it, or convert it)")
            continue
        try:
            pixels = decode(load(), name)
        except DataError as error:
            yield Rejected(name, "bad", error.what)
            continue
        if min(pixels.shape) < min_side:
            yield Rejected(name, "small", f"{pixels.shape[0]}x{pixels.shape[1]} is below min_side {min_side}")
            continue
        label = PurePosixPath(name).parent.name or None if labels else None
        if tile is None or max(pixels.shape) <= tile:
            yield Record(pixels, name, label, {"file": name})
            continue
        yield from _tiles(pixels, name, label, tile, min_std)


def _tiles(pixels: np.ndarray, name: str, label: str | None, tile: int, min_std: float) -> Iterator[Record | Rejected]:
    """The tiles of a scene, flat ones as Rejected."""
    for top in _starts(pixels.shape[0], tile):
        for left in _starts(pixels.shape[1], tile):
            part = pixels[top : top + tile, left : left + tile]
            key, mean, std = f"{name}@{top},{left}", float(part.mean()), float(part.std())
            if mean == 0 or std < min_std * mean:
                yield Rejected(key, "flat", f"std {std:.4g}, mean {mean:.4g}, min_std {min_std}")
            else:
                yield Record(np.ascontiguousarray(part), key, label, {"file": name, "top": top, "left": left})


def _starts(length: int, tile: int) -> list[int]:
    """Where tiles begin along one side."""
    starts = list(range(0, max(length - tile, 0) + 1, tile))
    return starts if starts[-1] + tile >= length else [*starts, length - tile]


def _wanted(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    path = PurePosixPath(name)
    if path.suffix.lower() in SIDE_SUFFIXES or any(part.startswith(".") for part in path.parts):
        return False
    chosen = not include or any(fnmatchcase(name, pattern) for pattern in include)
    return chosen and not any(fnmatchcase(name, pattern) for pattern in exclude)


def _files(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """(name, loader of its bytes) for every file of a folder or a tar, sorted by name."""
    if path.is_dir():
        found = sorted((p.relative_to(path).as_posix(), p) for p in path.rglob("*") if p.is_file())
        yield from ((name, p.read_bytes) for name, p in found)
    elif path.is_file():
        try:
            with tarfile.open(path, "r:") as archive:
                members = sorted((m for m in archive if m.isfile()), key=lambda m: m.name)
                yield from ((m.name, lambda m=m: _member(archive, m)) for m in members)
        except tarfile.TarError as error:
            raise DataError(f"not a readable plain tar: {error}", where=str(path), do="fetch it again") from error
    else:
        raise DataError("no such folder or tar", where=str(path), do="check the path of the source")


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None  # only regular members are asked for
    return file.read()
