"""Checkpoints: a folder is one if and only if it holds a COMMIT marker.

    checkpoints/
      samples-000000012800/   state.pt (weights_only)   manifest.json (bytes, sha256)   COMMIT
      latest                  the name of the newest one, for people; discovery looks for itself

A save writes under a temporary name, flushes every file to the disk and renames at the end, so that a power cut leaves
either the whole checkpoint or none. Only one process may save to a folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from pickle import UnpicklingError  # what torch.load raises when weights_only refuses a file; nothing is unpickled here
from typing import Any

import torch
from torch import Tensor

from foundation.errors import CheckpointError

FORMAT = 1
_PREFIX, _TEMPORARY = "samples-", ".tmp-"
_PLAIN = (type(None), bool, int, float, str, bytes, torch.Size, torch.dtype, torch.device)
log = logging.getLogger(__name__)


def save(folder: Path, state: Mapping[str, Any], position: int, keep: int = 3, pinned: Collection[int] = ()) -> Path:
    """Write the checkpoint of `position` (samples seen) and return its folder.

    Afterwards the newest `keep` checkpoints, those at `pinned` positions and this one remain. Raises CheckpointError
    when the state could not be read back or cannot be written; earlier checkpoints are untouched then.
    """
    _refuse_objects(state, "state")
    final = folder / f"{_PREFIX}{position:012d}"
    temporary = folder / f"{_TEMPORARY}{final.name}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_temporary(folder)  # before writing: an interrupted save may hold the space that this one needs
        temporary.mkdir()
        _write(temporary, state, position)
        if final.exists():
            final.rename(folder / f"{_TEMPORARY}replaced-{final.name}")
        temporary.rename(final)
        _sync(folder)
    except (OSError, RuntimeError) as error:  # torch's archive writer reports a full disk as a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise CheckpointError(
            f"the checkpoint at {position} samples could not be written: {getattr(cause, 'strerror', None) or cause}",
            where=str(final),
            do="free space or correct the permissions, then resume; earlier checkpoints are untouched",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    try:
        _tidy(folder, final, keep, pinned)
    except OSError as error:
        log.warning("old checkpoints in %s could not be removed: %s", folder, error)
    return final


def _write(folder: Path, state: Mapping[str, Any], position: int) -> None:
    """The three files of a checkpoint, COMMIT last, each on the disk before the next."""
    path = folder / "state.pt"
    with path.open("wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    manifest = {
        "format": FORMAT,
        "position": position,
        "bytes": path.stat().st_size,
        "sha256": _sha256(path),
        "torch": str(torch.__version__),
    }
    for name, text in (("manifest.json", json.dumps(manifest, indent=1)), ("COMMIT", str(position))):
        with (folder / name).open("w", encoding="utf-8") as lines:
            lines.write(text + "\n")
            lines.flush()
            os.fsync(lines.fileno())
    _sync(folder)


def _tidy(folder: Path, newest: Path, keep: int, pinned: Collection[int]) -> None:
    """Move the `latest` pointer and remove what retention does not keep."""
    pointer = folder / f"{_TEMPORARY}latest"
    pointer.write_text(newest.name + "\n", encoding="utf-8")
    pointer.replace(folder / "latest")
    valid = [path for path in _candidates(folder) if _flaw(path) is None]
    for path in valid[max(keep, 1) :]:
        if path != newest and _position(path) not in pinned:
            (path / "COMMIT").unlink()  # first, so that a half-removed checkpoint is none
            shutil.rmtree(path)
    _remove_temporary(folder)


def latest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest valid checkpoint of a run or checkpoints folder, and «name: reason» for every one skipped.

    Valid means committed, of a known format and of the recorded size; `load` compares the content as well.
    """
    try:
        folder = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
        skipped = [f"{path.name}: the save was interrupted" for path in sorted(folder.glob(f"{_TEMPORARY}{_PREFIX}*"))]
        for path in _candidates(folder):
            flaw = _flaw(path)
            if flaw is None:
                return path, skipped
            skipped.append(f"{path.name}: {flaw}")
    except OSError as error:
        raise _error(f"the checkpoints cannot be listed: {error.strerror or error}", folder) from error
    return None, skipped


