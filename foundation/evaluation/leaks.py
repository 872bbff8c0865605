"""Scores that mean nothing: the encoder has seen test images, or its training chips share groups with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from foundation.errors import DataError
from foundation.evaluation.scores import Score
from foundation.files import read_json

FILE = "leakage.json"
Word = Literal["clean", "leaked", "unknown"]
VERDICTS: tuple[Word, ...] = ("leaked", "unknown", "clean")  # the worst first
# What a score's settings may say, and how a reader is told.
SETTINGS = {
    "pretrained_on_test_images": "pretrained on {} of the test images",
    "shared_groups": "{} groups are in both train and test",
}


@dataclass(frozen=True)
class Verdict:
    """Whether the pretraining images of a run hold test images: `verdict` is one of VERDICTS, `sentence` says why.

    Counts of `identical` images, `near` duplicates and shared `scenes`; `examples` name some of them.
    """

    verdict: str
    sentence: str
    identical: int = 0
    near: int = 0
    scenes: int = 0
    examples: tuple[str, ...] = ()

    @property
    def warning(self) -> str:
        """What stands beside every score of a run that leaked; empty otherwise."""
        return "the pretraining images hold test images" if self.verdict == "leaked" else ""


def read_verdict(run: Path) -> Verdict | None:
    """The verdict kept with a run, None where there is none. Raises DataError when the file is not a verdict."""
    path = run / FILE
    if not path.exists():
        return None
    value = read_json(path)
    try:
        if value["verdict"] not in VERDICTS:
            raise ValueError(f"verdict {value['verdict']!r} is none of {', '.join(VERDICTS)}")
        identical, near, scenes = (int(value.get(name) or 0) for name in ("identical", "near", "scenes"))
        examples = tuple(map(_text, value.get("examples") or ()))
        return Verdict(value["verdict"], str(value["sentence"]), identical, near, scenes, examples)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{FILE} is not a leakage verdict: {type(error).__name__} {error}"
        raise DataError(what, where=str(path), do="delete it and evaluate again") from error


def reason(score: Score, warning: str = "") -> str:
    """Why a score means nothing; empty for a sound one.

    A score may keep the verdict on its own test set (`leakage`, the fields of a Verdict); where it does not, the
    `warning` of its run holds.
    """
    counts = {name: score.settings.get(name) for name in SETTINGS}
    found = [SETTINGS[name].format(n) for name, n in counts.items() if isinstance(n, int) and n > 0]
    own = score.settings.get("leakage")
    if isinstance(own, Mapping):
        warning = str(own.get("sentence", "leaked")) if own.get("verdict") == "leaked" else ""
    return "; ".join([*found, *([warning] if warning else [])])


def _text(example: Any) -> str:
    """One example in words, whatever form it was kept in."""
    if isinstance(example, Mapping):
        return ", ".join(f"{key} {value}" for key, value in example.items())
    return " = ".join(map(str, example)) if isinstance(example, list | tuple) else str(example)
