"""Measured test chips that were slipped into pretraining are found, changed or not, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from processes import ROOT

from foundation.evaluation.leakage import find
from shards import audit
from shards.errors import DataError
from shards.pack import SourceSpec, pack
from shards.reader import Reader
from shards.schema import Record
from shards.sources.base import Options

DATA = ROOT.parent / "shared" / "data"
MINI = DATA / "mstar-soc" / "mini.tar"
pytestmark = pytest.mark.skipif(not MINI.is_file(), reason=f"the measured chips are not there: no {MINI}")


def test_measured_test_chips_among_those_to_learn_from_are_refused_by_name(tmp_path: Path) -> None:
    parts = (("honest", "pretrain", "mini-train/*"), ("exam", "test", "mini-test-dev/*"))
    whole = pack(
        tmp_path / "mini",
        [SourceSpec(name, MINI, split, options=Options(include=(pattern,))) for name, split, pattern in parts],
    )
    honest, exam = whole.select("pretrain"), whole.select("test")
    audit.refuse_overlap(honest, exam)
    assert find(honest, exam).verdict == "clean"

    reader = Reader(exam)
    chips = [reader.native(i)[0] for i in range(15)]
    changed = [
        *chips[:5],
        *(np.ascontiguousarray(chip[:, ::-1]) for chip in chips[5:10]),
        *(np.rint(0.7 * chip).astype(np.uint8) for chip in chips[10:]),
    ]
    own = Reader(honest)
    records = [Record(own.native(i)[0], f"honest-{i}") for i in range(len(own))]
    records += [Record(pixels, f"slipped-{i}") for i, pixels in enumerate(changed)]
    learnt = pack(tmp_path / "learnt", [SourceSpec("learnt", records=records)])
    with pytest.raises(DataError) as caught:
        audit.refuse_overlap(learnt, exam)
    assert caught.value.what == (
        "5 images to learn from are also test images; 10 test images look like copies of images to learn from"
    )
    assert caught.value.where.startswith("learnt: slipped-0 = exam: ")
    found = find(learnt, exam)
    assert (found.verdict, found.identical, found.near, found.images) == ("leaked", 5, 10, 15)
