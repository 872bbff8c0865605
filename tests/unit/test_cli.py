"""The command line: every command explains itself, a mistake costs a message and never a traceback."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from processes import finish, interrupted, start

from foundation import cli, cli_help, demo
from foundation.config import Config
from foundation.evaluation import runs as evaluating
from foundation.evaluation.protocols import Options
from foundation.models.families import FAMILY
from foundation.objectives.registry import OBJECTIVES
from foundation.objectives.registry import build as build_objective
from foundation.training.engines import ENGINES
from kernels.rpe_attention import BACKENDS
from shards import catalog as catalogs

Command = Callable[..., Any]
PNG = "data:image/png;base64,"


def commands() -> list[tuple[str, ...]]:
    group: Any = typer.main.get_command(cli.app)
    inner = [("shards", name) for name in group.commands["shards"].commands]
    return [(), *((name,) for name in group.commands), *inner]


def assert_self_contained(page: Path) -> str:
    """Nothing is fetched and nothing lies beside the page: every picture is inside it."""
    html = page.read_text()
    sources = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', html)
    assert len(sources) >= 3
    assert all(source.startswith((PNG, "#")) for source in sources)
    assert "<script src" not in html
    assert "@import" not in html
    return html


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_has_help(command: Command, words: tuple[str, ...]) -> None:
    code, out, _ = command(*words, "--help")
    assert code == 0
    assert "Usage:" in out
    # A usage that is too long goes on in an indented line.
    description = [line for line in out.splitlines() if line.strip() and not line.startswith("    ")][1]
    assert len(description.split()) >= 3, description


def test_help_is_a_page(command: Command) -> None:
    code, out, _ = command("--help")
    assert code == 0
    assert cli_help.HELP in out
    places = [out.index(f"─ {title} ─") for title in cli_help.GROUPS]
    assert places == sorted(places)
    assert "─ Commands ─" not in out, "every command has a group"
    assert out.index("foundation demo") < out.index("foundation shards pack corpus CHIPS")
    assert out.index("foundation demo") > places[-1]


def test_the_module_is_the_command() -> None:
    code, output = finish(start("list", "engines"))
    assert code == 0
    assert "ddp" in output


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("models", FAMILY),
        ("objectives", OBJECTIVES),
        ("engines", ENGINES),
        ("attention", BACKENDS),
        ("sources", ("folder",)),
    ],
)
def test_list_shows_every_part(command: Command, what: str, names: tuple[str, ...]) -> None:
    code, out, _ = command("list", what)
    assert code == 0
    assert names
    for name in names:
        assert re.search(rf"\b{re.escape(name)}\b", out), name


def test_a_misspelt_key_is_answered_with_the_right_one(command: Command, tiny_yaml: Path, tmp_path: Path) -> None:
    code, out, err = command("train", tiny_yaml, "optim.lrr=1", "train.sample=5")
    assert code == 2
    assert "ConfigError: Found 2 errors" in err
    assert "optim.lrr = 1: no such key; did you mean optim.lr?" in err
    assert "train.sample = 5: no such key; did you mean train.samples?" in err
    assert "Traceback" not in out + err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "{}/none.yaml"), "none.yaml: cannot be read (No such file or directory)"),
        (("evaluate", "{}", "--data", "{}"), "CheckpointError: there is no checkpoint"),
        (("report", "{}"), "ConfigError"),
        (("import", "{}/none.pth", "{}/out"), "CheckpointError: cannot read this file as a checkpoint"),
        (("shards", "inspect", "{}"), "DataError: no catalog here"),
        (("shards", "verify", "{}/catalog.json"), "DataError: no catalog here"),
        (("shards", "pack", "{}/out", "{}/none", "--name", "x"), "DataError: no such folder or file"),
        (("shards", "pack", "{}/out", "{}", "--name", "x"), "DataError: source 'x' has no usable image"),
        (("shards", "pack", "{}/out", "{}", "--name", "x", "--kind", "mstr"), "(did you mean mstar?)"),
        (("shards", "pack", "{}/out", "{}", "--name", "x", "--option", "tile"), "'tile' is not KEY=VALUE"),
        (("shards", "pack", "{}/out", "{}", "--name", "x", "--decibels", "40"), "needs --scale"),
        (("shards", "pack", "{}/out", "{}", "--name", "x", "--overlap", "8"), "needs --tile: kind folder"),
        (
            ("shards", "pack", "{}/out", "{}", "--name", "x", "--overlap", "8", "--tile", "8"),
            "8 leaves nothing",
        ),
        (
            ("shards", "pack", "{}/out", "{}", "--name", "x", "--overlap", "300", "--kind", "sicd"),
            "tiles of 256",
        ),
        (("shards", "pack", "s3://bucket/out", "{}", "--name", "x"), "foundation shards copy FOLDER URL"),
        (("shards", "sources", "mstr"), "(did you mean mstar?)"),
    ],
    ids=lambda value: " ".join(value).replace("{}", "F") if isinstance(value, tuple) else "",
)
def test_a_mistake_is_explained_without_a_traceback(
    command: Command, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    code, out, err = command(*(word.format(tmp_path) for word in words))
    assert code == 2
    assert message in err
    assert "  do:    " in err or "Usage: " in err
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    ("typed", "offered"), [("foundation tr", ["train", "track"]), ("foundation shards au", ["audit"])]
)
def test_a_shell_completes_commands(typed: str, offered: list[str]) -> None:
    asked = {"_FOUNDATION_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    program = "import sys; sys.argv = ['foundation']; from foundation.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | asked, capture_output=True, text=True)
    assert sorted(done.stdout.split()) == sorted(offered), done.stderr


def test_a_list_of_shots_that_is_none_is_refused(command: Command, tmp_path: Path) -> None:
    code, _, err = command("evaluate", tmp_path, "--data", tmp_path, "--shots", "10,x")
    assert code == 2
    assert "'10,x' is not a list of whole numbers such as 10,20,40" in err


def test_square_brackets_in_a_message_stay(command: Command, tiny_yaml: Path) -> None:
    code, _, err = command("train", tiny_yaml, "objective.radii=[70]")
    assert code == 2
    assert "objective.radii = [70]: radii below data.image_size = 64" in err


def test_pack_inspect_and_verify_agree(command: Command, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for kind in ("ship", "tank"):
        (tmp_path / "chips" / kind).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(rng.integers(1, 255, (20, 24), np.uint8)).save(tmp_path / "chips" / kind / f"{i}.png")
    out = tmp_path / "packed"
    code, text, _ = command("shards", "pack", out, tmp_path / "chips", "--name", "mine", "--split", "train")
    assert code == 0
    assert re.search(r"\bmine\b.*\btrain\b.*\b10\b", text)
    catalog = catalogs.load(out)
    assert catalog.fingerprint[:12] in text
    assert catalog.classes == ("ship", "tank")
    code, text, _ = command("shards", "inspect", out, "--sheet", tmp_path / "sheet.png")
    assert code == 0
    assert Image.open(tmp_path / "sheet.png").size[0] > 24
    code, text, _ = command("shards", "verify", out)
    assert (code, text.strip()) == (0, "10 samples as the catalog says")
    shard = next(out.glob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    code, _, err = command("shards", "verify", out)
    assert code == 2
    assert f"DataError: shard {shard.name} has changed: its sha256 is not the packed one" in err


def test_a_kind_of_source_explains_itself(command: Command) -> None:
    code, out, _ = command("shards", "sources", "mstar")
    assert code == 0
    assert re.search(r"layout +The ten-class standard.*--option variants=yes takes all", out)
    assert re.search(r"--option variants= +yes: ", out)
    assert re.search(r"part train +split train: 2,747 files \(2S1 299, ", out)


def test_a_file_that_cannot_be_written_is_refused_before_the_work(command: Command, tmp_path: Path) -> None:
    code, *_ = command("shards", "synth", tmp_path / "c", "--size", 32, "--pretrain", 2, "--train-per-class", 1,
                       "--test-per-class", 0)  # fmt: skip
    assert code == 0
    (tmp_path / "file").write_text("")
    for words in (("inspect", "--sheet"), ("audit", "--out")):
        for target, message in ((tmp_path, "is a directory"), (tmp_path / "file" / "x", "cannot be written")):
            code, out, err = command("shards", words[0], tmp_path / "c", words[1], target)
            assert code == 2
            assert message in " ".join(err.replace("│", " ").split())
            assert "found" not in out


def test_what_seems_wrong_in_a_packing_is_told_once(command: Command, tmp_path: Path) -> None:
    Image.fromarray(np.full((9, 9), 3, np.uint8)).save(tmp_path / "a.png")
    code, out, err = command("shards", "pack", tmp_path / "o", tmp_path, "--name", "x", "--exclude", "b*")
    assert code == 0, err
    assert out.count("no file matches --exclude 'b*'") == 1


def test_verify_rebuilds_the_indexes(command: Command, tmp_path: Path) -> None:
    code, *_ = command("shards", "synth", tmp_path, "--size", 32, "--pretrain", 9, "--train-per-class", 2,
                       "--test-per-class", 0)  # fmt: skip
    assert code == 0
    for index in tmp_path.glob("*.idx"):
        index.unlink()
    code, _, err = command("shards", "verify", tmp_path)
    assert code == 2
    assert "--rebuild" in err
    code, out, _ = command("shards", "verify", tmp_path, "--rebuild")
    assert code == 0, out
    assert "2 indexes written" in out
    assert "25 samples as the catalog says" in out


def test_a_trained_run_is_scored_beside_its_controls(
    command: Command, finished: Path, catalog: Path, tmp_path: Path
) -> None:
    run = interrupted(finished, tmp_path / "run", 96)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluating, "write_run_report", lambda run, *_: run / "report.html")  # one is enough, the last
        for protocol in ("knn", "linear"):
            code, out, err = command("evaluate", run, "--data", catalog, "--protocol", protocol)
            assert code == 0, err
    fewshot = ("--protocol", "fewshot", "--shots", "1,2", "--seeds", 2)
    code, out, err = command("evaluate", run, "--data", catalog, *fewshot)
    assert code == 0, err
    scores = json.loads((run / "scores.json").read_text())
    rows = scores["scores"] if isinstance(scores, dict) else scores
    protocols = {(row["protocol"], row["encoder"]) for row in rows}
    encoders = ("pretrained", "random-init", "background only", "pixels (PCA)")
    assert protocols == {(p, e) for p in ("knn", "linear", "1-shot linear", "2-shot linear") for e in encoders}
    assert all(0 <= row["low"] <= row["mean"] <= row["high"] <= 1 for row in rows)
    for word in (*encoders, "knn", "linear", "1-shot linear"):
        assert word in out
    html = assert_self_contained(run / "report.html")
    assert all(word in html for word in (*encoders, "2-shot linear"))
    (run / "report.html").unlink()
    code, out, _ = command("report", run)
    assert code == 0
    assert "report" in out
    assert all(word in assert_self_contained(run / "report.html") for word in encoders)


def published(config: Config) -> dict[str, torch.Tensor]:
    """A state dict under the published names, made from this trainer's model."""
    names = (
        (r"^encoder\.", ""),
        (r"^decoder\.embed\.", "encoder_pred."),
        (r"^decoder\.(blocks|norm|pred)", r"decoder_\1"),
        (r"\.attn\.rpe\.table$", ".attn.rpe_k.lookup_table_weight"),
        (r"\.(fc[12])\.", r".mlp.\1."),
    )

    def name(ours: str) -> str:
        for pattern, theirs in names:
            ours = re.sub(pattern, theirs, ours)
        return ours

    return {name(key): value for key, value in build_objective(config).build_model().state_dict().items()}


