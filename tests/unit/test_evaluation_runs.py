"""Scores of a run: one pass over the images for all protocols, answers and splits beside them, bad input explained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_runs import config_of, make_run
from object_store import ObjectServer
from test_evaluation import NAMES, Chips, Toy, task

from foundation import cli_text
from foundation.config import from_dict
from foundation.errors import CheckpointError, DataError
from foundation.evaluation import predictions, protocols, robustness, runs, splits
from foundation.evaluation.features import listing
from foundation.evaluation.paired import compare_runs
from foundation.evaluation.protocols import ALL, BACKGROUND, PIXELS, PROTOCOLS, RANDOM, Options, Task
from foundation.evaluation.runs import evaluate_run, read_scores
from foundation.evaluation.suite import measure
from foundation.interchange import load_encoder, published, source
from foundation.models.vit import ViT
from foundation.training import checkpoint

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def scored(finished: Path, catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was scored under `knn` on the own splits of its catalog."""
    run = tmp_path_factory.mktemp("scored") / "run"
    shutil.copytree(finished, run)
    evaluate_run(run, str(catalog), "knn", report=False)
    return run


def test_all_protocols_leave_out_shots_that_a_class_does_not_have_and_the_named_one_refuses_them_at_once() -> None:
    told: list[str] = []
    t = task(report=lambda what, *_: told.append(what))
    encoders, least = {RANDOM: Toy()}, int(torch.bincount(t.train.y).min())
    found = measure(encoders, t, "all", Options(shots=(1, least, least + 1), seeds=(0,)), controls=False)
    few = [each.predictions.protocol for each in found if "shot" in each.predictions.protocol]
    assert few == ["1-shot linear", f"{least}-shot linear"]
    told.clear()
    with pytest.raises(DataError, match=f"^{least + 1} shots per class were asked for"):
        measure(encoders, t, "knn,fewshot", Options(shots=(1, least + 1), seeds=(0,)))
    assert told == [], "nothing was computed for it"


