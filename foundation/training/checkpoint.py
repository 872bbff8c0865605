"""Checkpoints: a folder is one if and only if it holds a COMMIT marker.

    checkpoints/
      samples-000000012800/
        tensors/*.safetensors   the pieces that each process holds
        tensors/index.json      where the pieces of every tensor are, and their places in the whole
        state.json              plain values: position, configuration, fingerprint, ...
        manifest.json           format, position, bytes and sha256 of every file, score by the online probe
        COMMIT
      latest                    the name of the newest one, for people; discovery looks for itself

In a folder a save writes under a temporary name, flushes every file to the disk and renames at the end, so that a power
cut leaves either the whole checkpoint or none. In an object store (any URL of fsspec) COMMIT is the last object; there
the names of tensors and state carry a random mark, so that saving a position again disturbs nothing. All processes of a
run save together, into a folder that they share; only one run may save to a folder. Any number of processes reads what
any other number has written.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from foundation.errors import CheckpointError
from foundation.models.initialise import Given
from foundation.training.committed import (
    PREFIX,
    STATE,
    TENSORS,
    Failure,
    commit,
    committed,
    damage,
    flaw,
    latest,
    part,
    place_of,
    position_of,
    read_state,
    recover,
    said,
    tidy,
    unlisted,
    unusable,
    write,
)
from foundation.training.pieces import Reader, Writer
from foundation.training.pins import Score, best, is_best, settle, write_pin
from foundation.training.places import Location, Place, place
from foundation.training.ranks import ALONE, OtherRankError, Ranks, everywhere, together
from shards.errors import DataError

__all__ = ["best", "check_tensors", "latest", "lend", "load", "read", "resolve", "restore", "save", "shapes"]

log = logging.getLogger(__name__)
_UNREADABLE = (*Failure, ValueError, RuntimeError, MemoryError, OverflowError, CheckpointException)
# Not around each save: filters belong to the whole process, and saves happen in a thread.
warnings.filterwarnings("ignore", r"torch\.distributed is disabled, unavailable or uninitialized", UserWarning)
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.checkpoint")


def save(
    location: Path | str,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    position: int,
    keep: int = 3,
    keep_every: int | None = None,
    ranks: Ranks = ALONE,
    score: Score | None = None,
) -> Location:
    """Write the checkpoint of `position` (samples seen) below a folder or URL, all `ranks` together; returns where.

    `tensors` are plain (equal on all ranks) or DTensors; `state` holds JSON values. Afterwards the newest `keep`
    checkpoints, the first at or after each multiple of `keep_every` samples, those with a file PIN and this one
    remain. With a `score` (of rank 0) that is the best so far this one is pinned, instead of the one that was. Raises
    CheckpointError on every rank when one of them cannot write; earlier checkpoints are untouched then.
    """
    first, folder, name = ranks.rank == 0, place(location), f"{PREFIX}{position:012d}"
    leads = False
    try:
        with _explained(position, folder / name, ranks):
            leads = everywhere(ranks, lambda: first and score is not None and is_best(folder, name, score))
            draft, mark = together(ranks, lambda: _begin(folder, name, state) if first else ("", ""))[0]
            written = _write(tensors, folder / draft / f"{TENSORS}{mark}", ranks)
            everyones = ranks.gather({f"{TENSORS}{mark}/{file}": facts for file, facts in written.items()})

            def finish() -> None:
                files = {file: facts for each in everyones for file, facts in each.items()}
                files[f"{STATE}{mark}.json"] = write(folder / draft / f"{STATE}{mark}.json", _text(state))
                if leads and score:
                    write_pin(folder / draft, score)
                commit(folder / draft, folder, name, files, score.facts() if score else None)

            everywhere(ranks, lambda: finish() if first else None)
    except BaseException:
        if first:
            with suppress(*Failure):
                recover(folder)  # the error may have come after the commit
                folder.clear()
        raise
    if first:
        try:
            settle(folder, name)
            tidy(folder, name, keep, keep_every)
        except Failure as error:
            log.warning("old checkpoints in %s could not be removed: %s", folder, said(error))
    return (folder / name).location


@contextmanager
def _explained(position: int, final: Place, ranks: Ranks) -> Iterator[None]:
    try:
        yield
    except (OSError, OtherRankError, DataError, RuntimeError, CheckpointException) as error:
        cause: BaseException = error
        who = ""
        if isinstance(error, CheckpointException):  # one error per rank that failed
            rank, (cause, _) = next(iter(error.failures.items()))
            who = f"rank {rank}: " if ranks.size > 1 else ""
            if not isinstance(cause, Exception):  # a request to stop is none of these
                raise cause from None
        advice = f"{cause.do}; then resume" if isinstance(cause, DataError) else ""
        raise CheckpointError(
            f"the checkpoint at {position} samples could not be written: {who}{said(cause)}",
            where=str(final),
            do=(advice or "free space or correct the permissions, then resume") + "; earlier checkpoints are untouched",
        ) from error


def _begin(folder: Place, name: str, state: Mapping[str, Any]) -> tuple[str, str]:
    """Make room for a new checkpoint: the name of the folder to write into, and the mark of its files."""
    _text(state)  # before anything is touched
    recover(folder)
    draft, mark = folder.begin(name)
    return draft.name, mark


def _text(state: Mapping[str, Any]) -> str:
    """The plain values as JSON. Raises CheckpointError for values that have no place there."""
    try:
        return json.dumps(dict(state), indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:  # at the first save, not at the resume a week later
        raise CheckpointError(
            f"the state could not be read back: {error}", do="put only JSON values into it"
        ) from error


def _write(tensors: Mapping[str, Tensor], folder: Place, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Write the pieces that this rank holds; bytes and sha256 of the files it wrote."""
    writer = Writer(folder)
    state_dict_saver.save(dict(tensors), storage_writer=writer, process_group=ranks.group, no_dist=ranks.size == 1)
    return writer.files


