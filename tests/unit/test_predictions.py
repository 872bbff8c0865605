"""The answers behind a score come back as they were written, and two measurements never overwrite each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from foundation.evaluation.predictions import Predictions, read, write
from shards.errors import DataError


def some(measurement: str = "24,000 samples") -> Predictions:
    probabilities = torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(0)).softmax(-1)
    hashes = tuple(f"{i:032x}" for i in range(5))
    classes = ("2S1", "BMP2", "Größe T72")
    return Predictions(
        "pretrained", "10-shot linear", measurement, classes, hashes, (0, 1), torch.arange(5) % 3, probabilities
    )


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    write(tmp_path, [some()])
    (found,) = read(tmp_path)
    for name in ("encoder", "protocol", "measurement", "classes", "hashes", "seeds"):
        assert getattr(found, name) == getattr(some(), name)
    assert torch.equal(found.y, some().y)
    assert torch.equal(found.probabilities, some().probabilities)
    assert found.predicted.shape == (2, 5)


def test_a_measurement_replaces_itself_and_no_other(tmp_path: Path) -> None:
    write(tmp_path, [some(), some("48,000 samples")])
    write(tmp_path, [replace(some(), seeds=(3, 4))])
    assert sorted((p.measurement, p.seeds) for p in read(tmp_path)) == [
        ("24,000 samples", (3, 4)),
        ("48,000 samples", (0, 1)),
    ]


@pytest.mark.parametrize("damage", [b"", b"not a zip", None])
def test_a_damaged_file_is_named(tmp_path: Path, damage: bytes | None) -> None:
    (path,) = write(tmp_path, [some()])
    path.write_bytes(path.read_bytes()[:200] if damage is None else damage)
    with pytest.raises(DataError, match="predictions cannot be read") as caught:
        read(tmp_path)
    assert path.name in str(caught.value)
