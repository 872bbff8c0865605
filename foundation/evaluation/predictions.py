"""What every score was computed from: class probabilities of each test image, kept beside the scores of a run.

Confusion matrices, calibration and paired tests between two encoders need answers image by image; images are named by
the hash of their pixels, so that the answers of two runs can be matched. One `.npz` per measurement, plain arrays only.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from foundation.files import write_whole
from shards.errors import DataError

FOLDER = "predictions"
_ARRAYS = ("names", "classes", "hashes", "seeds", "y", "probabilities")


@dataclass(frozen=True)
class Predictions:
    """The answers of one encoder under one protocol.

    `probabilities` fp32 [S, N, C] for each of `seeds` (S) and test images (N); `y` int64 [N] indexes `classes` (C);
    `hashes` name the N images. `measurement` tells the weights, data and settings apart, as in `Score.settings`.
    """

    encoder: str
    protocol: str
    measurement: str
    classes: tuple[str, ...]
    hashes: tuple[str, ...]
    seeds: tuple[int, ...]
    y: Tensor
    probabilities: Tensor

    @property
    def predicted(self) -> Tensor:
        """The most probable class: int64 [S, N]."""
        return self.probabilities.argmax(-1)


def write(run: Path, found: Sequence[Predictions]) -> list[Path]:
    """Write each measurement into `RUN/predictions`, over an earlier one of the same names; returns the files."""
    return [write_whole(place(run, p.encoder, p.protocol, p.measurement), _bytes(p)) for p in found]


def read(run: Path) -> list[Predictions]:
    """Everything that `write` left in a run, sorted by file. Raises DataError for a file that cannot be read."""
    return [_read(path) for path in sorted((run / FOLDER).glob("*.npz"))]


def place(run: Path, encoder: str, protocol: str, measurement: str) -> Path:
    """The file of a measurement, named by readable words and a hash that keeps measurements apart."""
    key = "\n".join((encoder, protocol, measurement))
    words = "-".join("".join(c if c.isalnum() else " " for c in f"{protocol} {encoder}").split())
    return run / FOLDER / f"{words}-{hashlib.sha256(key.encode()).hexdigest()[:8]}.npz"


def _bytes(p: Predictions) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        names=np.array((p.encoder, p.protocol, p.measurement)),
        classes=np.array(p.classes),
        hashes=np.array(p.hashes),
        seeds=np.array(p.seeds, dtype=np.int64),
        y=p.y.numpy(),
        probabilities=p.probabilities.float().numpy(),
    )
    return buffer.getvalue()


def _read(path: Path) -> Predictions:
    try:
        with np.load(path, allow_pickle=False) as file:
            names, classes, hashes, seeds, y, probabilities = (file[name] for name in _ARRAYS)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        what = f"predictions cannot be read: {type(error).__name__} {error}"
        raise DataError(what, where=str(path), do="delete it and evaluate again") from error
    encoder, protocol, measurement = (str(name) for name in names)
    return Predictions(
        encoder,
        protocol,
        measurement,
        tuple(map(str, classes)),
        tuple(map(str, hashes)),
        tuple(map(int, seeds)),
        torch.from_numpy(y),
        torch.from_numpy(probabilities),
    )
