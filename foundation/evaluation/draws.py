"""Few-shot draws as files: which images a score was learnt from, by hash, beside the split they were drawn from.

A draw is a function of split, shots and seed; the file makes it visible and lets others use the very same images. What
is read is never believed: every image must be in train, of its class, once, and not in test.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from foundation.evaluation import fewshot
from foundation.evaluation.features import Listing
from foundation.files import read_json, write_whole
from shards.errors import DataError


@dataclass(frozen=True)
class Draws:
    """The draws of the split with this sha256, kept in `folder` (None: nowhere); `given` are those it came with."""

    split: str = ""
    folder: Path | None = None
    given: Path | None = None

    def draw(self, train: Listing, test: Listing, shots: int, seed: int) -> Tensor:
        """Indices into `train` of `shots` samples of each class, class by class: int64 [classes · shots].

        Reads the file of this draw if there is one, else writes it. Raises DataError when a class is too small or the
        file is not a draw of this split.
        """
        path = None if self.folder is None else self.folder / f"{shots}-shot-seed-{seed}.json"
        if path is not None and path.exists():
            return self._read(path, train, test, shots, seed)
        index = fewshot.draw(train.y, train.hashes, train.classes, shots, seed)
        if path is not None:
            picked = [train.hashes[i] for i in index.tolist()]
            hashes = {name: picked[n * shots : (n + 1) * shots] for n, name in enumerate(train.classes)}
            value = {"split": self.split, "shots": shots, "seed": seed, "hashes": hashes}
            write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
        return index

    def digest(self, train: Listing, index: Tensor) -> str:
        """Names the drawn images in the settings of a score: the first 16 digits of a sha256 of their hashes."""
        names = "\n".join(sorted(train.hashes[i] for i in index.tolist()))
        return hashlib.sha256(names.encode()).hexdigest()[:16]

    def _read(self, path: Path, train: Listing, test: Listing, shots: int, seed: int) -> Tensor:
        value = read_json(path)
        try:
            facts = tuple(value[name] for name in ("split", "shots", "seed"))
            hashes: dict[str, list[str]] = {str(name): [*map(str, part)] for name, part in value["hashes"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise self._refused(path, f"this is no file of a draw: {error!r}") from error
        if facts != (self.split, shots, seed):
            told = f"split {str(facts[0])[:12]}, {facts[1]} shots, seed {facts[2]}"
            ours = f"split {self.split[:12]}, {shots} shots, seed {seed}"
            raise self._refused(path, f"the draw is of {told}, not of {ours}")
        tested = set(test.hashes)
        if seen := [h for part in hashes.values() for h in part if h in tested]:
            raise self._refused(path, f"{len(seen)} of the drawn images are test images: {_named(seen)}")
        known = set(train.hashes)
        if lost := [h for part in hashes.values() for h in part if h not in known]:
            raise self._refused(path, f"{len(lost)} of the drawn images are not in train: {_named(lost)}")
        index: list[int] = []
        for name, images in zip(train.classes, fewshot.different(train.y, train.hashes, train.classes), strict=True):
            part = hashes.get(name, [])
            if len(part) != shots or len(set(part)) != shots:
                raise self._refused(path, f"class {name} has {len(set(part))} different images, not {shots}")
            where = {train.hashes[i]: i for i in images}
            if wrong := [h for h in part if h not in where]:
                what = f"{len(wrong)} images of class {name} have another class in train: {_named(wrong)}"
                raise self._refused(path, what)
            index += [where[h] for h in part]
        if extra := sorted({*hashes} - {*train.classes}):
            raise self._refused(path, f"train has no class {extra[0]}")
        return torch.tensor(index, dtype=torch.int64)

    def _refused(self, path: Path, what: str) -> DataError:
        if self.given is not None and (given := self.given / path.name).exists():
            do = f"correct this file, or, to have the images drawn, delete it and its copy {path}"
            return DataError(what, where=str(given), do=do)
        return DataError(what, where=str(path), do="delete the file: the images are drawn again")


def _named(hashes: list[str]) -> str:
    return ", ".join(h[:12] for h in hashes[:3]) + ", ..." * (len(hashes) > 3)
