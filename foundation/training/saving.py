"""Checkpoints beside the training: it stands still for a copy, the writing happens in a thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

from torch import Tensor

from foundation.errors import StorageError
from foundation.files import write_whole
from foundation.training import checkpoint
from foundation.training.committed import Failure, manifest
from foundation.training.pins import Score
from foundation.training.places import Location, place
from foundation.training.ranks import Ranks

log = logging.getLogger(__name__)
PATIENCE = 300.0  # seconds


class Saver:
    """Saves to a folder or URL, one checkpoint at a time; all `ranks` call the same methods in the same order.

    `ranks` must be a group of its own: its collectives happen in the thread while the training has others.
    """

    def __init__(
        self,
        location: Path | str,
        ranks: Ranks,
        keep: int,
        keep_every: int | None,
        background: bool,
        newest: Path | None = None,
        event: Callable[..., None] | None = None,
    ) -> None:
        """`newest`: file for the position of the newest checkpoint, for those who watch a run and see no bucket.

        `event`: `Tracker.event`, told of every checkpoint that is there, by the thread that wrote it.
        """
        self.location, self.ranks, self.background, self.newest = location, ranks, background, newest
        self.event = event
        self.keep, self.keep_every = keep, keep_every
        self._thread: Thread | None = None
        self._failure: BaseException | None = None

    def save(
        self, copies: Mapping[str, Tensor], state: Mapping[str, Any], position: int, score: Score | None = None
    ) -> None:
        """Begin to write these `copies`, which must not change any more; see checkpoint.save, also for the `score`.

        Waits for the save before. Raises what that one met, or, in the foreground, this one.
        """
        self.wait()

        def write() -> None:
            retention, began = (self.keep, self.keep_every), time.perf_counter()
            try:
                final = checkpoint.save(self.location, copies, state, position, *retention, self.ranks, score)
                self._tell(position, final, time.perf_counter() - began, score)
            except BaseException as error:
                self._failure = error

        # A daemon: when the training fails, other ranks may never come to the collectives of this save.
        self._thread = Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()
        if not self.background:
            self.wait()

    def _tell(self, position: int, final: Location, seconds: float, score: Score | None) -> None:
        """The file and the event are for others: without them the checkpoint counts all the same."""
        if self.event and self.ranks.rank == 0:
            facts: dict[str, Any] = {"seconds": round(seconds, 3)} | ({"score": score.value} if score else {})
            with suppress(*Failure):
                facts["bytes"] = sum(file["bytes"] for file in manifest(place(final))["files"].values())
            self.event("checkpoint", position, **facts)
        if self.newest and self.ranks.rank == 0:
            try:
                write_whole(self.newest, f"{position}\n")
            except StorageError as error:
                log.warning("%s", error)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the last save; after an error of the training only so long, and without another error."""
        if kind is None:
            self.wait()
        elif self._thread:
            self._thread.join(PATIENCE)  # the other ranks are in it, too, whatever has happened beside it
            if self._failure is not None:
                log.warning("beside that, the last checkpoint was not written: %s", self._failure)

    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Until the last save has ended. Raises what it met, once."""
        if self._thread:
            self._thread.join()
        self._thread, failure, self._failure = None, self._failure, None
        if failure is not None:
            raise failure