def test_the_key_of_a_signed_url_is_in_nothing_that_an_evaluation_writes(
    finished: Path, catalog: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    served = {f"/c/{file.relative_to(catalog)}": file.read_bytes() for file in catalog.rglob("*") if file.is_file()}
    with ObjectServer(served) as server:
        for key in ("S3CR3T-one", "S3CR3T-two"):
            scores = evaluate_run(run, f"{server.url}/c/?sv=2024&sig={key}", "knn", report=key == "S3CR3T-two")
    assert {score.settings["data"].split()[0] for score in scores} == {"c"}, "the name in MLflow, too"
    assert len(scores) == len({(score.encoder, score.metric) for score in scores}), "a new key is no new measurement"
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert run / "report.html" in files
    assert [file for file in files if b"S3CR3T" in file.read_bytes()] == []


def test_all_protocols_share_one_extraction_for_each_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, extract = [], protocols.extract
    monkeypatch.setattr(protocols, "extract", lambda *a, **k: seen.append(k["keep_tokens"]) or extract(*a, **k))
    told: list[tuple[str, int, int]] = []
    t = task(report=lambda *facts: told.append(facts))
    found = measure({"pretrained": Toy(), RANDOM: Toy()}, t, "all", Options(shots=(2,), seeds=(0, 1)))
    assert seen == [True] * 4  # train and test of two encoders
    titles = ("knn", "linear", "attentive", "2-shot linear")
    names = ("pretrained", RANDOM, BACKGROUND, PIXELS)
    assert [(f.predictions.protocol, f.predictions.encoder) for f in found] == [(p, n) for p in titles for n in names]
    for each in found:
        p = each.predictions
        assert p.probabilities.shape == (len(p.seeds), 24, 3)
        assert p.hashes == t.test.hashes
        torch.testing.assert_close(p.probabilities.sum(-1), torch.ones(len(p.seeds), 24))
        right = (p.predicted == p.y).double().mean().item()
        assert each.scores[0].mean == pytest.approx(right)
    stages = list(dict.fromkeys(what for what, _, _ in told))
    assert stages[:3] == ["pretrained: knn", "pretrained: features of the training images",
                          "pretrained: features of the test images"]  # fmt: skip
    assert {f"{n}: {p}" for n in names for p in ALL} <= set(stages)


@pytest.mark.parametrize("protocol", [*PROTOCOLS, "all"])
def test_one_class_is_no_task_under_any_protocol(protocol: str) -> None:
    train = listing(Chips(6, names=("a",)), NAMES)
    alone = Task(train, listing(Chips(3, 500, names=("a",)), NAMES, train.classes), 16)
    with pytest.raises(DataError, match="the 6 training samples have one class only: a"):
        measure({RANDOM: Toy()}, alone, protocol)


def test_images_of_other_channels_are_refused_before_any_is_encoded() -> None:
    with pytest.raises(DataError, match="images have 1 channels, the encoder «random-init» takes 2"):
        measure({RANDOM: ViT(32, 1, 2, 8, channels=2)}, task(), "knn")


def test_a_run_keeps_its_split_and_the_answers_behind_every_score(scored: Path, catalog: Path) -> None:
    scores = read_scores(scored)
    (file,) = (scored / "splits").glob("*.json")
    split = splits.read(file)
    assert {s.settings["split"] for s in scores} == {split.sha256}
    assert {s.settings["split_file"] for s in scores} == {f"splits/{file.name}"}
    kept = predictions.read(scored)
    assert {p.encoder for p in kept} == {s.encoder for s in scores}
    assert {h for p in kept for h in p.hashes} == {row.hash for row in split.side("test")}
    assert all("samples" in p.measurement for p in kept)
    evaluate_run(scored, str(catalog), "knn", report=False)
    assert len(predictions.read(scored)) == len(kept)
    assert len(read_scores(scored)) == len(scores)


def test_a_split_file_gives_the_scores_of_the_splits_it_was_made_from(
    command: Command, scored: Path, catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_text, "EVERY", 0.0)  # a log says at once what goes on
    code, out, err = command("splits", catalog, "--out", tmp_path / "mine.json")
    assert code == 0, err
    assert splits.read(tmp_path / "mine.json").sha256 in out
    before = {(s.encoder, s.metric): s for s in read_scores(scored)}
    code, out, err = command("evaluate", scored, "--data", catalog, "--protocol", "knn", "--split",
                             tmp_path / "mine.json", "--crop", 0)  # fmt: skip
    assert code == 0, err
    assert "pretrained: features of the test images" in err
    new = [s for s in read_scores(scored) if s.settings["data"].startswith("mine.json")]
    assert len(new) == len(before)
    for s in new:
        twin = before[s.encoder, s.metric]
        assert (s.mean, s.low, s.high) == (twin.mean, twin.low, twin.high)


def test_shared_groups_are_marked_in_every_score(scored: Path, catalog: Path, tmp_path: Path) -> None:
    (file,) = (scored / "splits").glob("*.json")
    split = splits.read(file)
    shared = splits.Split(tuple(row._replace(group="one scene") for row in split.rows))
    path = splits.write(shared, tmp_path / "shared.json")
    run = tmp_path / "run"
    shutil.copytree(scored, run)
    with pytest.raises(DataError, match=r"1 groups .* lie in train and in test: one scene"):
        evaluate_run(run, str(catalog), "knn", split=path)
    scores = evaluate_run(run, str(catalog), "knn", split=path, allow_shared_groups=True, report=False)
    marked = [s for s in scores if s.settings["data"].startswith("shared.json")]
    assert marked
    assert all((s.settings["shared_groups"], s.settings["allow_shared_groups"]) == (1, True) for s in marked)
    assert "TRAIN AND TEST SHARE 1 GROUPS" in (run / "scores.md").read_text()


def test_robustness_takes_images_as_evaluate_does_and_is_marked_in_report_and_sent_to_mlflow(
    command: Command, scored: Path, catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, sent = tmp_path / "run", []
    shutil.copytree(scored, run)
    (run / "report.html").unlink(missing_ok=True)
    split = splits.read(next((run / "splits").glob("*.json")))
    shared = splits.Split(tuple(row._replace(group="one scene") for row in split.rows))
    path = splits.write(shared, tmp_path / "shared.json")
    monkeypatch.setattr(runs, "publish", lambda run, config, run_id, files, scores: sent.extend(files))
    asked = ("robustness", run, "--data", catalog, "--split", path, "--corruptions", "gain", "--crop", 0)
    code, _, err = command(*asked)
    assert code == 2
    assert "1 groups (scene) lie in train and in test: one scene" in err
    assert not (run / "robustness.json").exists()
    code, out, err = command(*asked, "--allow-shared-groups")
    assert code == 0, err
    assert "TRAIN AND TEST SHARE 1 GROUPS" in " ".join(out.split())
    kept = json.loads((run / "robustness.json").read_text())["settings"]
    assert (kept["shared_groups"], kept["allow_shared_groups"], kept["split"]) == (1, True, shared.sha256)
    assert splits.read(run / kept["split_file"]) == shared
    assert "Scores of changed test images" in (run / "report.html").read_text()
    assert {"robustness.json", "report.html", "robustness.png"} <= {file.name for file in sent}


def test_two_runs_are_compared_on_the_command_line(command: Command, scored: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(scored, other)
    code, out, err = command("paired", scored, other, "--protocol", "knn")
    assert code == 0, err
    assert "McNemar, exact" in out
    assert "p = 1.000" in out
    assert {(p.difference, p.p) for p in compare_runs(scored, other)} == {(0, 1)}
    code, _, err = command("paired", scored, other, "--protocol", "finetune")
    assert code == 2
    assert "do not both have answers of «pretrained» to finetune" in err


@pytest.mark.parametrize("name", ["vit_base.pth", "model.safetensors", "folder/pytorch_model.bin"])
def test_weights_of_somebody_else_are_named_with_what_to_do(catalog: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    torch.save({"model": {"blocks.0.attn.qkv.weight": torch.zeros(3, 1)}}, file)
    for path in {file, file.parent}:
        with pytest.raises(CheckpointError, match=f"{file.name} is no run or checkpoint of this trainer") as caught:
            evaluate_run(path, str(catalog), "knn")
        assert "foundation import FILE RUN" in str(caught.value)


def test_a_vit_of_another_size_or_patch_is_refused_by_its_tensors(finished: Path, tmp_path: Path) -> None:
    state = checkpoint.load(finished)
    change: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "encoder.patch_embed.proj.weight": lambda t: torch.zeros(*t.shape[:2], 3, 3),
        "encoder.cls_token": lambda t: torch.zeros(1, 1, 5),
    }
    for name, damage in change.items():
        tensors = {f"model.{k.removeprefix('model.')}": v for k, v in state["tensors"].items()}
        tensors[f"model.{name}"] = damage(tensors[f"model.{name}"])
        out = tmp_path / name / "checkpoints"
        checkpoint.save(out, tensors, {"position": 0, "config": state["config"]}, position=0)
        with pytest.raises(CheckpointError, match="of another model; 1 of another shape") as caught:
            load_encoder(tmp_path / name)
        assert name.removeprefix("encoder.") in str(caught.value)


def test_scores_say_how_they_differ_from_the_untrained_encoder(scored: Path) -> None:
    text = (scored / "scores.md").read_text()
    assert "against random-init, paired" in text
    (twin,) = {json.dumps(s.settings["paired"]) for s in read_scores(scored) if "paired" in s.settings}
    assert json.loads(twin)["against"] == RANDOM


def test_the_best_checkpoint_is_scored_where_checkpoints_are_in_an_object_store(
    command: Command, catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, run = f"memory://{tmp_path.name}/checkpoints", tmp_path / "run"
    config = config_of()
    config = config.model_copy(update={"train": config.train.model_copy(update={"checkpoints": url})})
    run.mkdir()
    (run / "config.yaml").write_text(f"train: {{checkpoints: '{url}'}}")
    make_run(run, config, position=2048, pin=True)
    make_run(run, config, position=4096)
    monkeypatch.setattr(runs, "write_run_report", lambda run, *_: run / "report.html")
    for flags, weights in (((), "4,096 samples"), (("--best",), "2,048 samples")):
        code, _, err = command("evaluate", run, "--data", catalog, "--protocol", "knn", "--crop", 0, *flags)
        assert code == 0, err
        assert read_scores(run)[-1].settings["weights"] == weights
    assert not (run / "checkpoints").exists()


@pytest.mark.parametrize("what", ["evaluate", "robustness", "export"])
def test_a_score_names_the_weights_it_is_of_while_the_run_goes_on(
    catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    module = {"evaluate": runs, "robustness": robustness, "export": source}[what]
    run = make_run(tmp_path / "run", config_of(), position=2048)
    seen = list[Any]()

    def loaded(*arguments: Any, **options: Any) -> Any:
        seen.append(load_encoder(*arguments, **options))
        make_run(run, config_of(), position=4096)
        return seen[-1]

    monkeypatch.setattr(module, "load_encoder", loaded)
    if what == "evaluate":
        new = runs.judge_run(run, str(catalog), "knn", controls=False, report=False)
        named = new[0].settings["weights"]
    elif what == "robustness":
        robustness.robustness_run(run, str(catalog), kinds=("gain",))
        named = json.loads((run / robustness.FILE).read_text())["settings"]["weights"]
    else:
        named = f"{source.open_source(run).state['position']:,} samples"
    assert named == "2,048 samples"
    kept = checkpoint.load(run / "checkpoints" / "samples-000000002048", "model.encoder.")["tensors"]
    assert all(torch.equal(value, kept[name]) for name, value in seen[0][0].state_dict().items())


def test_an_encoder_is_of_one_checkpoint_while_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", config_of(), position=2048)

    def later(tree: Any) -> Any:
        make_run(run, config_of(), position=4096)
        return from_dict(tree)

    monkeypatch.setattr(published, "from_dict", later)
    encoder, _ = load_encoder(run)
    kept = checkpoint.load(run / "checkpoints" / "samples-000000002048", "model.encoder.")["tensors"]
    assert all(torch.equal(value, kept[name]) for name, value in encoder.state_dict().items())
