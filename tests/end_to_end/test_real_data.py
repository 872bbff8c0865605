"""Measured SAR chips go the whole way: packed from their archives, trained on, and scored beside the controls."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import ROOT, record

from shards import catalog as catalogs

DATA = ROOT.parent / "shared" / "data"
MSTAR, SHIPS = DATA / "mstar-soc" / "mini.tar", DATA / "opensarship-mini" / "all.tar"
pytestmark = pytest.mark.skipif(
    not (MSTAR.is_file() and SHIPS.is_file()), reason=f"the measured chips are not there: {DATA} holds no archives"
)
Command = Callable[..., Any]


def test_measured_chips_are_packed_learnt_and_scored(command: Command, tiny_yaml: Path, tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    packs = (
        (MSTAR, "mstar-train", "train", "--include", "mini-train/*"),
        (MSTAR, "mstar-test", "test", "--include", "mini-test-dev/*"),
        (SHIPS, "opensarship", "pretrain", "--include", "grd-*", "--min-side", "16"),
    )
    for archive, name, split, *more in packs:
        code, _, err = command("shards", "pack", out, archive, "--name", name, "--split", split, *more)
        assert code == 0, err
    code, text, err = command("shards", "verify", out)
    assert code == 0, err
    sources = {source.name: source for source in catalogs.load(out).sources}
    assert (sources["mstar-train"].samples, sources["mstar-test"].samples) == (100, 50)
    assert sources["mstar-train"].classes == sources["mstar-test"].classes
    assert len(sources["mstar-train"].classes) == 10
    assert (sources["mstar-train"].dtype, sources["opensarship"].dtype) == ("uint8", "uint16")
    assert sources["opensarship"].samples > 400

    sizes = ("data.image_size=96", "objective.windows=4", "objective.window=7", "objective.radii=[3,5,7,9]")
    code, _, err = command("train", tiny_yaml, f"data.catalog={out}", "train.samples=32", *sizes)
    assert code == 0, err
    run = tmp_path / "runs" / "tiny"
    assert [row["position"] for row in record(run)] == [8, 16, 24, 32]
    assert np.isfinite([[row["loss"], row["grad_norm"]] for row in record(run)]).all()

    code, text, err = command("evaluate", run, "--data", out, "--protocol", "knn", "--crop", "96")
    assert code == 0, err
    scores = {(row["encoder"], row["metric"]): row for row in json.loads((run / "scores.json").read_text())}
    encoders = ("pretrained", "random-init", "background only", "pixels (PCA)")
    assert {encoder for encoder, _ in scores} == set(encoders)
    assert all(encoder in text for encoder in encoders)
    assert all(row["n_test"] == 50 for row in scores.values())
    # The clutter around a target gives its class away: what the background control is there to show.
    assert scores["background only", "accuracy"]["mean"] > 0.2
    assert (run / "report.html").stat().st_size > 100_000
