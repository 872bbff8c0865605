"""Scenes larger than memory: opened by their header, read one strip of tiles at a time, cut into tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np

from shards.errors import DataError
from shards.schema import Record, Rejected, image_shape
from shards.sources.base import Corpus, Item, Options, starts
from shards.sources.files import Files

TILE = 256  # when the user names none
MAX_STRIP_BYTES = 1 << 30  # of a strip of tiles, and of a block that the file stores in one piece
MAX_GROWTH = 5000  # pixels per byte of file: beyond it a file holds next to nothing, or is meant to fill the memory
# Lower edges in GHz of the bands that imaging radars use (IEEE 521, and P as radar people say).
_BANDS = ((0.3, "P"), (1.0, "L"), (2.0, "S"), (4.0, "C"), (8.0, "X"), (12.0, "Ku"), (18.0, "K"), (27.0, "Ka"))


@dataclass(frozen=True)
class Scene:
    """An open scene of height x width pixels, `pixel_bytes` each (all channels), with what its file says of it.

    `rows(top, bottom)` reads full rows: pixels [..., rows, width] of a schema dtype (int16: [..., rows, width, 2]) and
    bool [rows, width], where the scene was imaged, or None where it says nothing about that.
    """

    height: int
    width: int
    pixel_bytes: int
    columns: Mapping[str, Any]
    rows: Callable[[int, int], tuple[np.ndarray, np.ndarray | None]]


class Scenes(Corpus):
    """Base of the kinds that read large scenes; tiles of 256 pixels where the option `tile` is not given.

    An item is one row of tiles of one scene (its `meta["top"]`), so that processes share a scene; several items have
    the same name. Where each look at a file costs a copy of it (a tar, a bucket), an item is a whole scene.
    """

    suffixes: ClassVar[tuple[str, ...]]

    def __init__(self, files: Files, options: Options | None = None) -> None:
        super().__init__(files, options)
        self.tile_side = self.options.tile or TILE
        starts(self.tile_side, self.tile_side, self.options.overlap)  # refuses a wrong overlap before any work
        root = Path(files.root)
        self.in_place = not files.remote and (root.is_dir() or root.suffix.lower() in self.suffixes)

    def open(self, path: Path, name: str) -> AbstractContextManager[Scene]:
        """The scene in the file `path`, which is `name` inside the source; may raise anything on damaged bytes."""
        raise NotImplementedError

    def is_scene(self, name: str) -> bool:
        """Whether a path names a scene of this kind; other files of a product are passed over."""
        return PurePosixPath(name).suffix.lower() in self.suffixes

    def reads(self, name: str) -> tuple[str, ...]:
        """The side files that `open` reads for a scene, as far as they are there."""
        return ()

    def items(self) -> Iterator[Item | Rejected]:
        """One item per row of tiles of each scene; a scene whose header cannot be read as Rejected."""
        for name in filter(self.wanted, self.files.names):
            if not self.is_scene(name):
                continue
            if not self.in_place:
                yield Item(name, reads=self.reads(name))
                continue
            try:
                with self._opened(name) as scene:
                    tops = starts(scene.height, self.tile_side, self.options.overlap)
            except DataError as error:
                yield Rejected(name, "bad", error.what)
                continue
            yield from (Item(name, meta={"top": top}, reads=self.reads(name)) for top in tops)

    def load(self, item: Item) -> Iterator[Record | Rejected]:
        """The tiles of one item; a row of tiles that cannot be read as one Rejected."""
        try:
            with self._opened(item.name) as scene:
                yield from self._tiles(scene, item)
        except DataError as error:
            yield Rejected(item.name, "bad", error.what)

    def _tiles(self, scene: Scene, item: Item) -> Iterator[Record | Rejected]:
        if min(scene.height, scene.width) < self.options.min_side:
            if not item.meta.get("top"):  # said once, not for every row of tiles
                reason = f"{scene.height}x{scene.width} is below min_side {self.options.min_side}"
                yield Rejected(item.name, "small", reason)
            return
        tile, overlap = self.tile_side, self.options.overlap
        described = replace(item, meta={**item.meta, **scene.columns})
        for top in [item.meta["top"]] if "top" in item.meta else starts(scene.height, tile, overlap):
            try:
                with explained(item.name):
                    pixels, valid = scene.rows(top, min(top + tile, scene.height))
            except DataError as error:
                yield Rejected(f"{item.name}@{top}", "bad", error.what)
                continue
            for left in starts(scene.width, tile, overlap):
                window = slice(left, left + tile)
                part = pixels[..., window, :] if pixels.dtype == np.int16 else pixels[..., window]
                yield self.tile(part, described, top, left, None if valid is None else valid[:, window])

    @contextmanager
    def _opened(self, name: str) -> Iterator[Scene]:
        """An open scene whose strips fit into memory; raises DataError."""
        with ExitStack() as stack:
            with explained(name):
                scene = stack.enter_context(self.open(stack.enter_context(self.files.local(name)), name))
            rows = min(self.tile_side, scene.height)
            check_block(rows * scene.width * scene.pixel_bytes, f"a strip of {rows}x{scene.width} pixels", name)
            if scene.height * scene.width > MAX_GROWTH * self.files.size(name):
                what = f"{scene.height}x{scene.width} pixels in {self.files.size(name):,} bytes"
                raise DataError(f"nearly nothing is stored: {what}", where=name, do="exclude it")
            yield scene


def check_block(size: int, what: str, name: str) -> None:
    """Raise DataError when one piece of a scene, which is read whole, is too large for it."""
    if size > MAX_STRIP_BYTES:
        raise DataError(
            f"{what} takes {size:,} bytes, more than {MAX_STRIP_BYTES:,}", where=name, do="use smaller tiles or blocks"
        )


def inside_border(pixels: np.ndarray) -> np.ndarray:
    """Where a strip was imaged, bool [H, W], in products that fill the outside with zeros and declare no mask.

    In each row what lies between its first and last pixel that is not zero: a dark pixel inside stays valid, and zeros
    between the bursts of an interferometric mode are whole rows.
    """
    filled = pixels.any(axis=-1) if pixels.dtype == np.int16 else pixels != 0
    rows = np.logical_or.reduce(np.reshape(filled, (-1, *image_shape(pixels))), axis=0)
    from_left, from_right = (np.logical_or.accumulate(side, axis=1) for side in (rows, rows[:, ::-1]))
    return from_left & from_right[:, ::-1]


def radar_band(hertz: float | None) -> str | None:
    """The letter of the band of a carrier frequency (IEEE 521), None when there is none."""
    letters = [letter for edge, letter in _BANDS if hertz and edge <= hertz / 1e9 < 40.0]
    return letters[-1] if letters else None


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn whatever a library raises on damaged bytes into DataError; it may be any class of exception."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:
        detail = " ".join(str(error).split())[:300]
        what = f"truncated or damaged: {type(error).__name__}: {detail}"
        raise DataError(what, where=name, do="fetch it again or exclude it") from error
