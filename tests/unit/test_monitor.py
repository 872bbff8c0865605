"""The monitor sees a collapse and no collapse where there is none, changes nothing, and keeps the best checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import interrupted, record, same_state
from torch import Tensor

from foundation.config import Config, MonitorConfig
from foundation.errors import ConfigError, DataError, NumericsError
from foundation.training import checkpoint
from foundation.training.collapse import collapsed
from foundation.training.committed import committed, position_of
from foundation.training.engine import Engine
from foundation.training.online import Probe
from foundation.training.places import place
from foundation.training.run import train

Make = Callable[..., Config]
FEATURES = {"feature_std", "feature_cosine", "rankme", "target_variance", "prediction_variance"}
PROBES = {"probe_knn", "probe_linear"}
# Every matrix loses most of itself in an update: the same biases are left of every image.
COLLAPSING = ("optim.lr=1e-3", "optim.weight_decay=30_000", "optim.warmup_samples=0", "monitor.every=8")
COLLAPSING += ("train.samples=64",)


def looked(run: Path, names: set[str]) -> list[int]:
    """Positions whose line holds these metrics, which stand together everywhere."""
    rows = record(run)
    assert all(names <= set(row) or not names & set(row) for row in rows)
    return [row["position"] for row in rows if names <= set(row)]


def learnt(run: Path) -> list[dict[str, Any]]:
    """The record without what the monitor adds."""
    return [{k: v for k, v in row.items() if k not in FEATURES | PROBES} for row in record(run)]


def test_features_are_looked_at_with_every_checkpoint_and_nothing_of_a_healthy_run_has_collapsed(
    finished: Path,
) -> None:
    assert looked(finished, FEATURES) == [16, 32, 48, 64, 80, 96]
    assert all(collapsed(row, MonitorConfig()) is None for row in record(finished))
    assert all("monitor_s" in json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()[1::2])


def test_looks_and_probes_come_when_they_are_asked_for(tiny_config: Make, catalog: Path) -> None:
    keys = ("train.log_every=40", "monitor.every=24", f"monitor.probe={catalog}", "monitor.probe_every=32")
    run = train(tiny_config(*keys, "monitor.probe_images=16", "monitor.probe_linear=true"))
    assert looked(run, FEATURES) == [24, 48, 72, 96]
    assert looked(run, PROBES) == [32, 64, 96]
    assert [row["position"] for row in record(run)] == [24, 32, 40, 48, 64, 72, 80, 96]


@pytest.mark.parametrize(
    "keys",
    [
        ("train.micro_batch=4", "train.activation_checkpointing=selective", "optim.ema_half_life=40"),
        ("objective.name=saratr-x-v2-target", "objective.fusion=learned", "objective.radii=[3,5]"),
        ("objective.name=mae", "model.positions=sincos", "train.precision=bf16"),
        pytest.param(("train.compile=true",), marks=pytest.mark.slow),
    ],
)
def test_what_is_learnt_does_not_depend_on_being_looked_at(
    tiny_config: Make, catalog: Path, keys: tuple[str, ...]
) -> None:
    length = ("train.samples=48", "train.checkpoint_every=48")
    probe = (f"monitor.probe={catalog}", "monitor.probe_images=8", "monitor.probe_every=24")
    seen = train(tiny_config(*length, *keys, *probe, "monitor.every=8", "name=seen"))
    unseen = train(tiny_config(*length, *keys, "monitor.images=0", "name=unseen"))
    assert looked(seen, FEATURES) == [8, 16, 24, 32, 40, 48]
    assert not any(FEATURES & set(row) for row in record(unseen))
    assert learnt(seen) == learnt(unseen)
    assert same_state(seen, unseen)


def test_a_run_that_collapses_is_told_so(tiny_config: Make, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tiny_config(*COLLAPSING))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("collapsed at sample")]
    assert record(run)[-1]["feature_std"] < MonitorConfig().min_feature_std
    assert "collapsed at sample 64: the features of different images are the same (feature_std" in said[-1]
    assert "lower optim.lr or optim.weight_decay" in said[-1]


def test_a_run_that_collapses_can_be_ended_before_a_checkpoint_holds_it(tiny_config: Make) -> None:
    config = tiny_config(*COLLAPSING, "monitor.on_collapse=stop", "train.checkpoint_every=8")
    with pytest.raises(NumericsError, match=r"collapsed: the features of different images are the same") as caught:
        train(config)
    kept = [position_of(name) for name in committed(place(config.run_folder / "checkpoints"))]
    assert f"where: sample {max(kept, default=0) + 8}" in str(caught.value)
    assert "lower optim.lr or optim.weight_decay" in str(caught.value)


@pytest.mark.parametrize("where", ["folder", "store"])
def test_the_checkpoint_of_the_best_probe_is_kept_also_over_a_resume(
    tiny_config: Make, catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    script = [0.1, 0.5, 0.2, 0.4, 0.2, 0.4]
    monkeypatch.setattr(Probe, "scores", lambda *_: {"probe_knn": script.pop(0)})
    keys = [f"monitor.probe={catalog}", "monitor.probe_images=4", "monitor.images=0", "train.samples=32"]
    keys += ["train.keep=1", "train.checkpoint_every=8"]
    if where == "store":
        keys.append(f"train.checkpoints=memory://{tmp_path.name}/best")
    run = train(tiny_config(*keys))
    home = place(f"memory://{tmp_path.name}/best" if where == "store" else run / "checkpoints")
    assert [row["probe_knn"] for row in record(run)] == [0.1, 0.5, 0.2, 0.4]
    assert [position_of(name) for name in committed(home)] == [32, 16]
    (home / "samples-000000000032").remove()  # as if the last save had not come to its end
    train(tiny_config(*keys))
    assert script == []  # the run went on from its best checkpoint, the newest that is left
    assert [position_of(name) for name in committed(home)] == [32, 16]
    assert checkpoint.best(run).name == "samples-000000000016"


def test_a_resumed_run_looks_where_it_would_have_looked(tiny_config: Make, finished: Path) -> None:
    config = tiny_config()
    interrupted(finished, config.run_folder, 48)
    assert record(train(config)) == record(finished)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("monitor.probe=nowhere",), "no catalog here"),
        (("monitor.catalog=nowhere",), "no catalog here"),
        (("data.splits=[train]", "monitor.probe={free}"), "no source"),
    ],
)
def test_images_that_cannot_be_had_are_an_error_before_the_first_update(
    tiny_config: Make, tmp_path: Path, keys: tuple[str, ...], message: str
) -> None:
    from shards import synthetic
    from shards.pack import SourceSpec, pack

    pack(tmp_path / "free", [SourceSpec("free", records=synthetic.generate("pretrain", ("clutter",), 4, 40, 0))])
    with pytest.raises(DataError, match=message):
        train(tiny_config(*(key.format(free=tmp_path / "free") for key in keys)))


@pytest.mark.parametrize("key", ["monitor.catalog", "monitor.probe"])
def test_images_of_other_channels_are_an_error_before_the_first_update(
    tiny_config: Make, catalog: Path, tmp_path: Path, key: str
) -> None:
    from shards import synthetic
    from shards.pack import SourceSpec, pack

    records = synthetic.generate("train", synthetic.CLASSES, 2, 40, 0)
    pairs = [replace(record, pixels=np.stack([record.pixels] * 2)) for record in records]
    pack(tmp_path / "pairs", [SourceSpec("pairs", records=pairs)])
    with pytest.raises(DataError, match="the images of pairs have 2 channels, the model takes 1") as caught:
        train(tiny_config(f"{key}={tmp_path / 'pairs'}"))
    assert f"where: {key}" in str(caught.value)
    assert f"name a catalog of 1 channels, or {key}=null" in str(caught.value)


def test_of_a_catalog_of_one_image_nothing_is_said(tiny_config: Make, tmp_path: Path) -> None:
    from shards import synthetic
    from shards.pack import SourceSpec, pack

    pack(tmp_path / "one", [SourceSpec("one", records=synthetic.generate("train", synthetic.CLASSES[:1], 1, 40, 0))])
    run = train(tiny_config(f"monitor.catalog={tmp_path / 'one'}", "monitor.on_collapse=stop", "train.samples=16"))
    assert looked(run, FEATURES) == []


def test_contexts_of_a_look_hold_nothing_of_their_targets(tiny_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[tuple[Tensor, ...]]()
    found = Engine.predict

    def watched(self: Engine, model: Any, arguments: tuple[Tensor, ...]) -> Any:
        seen.append(arguments)
        return found(self, model, arguments)

    monkeypatch.setattr(Engine, "predict", watched)
    keys = ("objective.name=i-jepa", "model.positions=sincos", "data.image_size=64", "train.samples=16")
    train(tiny_config(*keys, "monitor.images=48", "monitor.every=8"))
    assert len(seen) > 1
    for _, context, targets in seen:
        for shown, hidden in zip(context.tolist(), targets.flatten(1).tolist(), strict=True):
            assert not {*shown} & {*hidden}


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("monitor.on_collapse=ignore", "warn, stop"),
        ("monitor.every=0", ">= 1"),
        ("monitor.images=-1", ">= 0"),
        ("monitor.images=1", "0 or at least 2"),
    ],
)
def test_keys_out_of_range_are_refused(tiny_config: Make, key: str, allowed: str) -> None:
    with pytest.raises(ConfigError, match=allowed):
        tiny_config(key)
