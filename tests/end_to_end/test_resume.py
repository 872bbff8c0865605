"""A run that is killed goes on as if nothing had happened: the same samples, losses and weights, bit for bit."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import finish, interrupted, position, record, same_state, start, wait

from foundation.config import Config, to_dict
from foundation.errors import CheckpointError
from foundation.training import setup
from foundation.training.checkpoint import latest, load, save
from foundation.training.places import place
from foundation.training.run import train
from shards import catalog as catalogs
from shards import synthetic

Make = Callable[..., Config]
Command = Callable[..., Any]


def test_a_killed_process_goes_on_as_if_nothing_had_happened(
    tiny_config: Make, tiny_yaml: Path, finished: Path
) -> None:
    """Fifty kills of the same kind, without the command line, are in test_checkpoint_crashes.py."""
    killed = tiny_config().run_folder
    process = start("train", tiny_yaml)
    wait(process, lambda: position(killed) >= 40)  # the save of 32, which waits for that of 16, is behind it
    process.kill()
    code, output = finish(process)
    assert code == -signal.SIGKILL, output
    code, output = finish(start("train", tiny_yaml))
    assert code == 0, output
    assert "resumed from samples-" in output
    assert record(killed) == record(finished)
    assert same_state(killed, finished)


def test_a_run_whose_checkpoints_are_in_an_object_store_goes_on_from_there(
    tiny_config: Make, finished: Path, command: Command, tiny_yaml: Path
) -> None:
    url = f"memory://{tiny_yaml.parent.name}/checkpoints"
    run = train(tiny_config(f"train.checkpoints={url}"))
    assert not (run / "checkpoints").exists()
    assert record(run) == record(finished)
    assert same_state(run, finished)  # the run folder leads there
    for name in ("samples-000000000080", "samples-000000000096"):
        place(f"{url}/{name}").remove()
    code, _, err = command("train", tiny_yaml, f"train.checkpoints={url}")
    assert code == 0
    assert "resumed from samples-000000000064" in err
    assert record(run) == record(finished)
    assert same_state(run, finished)
    code, _, err = command("train", tiny_yaml, f"train.checkpoints={url}", "name=other")
    assert code == 2
    assert "this run was started with other values of: name" in err
    code, _, err = command("train", tiny_yaml, f"train.checkpoints={url}", "--fresh")
    assert code == 2
    assert "the run folder already holds samples-000000000096" in err


def test_the_number_of_loader_processes_may_change_at_a_resume(tiny_config: Make, finished: Path) -> None:
    for workers in (1, 2):
        config = tiny_config(f"name=workers-{workers}", f"data.workers={workers}")
        interrupted(finished, config.run_folder, 48)
        run = train(config)
        assert record(run) == record(finished)
        assert same_state(run, finished)


def test_a_finished_run_is_not_trained_again(tiny_config: Make, finished: Path) -> None:
    shutil.copytree(finished, tiny_config().run_folder)
    run = train(tiny_config())
    assert record(run) == record(finished)
    assert same_state(run, finished)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("seed=1", "seed"),
        ("train.global_batch=16", "train.global_batch"),
        ("data.lanes=4", "data.lanes"),
        ("data.block_shards=1", "data.block_shards"),
        ("train.samples=192", "train.samples"),
        ("objective.mask_ratio=0.5", "objective.mask_ratio"),
        ("objective.draw=shared", "objective.draw"),
        ("optim.lr=1", "optim.lr"),
        ("data.flip=0", "data.flip"),
        ("model.size=tiny", "model.size"),
        ("data.catalog", "data.catalog (fingerprint)"),
    ],
)
def test_a_resume_with_other_values_is_refused_by_name(
    tiny_config: Make, finished: Path, command: Command, tiny_yaml: Path, tmp_path: Path, override: str, named: str
) -> None:
    run = interrupted(finished, tiny_config().run_folder, 48)
    written = (run / "config.yaml").read_text()
    if override == "data.catalog":
        synthetic.write(tmp_path / "other", 40, 2, 0, 0)
        override = f"data.catalog={tmp_path / 'other'}"
    code, _, err = command("train", tiny_yaml, override)
    assert code == 2
    assert err.startswith(f"CheckpointError: this run was started with other values of: {named}\n"), err
    assert f"where: {run / 'checkpoints' / 'samples-000000000048'}" in err
    assert "start a new run with another `name`" in err
    assert (run / "config.yaml").read_text() == written
    assert record(run) == record(finished)


def test_a_run_from_before_a_key_existed_goes_on_with_its_default(
    tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def older(config: Config) -> dict[str, Any]:
        tree = to_dict(config)
        del tree["objective"]["cutoff"]
        return tree

    monkeypatch.setattr(setup, "to_dict", older)
    train(tiny_config("train.samples=16"))
    monkeypatch.undo()
    before = record(train(tiny_config("train.samples=16")))
    assert len(before) == 2  # nothing was trained again
    with pytest.raises(CheckpointError, match=r"other values of: objective\.cutoff"):
        train(tiny_config("train.samples=16", "objective.cutoff=0.1"))


def test_a_catalog_that_moved_is_still_the_same_data(
    tiny_config: Make, finished: Path, catalog: Path, tmp_path: Path
) -> None:
    config = tiny_config(f"data.catalog={tmp_path / 'elsewhere'}")
    interrupted(finished, config.run_folder, 48)
    shutil.copytree(catalog, tmp_path / "elsewhere")
    assert record(train(config)) == record(finished)
    assert catalogs.load(tmp_path / "elsewhere").fingerprint == catalogs.load(catalog).fingerprint


def test_fresh_refuses_a_used_run_folder(tiny_config: Make, finished: Path, command: Command, tiny_yaml: Path) -> None:
    run = interrupted(finished, tiny_config().run_folder, 96)
    code, _, err = command("train", tiny_yaml, "--fresh")
    assert code == 2
    assert "CheckpointError: the run folder already holds samples-000000000096" in err
    assert "resume it (drop --fresh), choose another `name`, or move the folder away" in err
    assert record(run) == record(finished)
    assert command("train", tiny_yaml, "name=other", "train.samples=16", "--fresh")[0] == 0


def test_an_unfinished_checkpoint_is_skipped_and_named(
    tiny_config: Make, finished: Path, command: Command, tiny_yaml: Path
) -> None:
    run = interrupted(finished, tiny_config().run_folder, 64)
    (run / "checkpoints" / "samples-000000000064" / "COMMIT").unlink()
    code, _, err = command("train", tiny_yaml)
    assert code == 0
    assert "skipped checkpoint samples-000000000064: has no COMMIT marker: the save was interrupted" in err
    assert "resumed from samples-000000000048" in err
    assert record(run) == record(finished)
    assert same_state(run, finished)
    assert latest(run)[0] == run / "checkpoints" / "samples-000000000096"


PIECE = "tensors/00000-of-00001.safetensors"


def damage(checkpoint: Path) -> None:
    data = bytearray((checkpoint / PIECE).read_bytes())
    data[len(data) // 2] ^= 1
    (checkpoint / PIECE).write_bytes(data)


def test_a_damaged_checkpoint_is_skipped_and_named(
    tiny_config: Make, finished: Path, command: Command, tiny_yaml: Path
) -> None:
    run = interrupted(finished, tiny_config().run_folder, 64)
    damage(run / "checkpoints" / "samples-000000000064")
    code, _, err = command("train", tiny_yaml)
    assert code == 0
    reason = f"the checkpoint is damaged: the sha256 of {PIECE} differs from the manifest"
    assert f"skipped checkpoint samples-000000000064: {reason}" in err
    assert "resumed from samples-000000000048" in err
    assert record(run) == record(finished)
    assert same_state(run, finished)


def test_when_every_checkpoint_is_damaged_nothing_is_overwritten(
    tiny_config: Make, finished: Path, command: Command, tiny_yaml: Path
) -> None:
    run = interrupted(finished, tiny_config().run_folder, 16)
    damage(run / "checkpoints" / "samples-000000000016")
    code, _, err = command("train", tiny_yaml)
    assert code == 2
    assert "CheckpointError: none of the 1 checkpoints can be used: samples-000000000016: " in err
    assert "repair or remove them; without them the run starts anew" in err
    assert record(run) == record(finished)


def test_the_checkpoint_of_another_model_is_refused(
    tiny_config: Make, finished: Path, command: Command, tiny_yaml: Path
) -> None:
    run = interrupted(finished, tiny_config().run_folder, 48)
    state = load(run)
    tensors = state.pop("tensors")
    tensors["model.encoder.cls_token"] = tensors["model.encoder.cls_token"][..., :64]
    tensors["model.encoder.extra"] = tensors.pop("model.mask_token")
    save(run / "checkpoints", tensors, state, 48)
    code, _, err = command("train", tiny_yaml)
    assert code == 2
    assert "CheckpointError: the checkpoint is of another model; " in err
    assert "1 missing: model.mask_token" in err
    assert "1 unexpected: model.encoder.extra" in err
    assert "1 of another shape: model.encoder.cls_token [1, 1, 64], not [1, 1, 96]" in err
    assert "use the configuration of that checkpoint's run, or another checkpoint" in err
    assert record(run) == record(finished)
