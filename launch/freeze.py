"""The code of a run, copied beside it: what runs tomorrow is what was submitted today."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from foundation.errors import LaunchError

PACKAGES = ("foundation", "shards", "kernels", "launch")


class Code(NamedTuple):
    """Where the code came from; no commit: it is not a checkout."""

    commit: str | None
    dirty: bool


def freeze(target: Path) -> Code:
    """Copy the packages into `target`: the files git knows or does not ignore, or else all but caches."""
    for name in PACKAGES:
        source = _folder(name)
        for file in _files(source):
            copy = target / name / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, copy)
    return state()


def state() -> Code:
    """The commit of the code that runs, and whether its files differ from it."""
    root = _folder(PACKAGES[0]).parent
    if not _git(root, "ls-files", "--", PACKAGES[0]):
        return Code(None, False)
    changed = _git(root, "status", "--porcelain", "--", *PACKAGES)
    return Code((_git(root, "rev-parse", "HEAD") or "").strip() or None, bool(changed))


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise LaunchError(f"the package {package} is not installed", where=package, do="install this project again")
    return Path(spec.submodule_search_locations[0]).resolve()


def _files(folder: Path) -> list[Path]:
    listed = _git(folder, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", ".")
    if listed:  # a deleted file is still listed until the deletion is committed
        return [file for name in listed.split("\0") if name and (file := folder / name).is_file()]
    return [file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts]


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, None when there is no git or no checkout."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None
