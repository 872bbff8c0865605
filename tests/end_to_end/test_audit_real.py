"""On measured chips the audit reports what is repeated there, and takes no two looks at one vehicle for copies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from processes import ROOT

from shards.audit import audit, overlap
from shards.audit_page import write_page
from shards.catalog import Catalog
from shards.likeness import descriptor, pairs
from shards.pack import SourceSpec, pack
from shards.reader import Reader
from shards.sources.base import Options

MSTAR = ROOT.parent / "shared" / "data" / "mstar-soc"
pytestmark = pytest.mark.skipif(
    not all((MSTAR / f"{name}.tar").is_file() for name in ("train", "test-dev", "mini")),
    reason=f"the measured chips are not there: {MSTAR} holds no archives",
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """2,747 + 1,214 chips of ten vehicles, and a small archive that repeats 100 of the one and 50 of the other."""
    parts = (
        ("train", "train", "train", "*"),
        ("test", "test-dev", "test", "*"),
        ("mini-train", "mini", "train", "mini-train/*"),
        ("mini-test", "mini", "pretrain", "mini-test-dev/*"),
    )
    specs = [
        SourceSpec(name, MSTAR / f"{file}.tar", split, options=Options(include=(pattern,)))
        for name, file, split, pattern in parts
    ]
    return pack(tmp_path_factory.mktemp("measured"), specs)


def test_exactly_the_repeated_chips_are_reported(measured: Catalog, tmp_path: Path) -> None:
    findings = audit(measured)
    assert findings.counts == {
        "samples": 2747 + 1214 + 150,
        "compared with": 0,
        "groups of identical images": 150,
        "repeated images": 150,
        "near duplicates": 0,
        "test images that are learnt": 50,
        "test images with a near duplicate that is learnt": 0,
        "test scenes that are learnt": 0,
    }
    sides = sorted(tuple(sorted(place.source for place in group)) for group in findings.exact)
    assert sides == [("mini-test", "test")] * 50 + [("mini-train", "train")] * 100
    assert all(len({place.file.rpartition("/")[2] for place in group}) == 1 for group in findings.exact)
    assert {(pair.first.source, pair.second.source) for pair in findings.leaked} == {("mini-test", "test")}
    assert len(overlap(measured.only(["mini-test"]), measured.only(["test"]))) == 50
    assert overlap(measured.only(["train", "mini-train"]), measured.only(["test"])) == []
    assert "50 test images are among those to learn from" in write_page(findings, measured, tmp_path / "a").read_text()


def test_changed_copies_of_measured_chips_are_found_and_only_they(measured: Catalog) -> None:
    """Mirrored, brightened, clipped and coarser copies of 300 chips among all chips of the ten vehicles."""
    chips = measured.only(["train", "test"])
    reader = Reader(chips)
    descriptors = [descriptor(reader[number].pixels) for number in range(len(reader))]
    picked = np.random.default_rng(0).choice(len(reader), 300, replace=False)
    changed = []
    for place, number in enumerate(picked.tolist()):
        image = reader[number].pixels[0].astype(np.float32)
        image = (image[:, ::-1], image[::-1], np.rot90(image))[place % 3]
        image = (255 * (image / 255) ** 0.6, np.minimum(image * 3, 255), image // 6)[place // 3 % 3]
        changed.append(descriptor(np.rint(image).astype(np.uint8)))
    found = {(i, j) for i, j, _ in pairs([*descriptors, *changed])}
    assert found == {(int(number), len(reader) + place) for place, number in enumerate(picked)}