def restore(
    location: Path | str, ranks: Ranks = ALONE, at_most: int | None = None
) -> tuple[Location | None, dict[str, Any], list[str]]:
    """The newest checkpoint that is what was saved, its plain values, and «name: reason» for those passed over.

    With `at_most` those of more samples are not looked at.
    The ranks share the checking of the content. Without any checkpoint: (None, {}, reasons). Raises CheckpointError
    when there are committed ones and none is usable: starting anew over their run is the user's decision.
    """
    first, folder = ranks.rank == 0, place_of(location)
    # The list of one rank for all: disks may show other ranks other files.
    names, skipped = together(ranks, lambda: _listed(folder) if first else ([], []))[0]
    names = [name for name in names if at_most is None or position_of(name) <= at_most]
    for name in names:
        path = folder / name
        reason = next(filter(None, ranks.gather(_reason(path, ranks))), None)
        if reason is None:
            return path.location, together(ranks, partial(_values, path, first))[0], skipped
        skipped = [*(s for s in skipped if not s.startswith(f"{name}:")), f"{name}: the checkpoint {reason}"]
    if names:
        raise CheckpointError(
            f"none of the {len(names)} checkpoints can be used: {'; '.join(skipped)}",
            where=str(folder),
            do="repair or remove them; without them the run starts anew",
        )
    return None, {}, skipped


def _listed(folder: Place) -> tuple[list[str], list[str]]:
    """Committed checkpoints, newest first, and what `latest` has to say of the folder."""
    try:
        with suppress(PermissionError):
            recover(folder)
        return committed(folder), latest(folder.location)[1]
    except Failure as error:
        raise unlisted(folder, error) from error


def _values(path: Place, first: bool) -> dict[str, Any]:
    """The plain values, which the first rank reads for all."""
    return read_state(path) if first else {}


def _reason(path: Place, ranks: Ranks) -> str | None:
    """Why a checkpoint cannot be used, as far as this rank can see: it reads its share of the content."""
    try:
        return flaw(path) or damage(path, ranks.rank, ranks.size)
    except Failure as error:
        return f"cannot be read: {said(error)}"


def read(location: Path | str, tensors: Mapping[str, Tensor], ranks: Ranks = ALONE) -> None:
    """Fill these tensors, plain or DTensors, from a checkpoint, whatever processes wrote it.

    Raises CheckpointError, before any is changed, when the checkpoint has other names or shapes.
    """
    path = place(location)

    def check() -> None:
        check_tensors({name: facts.size for name, facts in _found(path).items()}, shapes(tensors), where=str(path))

    everywhere(ranks, check)
    try:
        _fill(path, tensors, ranks)
    except (OSError, DataError, RuntimeError, ValueError, CheckpointException) as error:
        raise unusable(f"the tensors cannot be read: {said(error)}", path) from error


def _found(path: Place) -> dict[str, TensorStorageMetadata]:
    """Shape and dtype of every tensor in a checkpoint. Raises CheckpointError."""
    try:
        facts = Reader(part(path, TENSORS)).read_metadata().state_dict_metadata
    except (*Failure, ValueError, LookupError, TypeError, AttributeError) as error:
        raise unusable(f"the tensors cannot be read: {said(error)}", path) from error
    return {name: each for name, each in facts.items() if isinstance(each, TensorStorageMetadata)}


