"""The files around the tensors of a checkpoint: what is committed, what is valid, what may go."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml

from foundation.errors import CheckpointError
from foundation.training.places import TEMPORARY, Folder, Location, Place, place
from shards.errors import DataError

FORMAT = 2
PREFIX = "samples-"
TENSORS, STATE = "tensors", "state"
PIN = "PIN"  # a file in a checkpoint that retention leaves alone
Facts = Mapping[str, Any]  # of a file: bytes and sha256
Failure = (OSError, DataError)  # of a folder, of an object store


def write(file: Place, text: str) -> dict[str, Any]:
    """Write a small file; its bytes and sha256."""
    data = text.encode()
    file.write([data])
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def commit(draft: Place, folder: Place, name: str, files: Mapping[str, Facts], score: Facts | None = None) -> None:
    """Write manifest and COMMIT, each on the disk before the next, and let the checkpoint appear in `folder`."""
    position = position_of(name)
    facts = {"format": FORMAT, "position": position, "files": dict(sorted(files.items())), "score": score}
    write(draft / "manifest.json", json.dumps({**facts, "torch": str(torch.__version__)}, indent=1) + "\n")
    write(draft / "COMMIT", f"{position}\n")
    folder.publish(draft, name)


def tidy(folder: Place, newest: str, keep: int, keep_every: int | None) -> None:
    """Move the `latest` pointer and remove what retention does not keep; a file PIN in a checkpoint keeps it.

    Positions need not be multiples of `keep_every`: the first checkpoint at or after each multiple is kept.
    """
    folder.point(newest)
    valid = [name for name in candidates(folder) if flaw(folder / name) is None]
    # Newest first, so that the oldest of each span is what remains: later saves cannot change it.
    milestones = {position_of(name) // keep_every: name for name in valid} if keep_every else {}
    milestones.pop(0, None)
    for name in valid[max(keep, 1) :]:
        if name not in (newest, *milestones.values()) and PIN not in (folder / name).names():
            (folder / name).remove()
    for stray in strays(folder / newest):
        (folder / newest / stray).remove()
    folder.clear()


def strays(path: Place) -> list[str]:
    """Folders and files of an earlier save of the same position, which the manifest no longer names."""
    used = {name.partition("/")[0] for name in manifest(path)["files"]}
    return [name for name in path.names() if name.startswith((f"{TENSORS}-", f"{STATE}-")) and name not in used]


def latest(location: Path | str) -> tuple[Location | None, list[str]]:
    """The newest valid checkpoint of a run or checkpoints folder, and «name: reason» for every one skipped.

    Valid means committed, of a known format and with files of the recorded sizes; `checkpoint.load` compares the
    content as well.
    """
    folder = place(location)
    try:
        folder = place_of(location)
        skipped = [f"{name}: the save was interrupted" for name in folder.interrupted()]
        for name in candidates(folder):
            reason = flaw(folder / name)
            if reason is None:
                return (folder / name).location, skipped
            skipped.append(f"{name}: {reason}")
    except Failure as error:
        raise unlisted(folder, error) from error
    return None, skipped


def recover(folder: Place) -> None:
    """Publish what was committed when its save was interrupted: only the name was missing."""
    for name in folder.interrupted():
        if flaw(folder / name) is None:
            folder.publish(folder / name, name.removeprefix(TEMPORARY))


def place_of(location: Path | str | Place) -> Place:
    """The checkpoints of a run folder, wherever its configuration puts them, or the folder itself."""
    folder = place(location)
    if not isinstance(folder, Folder):
        return folder
    with suppress(FileNotFoundError, NotADirectoryError, yaml.YAMLError):
        tree = yaml.safe_load((folder.path / "config.yaml").read_text(encoding="utf-8"))
        if isinstance(tree, dict) and (elsewhere := (tree.get("train") or {}).get("checkpoints")):
            return place(str(elsewhere))
    return folder / "checkpoints" if (folder.path / "checkpoints").is_dir() else folder


def candidates(folder: Place) -> list[str]:
    """Names of checkpoints, valid or not, newest first."""
    found = [name for name in folder.names() if name.startswith(PREFIX) and name[len(PREFIX) :].isdecimal()]
    return sorted(found, key=position_of, reverse=True)


def committed(folder: Place) -> list[str]:
    """Names of checkpoints with a COMMIT marker, newest first."""
    return [name for name in candidates(folder) if "COMMIT" in (folder / name).names()]


def position_of(name: str) -> int:
    """Samples seen, from the name of a checkpoint."""
    return int(name[len(PREFIX) :])


def manifest(path: Place) -> dict[str, Any]:
    """What `commit` wrote."""
    return json.loads((path / "manifest.json").read())


def flaw(path: Place) -> str | None:
    """Why this is no checkpoint, or None; reads no weights."""
    found = path.sizes()
    if "COMMIT" not in found:
        return "has no COMMIT marker: the save was interrupted" if path.exists() else "does not exist"
    if "manifest.json" not in found:
        return "has no manifest.json"
    try:
        facts = manifest(path)
        version, files = facts["format"], facts.get("files", {})
        sizes = {name: (int(file["bytes"]), str(file["sha256"]))[0] for name, file in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return "has an unreadable manifest.json"
    if version != FORMAT:
        age = "a newer" if isinstance(version, int) and version > FORMAT else "an older"
        return f"has format version {version}, of {age} program; this one reads {FORMAT}"
    # Names are those of `write`: a manifest that was tampered with names nothing outside of its folder.
    if not any(name.startswith(STATE) for name in sizes) or any({"..", ""} & set(name.split("/")) for name in sizes):
        return "has an unreadable manifest.json"
    for name, size in sizes.items():
        if name not in found:
            return f"is damaged: {name} is missing"
        if found[name] != size:
            return f"is damaged: {name} has {found[name]} bytes, not {size}"
    return None


def damage(path: Place, share: int = 0, shares: int = 1) -> str | None:
    """What differs from the manifest in this share of the files, read whole; None when nothing does."""
    for name, file in sorted(manifest(path)["files"].items())[share::shares]:
        if (path / name).digest() != file["sha256"]:
            return f"is damaged: the sha256 of {name} differs from the manifest"
    return None


def part(path: Place, kind: str) -> Place:
    """The file or folder of a checkpoint that holds its `kind`, STATE or TENSORS, under the name of the manifest."""
    names = sorted(name for name in manifest(path)["files"] if name.startswith(kind))
    if not names:
        raise unusable(f"the checkpoint holds no {kind}", path)
    return path / names[0].partition("/")[0]


def read_state(path: Place) -> dict[str, Any]:
    """The plain values of a checkpoint."""
    return json.loads(part(path, STATE).read())


def said(error: BaseException) -> str:
    """What an error says, without its number, type or advice."""
    return str(getattr(error, "strerror", None) or getattr(error, "what", None) or error)


def unlisted(folder: Place, error: BaseException) -> CheckpointError:
    """An error about a folder or URL that does not say what it holds."""
    what = f"the checkpoints cannot be listed: {said(error)}"
    return CheckpointError(what, where=str(folder), do="see whether it can be reached and read, then start again")


def unusable(what: str, path: Place) -> CheckpointError:
    """An error about a checkpoint that cannot be used."""
    return CheckpointError(what, where=str(path), do="take an earlier checkpoint, or start the run anew")