def test_an_imported_model_gets_a_report_from_named_data(
    command: Command, tiny_config: Callable[..., Config], catalog: Path, tmp_path: Path
) -> None:
    defaults = ("data.image_size=224", "model.patch=16", "objective.windows=4", "objective.window=7")
    config = tiny_config(*defaults, "objective.radii=[5,9,13,17]")
    torch.save({"model": published(config), "args": argparse.Namespace(lr=1)}, tmp_path / "theirs.pth")
    code, out, err = command("import", tmp_path / "theirs.pth", tmp_path / "imported")
    assert code == 0, err
    assert "samples-000000000000" in out
    code, out, err = command("report", tmp_path / "imported", "--data", catalog)
    assert code == 0, err
    assert_self_contained(tmp_path / "imported" / "report.html")


@pytest.mark.usefixtures("reported")
def test_the_demo_runs_to_its_verdict_and_can_be_repeated(
    command: Command, monkeypatch: pytest.MonkeyPatch, tiny_yaml: Path, catalog: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "demo-corpus").symlink_to(catalog)
    monkeypatch.setattr(demo, "CONFIG", tiny_yaml)
    evaluate, kept, mean = demo.evaluate_run, {}, {"pretrained": 0.6, "random-init": 0.55}

    def smaller(run: Path, data: Path, protocol: str, _: Any) -> Any:
        if protocol not in kept:
            kept[protocol] = evaluate(run, data, protocol, Options(shots=(1,), seeds=(0,)))
        scores = kept[protocol]
        return [replace(s, mean=mean[s.encoder]) if s.protocol == "linear" and s.encoder in mean else s for s in scores]

    monkeypatch.setattr(demo, "evaluate_run", smaller)
    code, out, err = command("demo", "--root", tmp_path / "out")
    assert code == 0, err
    assert "linear probe: pretrained 60.0 % beats random-init 55.0 %" in out
    assert_self_contained(tmp_path / "out" / "tiny" / "report.html")
    mean["pretrained"] = 0.5
    code, out, err = command("demo", "--root", tmp_path / "out")
    assert code == 1, err
    assert "resumed from samples-000000000096" in err
    assert "linear probe: pretrained 50.0 % DOES NOT BEAT random-init 55.0 %" in out


def test_the_best_checkpoint_needs_a_probe_that_named_one(finished: Path, catalog: Path, command: Command) -> None:
    outcome = command("evaluate", finished, "--data", catalog, "--best")
    assert outcome.code == 2
    assert "no checkpoint is pinned as the best by a probe" in outcome.err
