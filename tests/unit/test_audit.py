"""An image on both sides of a split is found by its pixels, and pretraining on test images is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from foundation.config import from_dict
from foundation.training.setup import open_data
from shards import audit
from shards.errors import DataError
from shards.pack import SourceSpec, pack
from shards.schema import Record


def chips(seed: int, label: str | None = None) -> list[Record]:
    rng = np.random.default_rng(seed)
    return [Record(rng.integers(1, 255, (16, 16), np.uint8), f"{seed}-{i}", label) for i in range(6)]


def test_identical_pixels_are_found_whatever_their_names(tmp_path: Path) -> None:
    copied = Record(chips(1)[2].pixels, "another name")
    learnt = pack(tmp_path / "a", [SourceSpec("learnt", records=[*chips(0), copied])])
    tested = pack(tmp_path / "b", [SourceSpec("tested", split="test", records=chips(1))])
    assert audit.overlap(learnt, tested) == ["learnt: another name = tested: 1-2"]
    with pytest.raises(DataError, match="1 images to learn from are also test images") as caught:
        audit.refuse_overlap(learnt, tested)
    assert "learnt: another name = tested: 1-2" in str(caught.value)


def test_a_run_refuses_a_catalog_whose_test_images_it_would_learn_from(tmp_path: Path) -> None:
    sources = [SourceSpec("learnt", records=chips(0)), SourceSpec("tested", split="test", records=chips(0))]
    pack(tmp_path, sources)
    with pytest.raises(DataError, match="6 images to learn from are also test images"):
        open_data(from_dict({"data": {"catalog": str(tmp_path)}}))
