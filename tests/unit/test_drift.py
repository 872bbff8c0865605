"""Drift says how much of a target is speckle, whatever its units, and every fixed target of the registry has one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from processes import ROOT
from torch import Tensor

from foundation.config import load
from foundation.errors import ConfigError, DataError
from foundation.evaluation import drift as module
from foundation.evaluation.drift import WHOLE, Chip, Shared, drift, pick, targets, to_rows
from foundation.objectives.registry import OBJECTIVES, build
from foundation.objectives.targets import FixedTarget, GradientRatio, Pixels
from shards.catalog import load as load_catalog

SIZE = 32


def chips(count: int = 12) -> list[Chip]:
    """Scenes of smooth brightness."""
    rows, columns = np.mgrid[:SIZE, :SIZE] / SIZE
    found = []
    for i in range(count):
        scene = 60 + 40 * np.sin(6 * rows + i) * np.cos(5 * columns - i)
        sample = SimpleNamespace(pixels=scene[None].astype(np.uint8), scale=255.0, decibels=0.0, label=-1)
        found.append(Chip(sample, f"{i + 1:064x}"))  # type: ignore[arg-type]
    return found


class Scaled(FixedTarget):
    """Another target times a factor and plus a constant."""

    def __init__(self, inner: FixedTarget, factor: float, shift: float) -> None:
        super().__init__(inner.names)
        self.inner, self.factor, self.shift = inner, factor, shift

    def of_channel(self, image: Tensor) -> Tensor:
        return self.factor * self.inner.of_channel(image).double() + self.shift


class Noise(FixedTarget):
    """Nothing but speckle."""

    def of_channel(self, image: Tensor) -> Tensor:
        return torch.frac(image * 1e4)


def one(target: FixedTarget, looks: float = 2, seed: int = 0, count: int = 12) -> Any:
    return drift([Shared(("x",), target)], chips(count), SIZE, None, [looks], seed)


def test_without_speckle_nothing_drifts() -> None:
    every, _ = targets()
    rows = drift(every, chips(3), 64, None, [float("inf")])
    assert {(row.drift, row.low, row.high) for row in rows} == {(0.0, 0.0, 0.0)}


@pytest.mark.parametrize(("factor", "shift"), [(3, 0), (1e-3, 0), (-1, 5)])
def test_drift_has_no_unit(factor: float, shift: float) -> None:
    target = GradientRatio((3, 5), 1e-2, "include")
    (base, *_), (scaled, *_) = one(target), one(Scaled(target, factor, shift))
    for name in ("drift", "low", "high"):
        assert getattr(scaled, name) == pytest.approx(getattr(base, name), rel=1e-6)


def test_drift_is_one_for_pure_speckle_and_smaller_with_more_looks_and_wider_windows() -> None:
    (noise,) = one(Noise(("n",)))
    assert noise.drift == pytest.approx(1, abs=0.03)
    whole, small, large = one(GradientRatio((2, 9), 1e-2, "include"))
    assert (whole.map, small.map, large.map) == (WHOLE, "r2", "r9")
    assert large.drift < whole.drift < small.drift < 1
    values = [one(Pixels(), looks)[0].drift for looks in (1, 4, 16)]
    assert values == sorted(values, reverse=True)


def test_drift_is_one_less_the_correlation_of_two_realisations() -> None:
    first, second = (module.respeckled(chips(), 2, seed, SIZE, None) for seed in (0, 1))
    correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]).double())[0, 1].item()
    (row,) = one(Pixels())
    assert row.drift == pytest.approx(1 - correlation, abs=0.01)
    assert row.low < row.drift < row.high
    assert row.images == 12
    assert one(Pixels()) == one(Pixels())
    assert one(Pixels(), seed=1)[0].drift != row.drift


def test_every_objective_has_a_row_or_is_named_as_left_out() -> None:
    every, skipped = targets()
    named = {name for shared in every for name in shared.objectives}
    assert named | {line.partition(":")[0] for line in skipped} == set(OBJECTIVES)
    assert ("mae", "lomar") in {shared.objectives for shared in every}  # one target, one row
    assert {type(shared.target).__name__ for shared in every} >= {
        "Pixels",
        "HOG",
        "SARHOG",
        "StructuralScales",
        "MeanScale",
    }


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_the_targets_are_those_of_the_published_configurations(name: str) -> None:
    file = ROOT / "configs" / "objectives" / f"{name}.yaml"
    fixed = getattr(build(load(file)), "fixed", None)
    if not isinstance(fixed, FixedTarget):
        assert targets([name])[0] == []
        return
    found = targets([name])[0][0].target
    images = torch.rand(2, 1, 224, 224)
    assert torch.equal(found.maps(images), fixed.maps(images))
    (from_file,) = targets([str(file)])[0]
    assert torch.equal(from_file.target.maps(images), fixed.maps(images))


def test_a_name_that_is_no_objective_is_refused() -> None:
    with pytest.raises(ConfigError, match="jepa-sar is no objective") as caught:
        targets(["sar-jepa", "jepa-sar"])
    assert "sar-jepa" in caught.value.do


def test_images_are_spread_over_the_catalog(catalog: Path) -> None:
    whole = load_catalog(catalog)
    found = pick(whole, 10)
    assert len({chip.name for chip in found}) == 10
    assert {chip.sample.source for chip in found} == {"free", "known", "unseen"}
    assert len(pick(whole, 10_000)) == whole.samples
    with pytest.raises(DataError, match="drift needs at least two images"):
        pick(whole, 1)


def test_the_command_writes_table_rows_and_figure(command: Callable[..., Any], catalog: Path, tmp_path: Path) -> None:
    arguments = ("--data", catalog, "--images", 4, "--size", 64, "--crop", 0, "--out", tmp_path, "--looks", "1,4")
    code, text, err = command("drift", *arguments, "--objectives", "lomar-sar,sar-jepa", "--only", "known")
    assert code == 0, err
    found = json.loads((tmp_path / "drift.json").read_text())
    assert {(row["target"], row["looks"]) for row in found["rows"]} == {
        (target, looks) for target in ("pixels", "gradient ratio") for looks in (1, 4)
    }
    assert "gradient ratio" in text
    assert (tmp_path / "drift.png").read_bytes()[:4] == b"\x89PNG"
    code, _, err = command("drift", *arguments, "--objectives", "nothing")
    assert code == 2
    assert "nothing is no objective" in err


def test_rows_become_a_table_with_a_column_per_number_of_looks() -> None:
    rows = drift([Shared(("a", "b"), Pixels())], chips(4), SIZE, None, [1, 4])
    header, cells = to_rows(rows)
    assert header == ("target", "map", "drift, L = 1", "drift, L = 4", "objectives")
    assert len(cells) == 1
    assert cells[0][-1] == "a, b"
