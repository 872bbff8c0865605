"""Leakage: what of a test set the encoder was pretrained on. A score stands beside this verdict, or says there is none.

Compared are content hashes, descriptors of likeness (shards.likeness: copies with another contrast, mirrored, turned,
compressed) and scene ids, from the metadata of the two catalogs alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from foundation.errors import DataError
from foundation.evaluation.leaks import FILE, VERDICTS, Word
from foundation.evaluation.scores import Score
from foundation.files import read_json, write_whole
from shards.audit import near_overlap, overlap, shared_scenes
from shards.catalog import Catalog

LISTED = 5  # examples of each kind
IDENTICAL, NEAR, SCENES = "identical images", "near duplicates", "shared scenes"


@dataclass(frozen=True)
class Leakage:
    """What of `tested` test images was learnt.

    `identical`: images with the pixels of one that was learnt; `near`: others that look like a copy of one; `scenes`:
    scenes that both have chips of. A count of 0 whose name stands in `not_checked` (with the reason) was not counted.
    The verdict is «leaked» when anything was found, «unknown» when nothing was but the images could not all be
    compared, else «clean»: scene ids that are missing change no verdict, they are named in the sentence.
    """

    verdict: Word
    sentence: str
    tested: int
    identical: int = 0
    near: int = 0
    scenes: int = 0
    examples: tuple[str, ...] = ()
    not_checked: Mapping[str, str] = field(default_factory=dict)

    @property
    def images(self) -> int | str:
        """Test images that were learnt, copies included; a text when nothing can be said."""
        missing = self.not_checked.get(IDENTICAL)
        return f"not checked: {missing}" if missing else self.identical + self.near

    def to_rows(self) -> list[tuple[str, str]]:
        """What was looked for, and the number that was found or why it was not looked for."""
        counts = {IDENTICAL: self.identical, NEAR: self.near, SCENES: self.scenes}
        return [
            (name, f"not checked: {self.not_checked[name]}" if name in self.not_checked else f"{count:,}")
            for name, count in counts.items()
        ]

    def as_json(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return json.loads(json.dumps(asdict(self)))


def find(learnt: Catalog | None, tested: Catalog, fingerprint: str | None = None) -> Leakage:
    """Compare the catalog an encoder was pretrained on (None: not at hand) with the test split it is scored on.

    `fingerprint` is that of the data when they were learnt; a catalog that has changed since says nothing.
    """
    changed = learnt is not None and fingerprint not in (None, learnt.fingerprint)
    if learnt is None or changed:
        reason = f"the pretraining catalog {'has changed since' if changed else 'is not at hand'}"
        return _judge(tested.samples, {name: ([], reason) for name in (IDENTICAL, NEAR, SCENES)})
    images = overlap(learnt, tested), ""
    return _judge(tested.samples, {IDENTICAL: images, NEAR: _near(learnt, tested), SCENES: _scenes(learnt, tested)})


def _near(learnt: Catalog, tested: Catalog) -> tuple[Sequence[str], str]:
    """Near duplicates, and why not all images were compared."""
    try:
        found = near_overlap(learnt, tested)
    except DataError as error:
        return [], error.what
    parts = ((found.learnt_without, learnt, "learnt"), (found.tested_without, tested, "test"))
    lacking = [f"{n:,} of {c.samples:,} {kind} images have no descriptor" for n, c, kind in parts if n]
    return found.names, ", ".join(lacking)


def _scenes(learnt: Catalog, tested: Catalog) -> tuple[Sequence[str], str]:
    """Shared scenes, or which side has no scene ids."""
    for catalog, kind in ((tested, "test"), (learnt, "learnt")):
        if all(table["scene"].null_count == len(table) for table in catalog.tables(["scene"])):
            return [], f"the {kind} images have no scene ids"
    return [str(scene) for scene in shared_scenes(learnt, tested)], ""


def _judge(tested: int, found: Mapping[str, tuple[Sequence[str], str]]) -> Leakage:
    """The verdict on names found and reasons why something was not checked, by kind."""
    counts = {kind: len(names) for kind, (names, _) in found.items()}
    missing = {kind: reason for kind, (_, reason) in found.items() if reason}
    verdict: Word = "leaked" if any(counts.values()) else "unknown" if {IDENTICAL, NEAR} & set(missing) else "clean"
    if verdict == "leaked":
        parts = {
            IDENTICAL: f"{counts[IDENTICAL]:,} of {tested:,} test images themselves",
            NEAR: f"near copies of {counts[NEAR]:,} of {tested:,} test images",
            SCENES: f"{counts[SCENES]:,} scenes of the test images",
        }
        sentence = "The encoder was PRETRAINED ON " + ", ".join(parts[k] for k, n in counts.items() if n)
    elif verdict == "unknown":
        sentence = "Whether the encoder was pretrained on test images is unknown"
    else:
        sentence = f"None of the {tested:,} test images, nor a copy of one, was learnt in pretraining"
    reasons = [
        f"{' and '.join(kind for kind in missing if missing[kind] == why)} not checked: {why}"
        for why in dict.fromkeys(missing.values())
    ]
    return Leakage(
        verdict,
        "; ".join([sentence, *reasons]) + ".",
        tested,
        counts[IDENTICAL],
        counts[NEAR],
        counts[SCENES],
        tuple(name for names, _ in found.values() for name in names[:LISTED]),
        missing,
    )


def record(run: Path, found: Leakage, tested: Catalog) -> dict[str, Any]:
    """Keep a verdict with a run, in `leakage.json`, and return what scores on this test set say of it.

    The file holds the fields of the worst verdict among the test sets the run was scored on, and under `tests` the
    verdict on each by its fingerprint: a later score on another set does not hide an earlier leak.
    """
    path = run / FILE
    known = read_json(path).get("tests", {}) if path.exists() else {}
    tests = {**known, tested.fingerprint: found.as_json()}
    worst = min(tests.values(), key=lambda one: VERDICTS.index(one["verdict"]))
    write_whole(path, json.dumps({**worst, "tests": tests}, indent=1))
    return {"pretrained_on_test_images": found.images, "leakage": found.as_json()}


def verdicts(scores: Sequence[Score]) -> dict[str, Word]:
    """What has to be said beside these scores: the sentence of every leakage report, and its verdict."""
    found = [score.settings.get("leakage") or {} for score in scores]
    return {one["sentence"]: one["verdict"] for one in found if "sentence" in one}