def restore(folder: Path) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The newest checkpoint that can be read whole, its state, and «name: reason» for every one passed over.

    Without any checkpoint: (None, {}, reasons). Raises CheckpointError when there are committed ones and none is
    usable: starting anew over their run is the user's decision.
    """
    folder = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    skipped = latest(folder)[1] if folder.is_dir() else []
    committed = [path for path in _candidates(folder) if (path / "COMMIT").is_file()]
    for path in committed:
        try:
            return path, load(path), skipped
        except CheckpointError as error:
            line = f"{path.name}: {error.what}"
            skipped = [*(s for s in skipped if not s.startswith(f"{path.name}:")), line]
    if committed:
        raise CheckpointError(
            f"none of the {len(committed)} checkpoints can be used: {'; '.join(skipped)}",
            where=str(folder),
            do="repair or remove them; without them the run starts anew",
        )
    return None, {}, skipped


def load(path: Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """The state in a checkpoint; `path` is a run folder, a checkpoints folder (newest valid one) or one checkpoint.

    Raises CheckpointError when there is none, or it is unfinished, damaged, or of an unknown format.
    """
    try:
        if not path.name.startswith(_PREFIX):
            found, skipped = latest(path)
            if found is None:
                names = "; ".join(skipped)
                raise CheckpointError(
                    "there is no checkpoint" + f" (skipped {names})" * bool(names),
                    where=str(path.resolve()),
                    do="name a run folder; a run has its first checkpoint after train.checkpoint_every samples",
                )
            path = found
        flaw = _flaw(path)
        if flaw is None and _sha256(path / "state.pt") != _manifest(path)["sha256"]:
            flaw = "is damaged: the sha256 of state.pt differs from the manifest"
        if flaw is not None:
            raise _error(f"the checkpoint {flaw}", path)
        state = torch.load(path / "state.pt", map_location=map_location, weights_only=True)
    except OSError as error:
        raise _error(f"the checkpoint cannot be read: {error.strerror or error}", path) from error
    except (UnpicklingError, RuntimeError) as error:
        raise _error("state.pt does not hold a state of tensors and plain values", path) from error
    if not isinstance(state, dict):
        raise _error(f"state.pt holds {type(state).__name__}, not a state", path)
    return state


def check_model(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str = "") -> None:
    """Raise CheckpointError unless both state dicts have the same names and shapes; names the first few that differ."""
    shapes = [
        f"{name} {list(found[name].shape)}, not {list(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
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


def _error(what: str, path: Path) -> CheckpointError:
    return CheckpointError(what, where=str(path), do="take an earlier checkpoint, or start the run anew")


def _refuse_objects(value: object, path: str) -> None:
    """Fail at the first save, not at the resume a week later: weights_only reads tensors and plain values alone."""
    if isinstance(value, dict) and type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _refuse_objects(key, f"the key {key!r} of {path}")
            _refuse_objects(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        for index, item in enumerate(value):
            _refuse_objects(item, f"{path}.{index}")
    elif not isinstance(value, Tensor) and type(value) not in _PLAIN:
        raise CheckpointError(
            f"{path} is a {type(value).__module__}.{type(value).__qualname__}, which could not be read back",
            do="put only tensors, numbers, text, lists and dicts into a state",
        )


def _candidates(folder: Path) -> list[Path]:
    """Checkpoint folders, valid or not, newest first."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.is_dir() and path.name[len(_PREFIX) :].isdecimal()]
    return sorted(found, key=_position, reverse=True)


def _position(path: Path) -> int:
    return int(path.name[len(_PREFIX) :])


def _manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / "manifest.json").read_text(encoding="utf-8"))


def _flaw(path: Path) -> str | None:
    """Why a folder is no checkpoint, or None; reads no weights."""
    if not path.is_dir():
        return "does not exist"
    if not (path / "COMMIT").is_file():
        return "has no COMMIT marker: the save was interrupted"
    try:
        manifest = _manifest(path)
        version, size, _ = manifest["format"], manifest["bytes"], manifest["sha256"]
    except FileNotFoundError:
        return "has no manifest.json"
    except (ValueError, KeyError, TypeError):
        return "has an unreadable manifest.json"
    if version != FORMAT:
        return f"has the unknown format version {version}; this program reads {FORMAT}"
    state = path / "state.pt"
    if not state.is_file():
        return "is damaged: state.pt is missing"
    if state.stat().st_size != size:
        return f"is damaged: state.pt has {state.stat().st_size} bytes, not {size}"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """Flush a folder's list of names to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_temporary(folder: Path) -> None:
    for path in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)
