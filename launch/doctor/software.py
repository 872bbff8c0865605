"""Versions, the code that runs, and whose packages answer to our names."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch.doctor.rows import ONE_IMAGE, Frozen, Place, Row, Status, each, equal
from launch.freeze import PACKAGES, state

PROJECT = "sar-foundation"
NEEDED = ("torch", "numpy", PROJECT)
OPTIONAL = ("accelerate", "deepspeed", "triton", "xformers", "flash-attn", "flash-attn-4", "torchao")
ROOT = Path(__file__).resolve().parents[2]


class Software(Frozen):
    """What a process would run."""

    versions: dict[str, str]
    """Python and the packages that must be equal everywhere; "not installed" for a project that is only on the path."""
    optional: dict[str, str]
    """Packages a run can do without, those that are there."""
    code: str
    """Digest of all source files of the project."""
    commit: str
    """Commit of the checkout, "with changes" where there are some; "no checkout" for frozen or installed code."""
    root: str
    """The folder that the project's packages should lie in."""
    folders: dict[str, str]
    """Where the project's packages are found; empty: nowhere."""
    rivals: dict[str, str]
    """Other distributions that are named like one of the packages, with their version."""


def look(root: Path = ROOT) -> Software:
    """The facts of this process."""
    versions = {"python": platform.python_version()} | {name: _version(name) or "not installed" for name in NEEDED}
    commit = state()
    return Software(
        versions=versions,
        optional={name: version for name in OPTIONAL if (version := _version(name))},
        code=digest(root),
        commit=commit.commit[:12] + " with changes" * commit.dirty if commit.commit else "no checkout",
        root=str(root),
        folders={name: _folder(name) for name in PACKAGES},
        rivals={name: version for name in PACKAGES if (version := _version(name))},
    )


def digest(root: Path) -> str:
    """The first 12 hex digits of the sha256 over names and bytes of the project's Python files."""
    found = hashlib.sha256()
    for file in sorted(file for name in PACKAGES for file in (root / name).rglob("*.py")):
        found.update(f"{file.relative_to(root)}\0{file.stat().st_size}\0".encode())
        found.update(file.read_bytes())
    return found.hexdigest()[:12]


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _folder(package: str) -> str:
    """Where an import would find the package, without importing it."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    return str(Path(folders[0]).resolve()) if folders else ""


def rows(places: Sequence[Place], facts: Sequence[Software]) -> Iterator[Row]:
    """Whose packages, which versions, which code."""
    yield equal("code in", places, [f.root for f in facts], "give all nodes the same PYTHONPATH", Status.warning)
    yield from _packages(places, facts)
    found = {name: [fact.versions.get(name, "unknown") for fact in facts] for name in facts[0].versions}
    rows = {name: equal(f"version of {name}", places, values, ONE_IMAGE) for name, values in found.items()}
    if same := [f"{name} {row.found}" for name, row in rows.items() if row.status is Status.ok]:
        yield Row("versions", Status.ok, ", ".join(same))
    yield from (row for row in rows.values() if row.status is not Status.ok)
    do = "start all processes from one checkout; `foundation submit` freezes the code of a run"
    yield equal("commit", places, [fact.commit for fact in facts], do)
    yield equal("source files", places, [fact.code for fact in facts], do)
    yield _optional(places, facts)


def _packages(places: Sequence[Place], facts: Sequence[Software]) -> Iterator[Row]:
    verdicts = {name: [_verdict(name, fact) for fact in facts] for name in PACKAGES}
    if bad := [found for found in verdicts.values() if any(status is not Status.ok for status, *_ in found)]:
        for found in bad:
            yield from (row for row in each("packages", places, found) if row.status is not Status.ok)
    else:
        yield Row("packages", Status.ok, f"{', '.join(PACKAGES)} are those of this project")


def _verdict(name: str, fact: Software) -> tuple[Status, str, str]:
    """Whether an import of this name gives our package there."""
    folder, rival, ours = fact.folders[name], fact.rivals.get(name), Path(fact.root) / name
    own = f"give this project an environment of its own: pip install -e {fact.root}"
    do = f"pip uninstall {name}, or {own}" if rival else own
    if not folder:
        return Status.failed, f"`{name}` is found nowhere", do
    if Path(folder) != ours:
        if not rival:
            do = f"take {Path(folder).parent} off PYTHONPATH, or {own}"
        return Status.failed, f"`{name}` is {folder}, not {ours}", do
    if rival:
        return Status.warning, f"a distribution {name} {rival} is installed too, and may win elsewhere", do
    return Status.ok, "", ""


def _optional(places: Sequence[Place], facts: Sequence[Software]) -> Row:
    values = [", ".join(f"{name} {version}" for name, version in f.optional.items()) or "none" for f in facts]
    row = equal("optional packages", places, values, ONE_IMAGE, Status.warning)
    if row.status is not Status.ok:
        return row
    absent = [name for name in OPTIONAL if name not in facts[0].optional]
    found = f"{row.found}; not installed: {', '.join(absent)}" if absent else row.found
    return row._replace(status=Status.note, found=found)
