"""What packing leaves out: the list `rejected.jsonl`, and the errors for bad files and for a source without images."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from shards.errors import DataError
from shards.schema import Rejected, canonical_json

REJECTED = "rejected.jsonl"
_CURES = {
    "small": "lower --min-side",
    "flat": "lower --min-std or raise --max-nodata",
    "bad": "see the reasons above",
    "other": "choose other options of this kind, see foundation shards sources KIND",
}


def reasons(rejected: Sequence[Rejected]) -> Counter[str]:
    """Reasons with their number of files; numbers in them, which differ from file to file, become #."""
    return Counter(f"{r.kind}: {re.sub(r'[0-9][0-9.,]*(?<![.,])', '#', r.reason)}" for r in rejected)


def refuse_bad(rejected: Mapping[str, Sequence[Rejected]], samples: int) -> None:
    """Raise DataError that counts the bad files of all sources, beside so many samples, and names the first ten."""
    bad = [(name, r) for name, found in rejected.items() for r in found if r.kind == "bad"]
    if not bad:
        return
    lines = [f"  {name}: {r.key}: {r.reason}" for name, r in bad[:10]]
    more = [f"  and {len(bad) - 10} more"] if len(bad) > 10 else []
    raise DataError(
        "\n".join([f"{len(bad)} of {len(bad) + samples} files cannot be used", *lines, *more]),
        do="fix or exclude them, or skip them with --on-error skip; what was read is not read again",
    )


def no_image(name: str, where: str, kind: str, rejected: Sequence[Rejected], notes: Sequence[str]) -> DataError:
    """The error for a source without a sample: `kind` is what was looked for, `notes` what is odd in the options."""
    head = f"source {name!r} has no usable image"
    if not rejected:
        do = "check the path, --kind, --include and --exclude; foundation shards sources KIND tells its layout"
        return DataError("\n  ".join([f"{head}: none found; looked for {kind}", *notes]), where=where, do=do)
    common = [f"{count:,} x {reason}" for reason, count in reasons(rejected).most_common(3)]
    cures = [_CURES[cause] for cause, _ in Counter(r.kind for r in rejected).most_common()]
    what = "\n  ".join([f"{head}: all {len(rejected):,} were left out", *common, *notes])
    return DataError(what, where=where, do="; ".join(cures))


def write(out: Path, rejected: Mapping[str, Sequence[Rejected]]) -> None:
    """Bring `rejected.jsonl` up to date: the lines of these sources are new, those of the others stay."""
    path, part = out / REJECTED, out / f".{REJECTED}.part"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if _source_of(line) not in rejected]
    for name, found in rejected.items():
        for r in found:
            file = r.key.encode(errors="backslashreplace").decode()  # a name may hold bytes that are no text
            line = {"source": name, "file": file, "kind": r.kind, "reason": r.reason}
            kept.append(canonical_json(line).decode())
    if kept:
        part.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(part, path)
    else:
        path.unlink(missing_ok=True)


def _source_of(line: str) -> str | None:
    """The source that a line of `rejected.jsonl` is about; a line that says nothing is nobody's."""
    try:
        return str(json.loads(line)["source"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