def _fill(path: Place, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    reader = Reader(part(path, TENSORS))
    state_dict_loader.load(dict(tensors), storage_reader=reader, process_group=ranks.group, no_dist=ranks.size == 1)


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Name → shape."""
    return {name: tensor.shape for name, tensor in tensors.items()}


def resolve(location: Path | str, by_probe: bool = False) -> Location:
    """The one checkpoint that `location` names: itself, or the newest valid one or the one that the probe found best.

    What reads several times resolves once: a run that goes on may commit another in between. Raises CheckpointError.
    """
    return best(location) if by_probe else _newest(place(location)).location


def load(location: Path | str, prefix: str | None = "") -> dict[str, Any]:
    """The plain values of a checkpoint and its tensors, whole and on the CPU, as `tensors`: {name: Tensor}.

    `location` is a run folder, a folder or URL of checkpoints (newest valid one) or one checkpoint. Only tensors whose
    name begins with `prefix` are read, without it (None: none at all). Raises CheckpointError when there is no
    checkpoint, or it is unfinished, damaged, or of an unknown format.
    """
    path = place(location)
    try:
        path = _newest(path)
        _check(path)
        state = read_state(path)
        if prefix is None:
            return state
        wanted = {name: facts for name, facts in _found(path).items() if name.startswith(prefix)}
        tensors = {name: torch.empty(facts.size, dtype=facts.properties.dtype) for name, facts in wanted.items()}
        _fill(path, tensors, ALONE)
    except _UNREADABLE as error:
        raise unusable(f"the checkpoint cannot be read: {said(error)}", path) from error
    return {**state, "tensors": {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}}


def lend(location: Path | str, prefix: str, ranks: Ranks = ALONE) -> tuple[dict[str, Any], dict[str, Given]]:
    """`load` by several ranks, of tensors that are read one at a time, when they are needed.

    All take the checkpoint that the first one finds, and share the check of its content.
    """
    path = place(location)
    try:
        path = place(together(ranks, lambda: _newest(path).location if ranks.rank == 0 else "")[0])
        _check(path, ranks)
        state, found = read_state(path), _found(path)
    except _UNREADABLE as error:
        raise unusable(f"the checkpoint cannot be read: {said(error)}", path) from error

    def one(name: str, facts: TensorStorageMetadata) -> Tensor:
        tensor = torch.empty(facts.size, dtype=facts.properties.dtype)
        try:
            _fill(path, {name: tensor}, ALONE)
        except _UNREADABLE as error:
            raise unusable(f"{name} cannot be read: {said(error)}", path) from error
        return tensor

    wanted = {name: facts for name, facts in found.items() if name.startswith(prefix)}
    return state, {n.removeprefix(prefix): Given(facts.size, partial(one, n, facts)) for n, facts in wanted.items()}


def _newest(path: Place) -> Place:
    """The checkpoint that a path names, the newest valid one where it holds several. Raises CheckpointError."""
    if path.name.startswith(PREFIX):
        return path
    location = path.location
    found, skipped = latest(location)
    if found is None:
        names = "; ".join(skipped)
        raise CheckpointError(
            "there is no checkpoint" + f" (skipped {names})" * bool(names),
            where=str(location.resolve()) if isinstance(location, Path) else str(path),
            do="name a run folder; a run has its first checkpoint after train.checkpoint_every samples",
        )
    return place(found)


def _check(path: Place, ranks: Ranks = ALONE) -> None:
    """Raise CheckpointError for a checkpoint that is unfinished or damaged, as far as this rank's share shows."""
    if reason := flaw(path) or damage(path, ranks.rank, ranks.size):
        raise unusable(f"the checkpoint {reason}", path)


def check_tensors(found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size], where: str = "") -> None:
    """Raise CheckpointError unless both have the same names and shapes; names the first few that differ."""
    shapes = [
        f"{name} {list(found[name])}, not {list(expected[name])}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    lists = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": shapes,
    }
    wrong = [
        f"{len(names)} {kind}: " + ", ".join(names[:3]) + ", ..." * (len(names) > 3)
        for kind, names in lists.items()
        if names
    ]
    if wrong:
        raise CheckpointError(
            "the checkpoint is of another model; " + "; ".join(wrong),
            where=where,
            do="use the configuration of that checkpoint's run, or another checkpoint",
        )
