"""An export gives back the features of its run, says what it is, and is refused where a format cannot hold it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from exported_runs import config_of, make_run, write_scores
from published import published_state
from torch import Tensor

import foundation
from foundation.config import config_hash
from foundation.errors import CheckpointError, ConfigError, StorageError
from foundation.interchange import export as exporting
from foundation.interchange import import_published, timm_format
from foundation.interchange.export import FORMATS, export, load_export
from foundation.interchange.published import load_encoder
from foundation.interchange.saratrx import FORMAT
from foundation.interchange.source import images, open_source
from foundation.objectives.registry import build

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, the older one pinned."""
    folder = tmp_path_factory.mktemp("run") / "made"
    make_run(folder, config_of(), position=2048, pin=True)
    return make_run(folder, config_of(), position=4096)


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of MAE with two channels, of a size that timm has too."""
    pytest.importorskip("timm", reason="needs the extra timm")
    config = config_of("sincos", size="tiny", patch=16, channels=2)
    return make_run(tmp_path_factory.mktemp("fixed") / "made", config)


def pictures(channels: int = 1, side: int = 32) -> Tensor:
    return torch.rand(2, channels, side, side, generator=torch.Generator().manual_seed(3))


def refusal(kind: type[Exception], *arguments: Any, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        export(*arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize("form", ["torch", "huggingface", "timm"])
def test_an_exported_encoder_is_built_and_loaded_again_with_the_same_tensors(
    run: Path, tmp_path: Path, form: str
) -> None:
    if form != "torch":
        pytest.importorskip("timm", reason="needs the extra timm")
    made = export(run, tmp_path / "out", form)
    encoder, facts = foundation.load_export(made.path)
    ours, config = load_encoder(run)
    assert made.gap == 0
    assert not encoder.training
    assert {n: t.tolist() for n, t in encoder.state_dict().items()} == {
        n: t.tolist() for n, t in ours.state_dict().items()
    }
    assert (facts["config_hash"], facts["samples"], facts["averaged"]) == (config_hash(config), 4096, False)
    assert sorted(p.name for p in made.path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert {oct(p.stat().st_mode & 0o444) for p in made.path.iterdir()} == {"0o444"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert "x/corpus" not in (made.path / "config.json").read_text()


def test_where_the_weights_began_is_no_part_of_an_export(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", config_of(init="/home/someone/weights.pth"))
    out = export(folder, tmp_path / "out", "torch").path
    assert not any("someone" in (out / name).read_text() for name in ("config.json", "README.md"))


@pytest.mark.parametrize("which", ["newest", "averaged", "best"])
def test_the_weights_asked_for_are_exported(run: Path, tmp_path: Path, which: str) -> None:
    made = export(run, tmp_path / "out", "torch", averaged=which == "averaged", best=which == "best")
    encoder, facts = load_export(made.path)
    position = 2048 if which == "best" else 4096
    ours, _ = load_encoder(run / "checkpoints" / f"samples-{position:012d}", averaged=which == "averaged")
    assert torch.equal(encoder.cls_token, ours.cls_token)
    assert (facts["samples"], facts["averaged"]) == (position, which == "averaged")


@pytest.mark.parametrize("form", ["timm", "huggingface"])
def test_timm_loads_an_exported_folder_in_every_way(run: Path, tmp_path: Path, form: str) -> None:
    timm = pytest.importorskip("timm", reason="needs the extra timm")
    if not hasattr(timm.models._hub, "load_model_config_from_path"):
        pytest.skip("this timm reads no local folders")
    out = export(run, tmp_path / "out", form, pool="avg").path
    ours, _ = load_encoder(run)
    x = pictures()
    with torch.no_grad():
        expected = ours.forward_features(x)[:, 1:].mean(1)
        assert torch.equal(timm.create_model(f"local-dir:{out}", pretrained=True).eval()(x), expected)
        weights = out / "model.safetensors"
        overlay = {"file": str(weights)}
        for options in ({"checkpoint_path": weights}, {"pretrained": True, "pretrained_cfg_overlay": overlay}):
            model = timm.create_model("sar_vit_nano_patch8_224", global_pool="avg", **options).eval()
            assert torch.equal(model(x), expected)
        classes = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=5, in_chans=3).eval()
        assert torch.allclose(
            classes.forward_head(classes.forward_features(x.expand(-1, 3, -1, -1)), True), expected, atol=1e-5
        )
        maps = timm.create_model(f"local-dir:{out}", pretrained=True, features_only=True).eval()(x)
    assert [m.shape for m in maps] == [(2, 96, 4, 4)] * 4
    config = json.loads((out / "config.json").read_text())
    assert (config["architecture"], config["num_features"], config["global_pool"]) == (
        "sar_vit_nano_patch8_224",
        96,
        "avg",
    )
    assert config["pretrained_cfg"]["input_size"] == [1, 32, 32]
    assert (config["pretrained_cfg"]["mean"], config["pretrained_cfg"]["std"]) == ([0.0], [1.0])
    assert config["pretrained_cfg"]["interpolation"] == "bicubic"


def test_fixed_positions_go_to_a_stock_vit_that_needs_nothing_of_ours(fixed: Path, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="needs the extra timm")
    made = export(fixed, tmp_path / "out", "timm-stock")
    model = timm.create_model(f"local-dir:{made.path}", pretrained=True).eval()
    ours, _ = load_encoder(fixed)
    assert type(model).__module__ == "timm.models.vision_transformer"
    with torch.no_grad():
        assert torch.allclose(model(pictures(2)), ours(pictures(2)), atol=1e-4)
    assert made.gap < 1e-4
    assert "import foundation" not in (made.path / "README.md").read_text()
    with pytest.raises(CheckpointError, match="this is no export of the format"):
        load_export(made.path)


def test_fixed_positions_go_to_our_architecture_too(fixed: Path, tmp_path: Path) -> None:
    made = export(fixed, tmp_path / "out", "timm")
    config = json.loads((made.path / "config.json").read_text())
    assert made.gap == 0
    assert config["model_args"] == {"in_chans": 2, "positions": "sincos", "global_pool": "token"}


@pytest.mark.parametrize("form", ["timm", "timm-stock"])
def test_registers_go_to_timm_too(form: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="needs the extra timm")
    run = make_run(tmp_path / "run", config_of("sincos", size="tiny", patch=16, registers=2))
    made = export(run, tmp_path / "out", form)
    arguments = json.loads((made.path / "config.json").read_text())["model_args"]
    assert made.gap < 1e-4
    assert arguments["registers" if form == "timm" else "reg_tokens"] == 2
    model = timm.create_model(json.loads((made.path / "config.json").read_text())["architecture"], **arguments)
    assert model.num_prefix_tokens == 3


def test_an_encoder_without_a_class_token_is_pooled_by_the_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm = pytest.importorskip("timm", reason="needs the extra timm")
    model = timm.create_model("sar_vit_nano_patch8_224", class_token=False, global_pool="avg")
    assert (model.num_prefix_tokens, "cls_token" in model.state_dict()) == (0, False)
    with pytest.raises(
        ValueError, match="global_pool 'token' needs a class token, which this encoder does not have: use 'avg'"
    ):
        timm.create_model("sar_vit_nano_patch8_224", class_token=False)


def test_an_onnx_graph_takes_any_batch_and_gives_the_same_features(run: Path, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs the extra export")
    import onnx
    import onnxruntime

    made = export(run, tmp_path / "out", "onnx")
    session = onnxruntime.InferenceSession(made.path / "model.onnx", providers=["CPUExecutionProvider"])
    ours, _ = load_encoder(run)
    for batch in (1, 3):
        x = torch.rand(batch, 1, 32, 32, generator=torch.Generator().manual_seed(batch))
        features, patches = (
            torch.from_numpy(v) for v in session.run(["features", "patch_tokens"], {"images": x.numpy()})
        )
        with torch.no_grad():
            tokens = ours.forward_features(x)
        assert (features - tokens[:, 0]).abs().max() < 1e-4
        assert (patches - tokens[:, 1:]).abs().max() < 1e-4
    assert 0 < made.gap < 1e-4
    graph = onnx.load(made.path / "model.onnx")
    assert [o.version for o in graph.opset_import if not o.domain] == [18]
    assert session.get_inputs()[0].shape[1:] == [1, 32, 32]
    assert json.loads((made.path / "config.json").read_text())["foundation"]["opset"] == 18


def test_a_graph_that_computes_something_else_is_not_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = exporting.features
    monkeypatch.setattr(exporting, "features", lambda s, x: tuple(v + 2e-4 for v in real(s, x)))
    text = refusal(CheckpointError, run, tmp_path / "out", "torch")
    assert "features of the export differ by 2.0e-04, allowed is 1e-04; nothing was written" in text
    assert list(tmp_path.iterdir()) == []


def test_a_card_says_what_was_learned_how_good_it_is_and_how_it_is_loaded(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="needs the extra timm")
    write_scores(run, "4,096 samples")
    out = export(run, tmp_path / "out", "huggingface").path
    text = (out / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "timm"
    assert "license" not in yaml.safe_load(front)
    config = load_encoder(run)[1]
    for expected in (
        f"hash `{config_hash(config)}`",
        f"data: `corpus`, fingerprint `{'f1a9' * 16}`",
        "samples seen: 4,096 of",
        "`sar-jepa`, multi-scale gradient-ratio features",
        "| pretrained | knn | accuracy | 73.1 % | 72.1 – 74.1 |",
        "| random-init | knn | accuracy | 22.3 % |",
        "Test images among the pretraining images, by content hash: 0.",
        "no mean or standard deviation",
        "Not set: whoever publishes these weights chooses it",
        'load_export("FOLDER")',
    ):
        assert expected in body
    assert "None is of the weights" not in body


def test_a_card_says_when_its_scores_are_of_other_weights_and_what_the_leakage_report_says(
    run: Path, tmp_path: Path
) -> None:
    write_scores(run, "9,999 samples")
    verdict = {"verdict": "leaked", "sentence": "The encoder was PRETRAINED ON 3 of 50 test images themselves."}
    (run / "leakage.json").write_text(json.dumps(verdict))
    text = (export(run, tmp_path / "out", "torch", averaged=True).path / "README.md").read_text()
    assert "**None is of the weights in this folder (4,096 samples, averaged).**" in text
    assert "**The encoder was PRETRAINED ON 3 of 50 test images themselves.**" in text
    assert "weights: running average" in text
    (run / "leakage.json").write_text(json.dumps({"verdict": "clean", "sentence": "None of the 50 was learnt."}))
    assert "\nNone of the 50 was learnt.\n" in (export(run, tmp_path / "b", "torch").path / "README.md").read_text()
    (run / "leakage.json").unlink()
    (run / "scores.json").unlink()
    text = (export(run, tmp_path / "c", "torch").path / "README.md").read_text()
    assert "None were measured: run `foundation evaluate`" in text
    assert "Not checked: the run has neither" in text


def test_imported_weights_are_exported_with_their_origin(tmp_path: Path) -> None:
    torch.save(published_state(build(config_of(side=64, patch=16)).build_model()), tmp_path / "a.pth")
    out = export(import_published(tmp_path / "a.pth", tmp_path / "run"), tmp_path / "out", "torch").path
    assert "origin: published weights, imported from `a.pth`" in (out / "README.md").read_text()


def test_an_architecture_with_other_tensors_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("timm", reason="needs the extra timm")
    real = timm_format.encoder_state
    monkeypatch.setattr(timm_format, "encoder_state", lambda s: real(s) | {"gamma": torch.zeros(1)})
    text = refusal(CheckpointError, run, tmp_path / "out", "huggingface")
    assert "timm's sar_vit_nano_patch8_224 has other tensors than this encoder" in text
    assert "1 unexpected: gamma" in text


def test_the_example_in_a_card_runs(run: Path, tmp_path: Path) -> None:
    out = export(run, tmp_path / "out", "torch").path
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0].replace("FOLDER", str(out))
    names: dict[str, Any] = {"images": pictures()}
    exec(code, names)
    with torch.no_grad():
        assert torch.equal(names["features"], load_encoder(run)[0](pictures()))


def test_the_command_line_prints_the_folder_and_the_difference(run: Path, tmp_path: Path, command: Command) -> None:
    outcome = command("export", run, tmp_path / "out", "--format", "torch", "--ema")
    assert outcome.code == 0
    assert f"{tmp_path / 'out'}, features differ by 0.0e+00 after loading it again" in outcome.out
    assert load_export(tmp_path / "out")[1]["averaged"]


@pytest.mark.parametrize(
    ("model", "form", "message"),
    [
        ({"patch": 4}, "timm", "timm has no sar_vit of patch 4: 8, 14, 16, 32 are registered"),
        ({"patch": 4}, "huggingface", "export with --format torch or onnx"),
        ({"layer_scale": 0.1}, "timm", "model.layer_scale = 0.1"),
        ({"mlp": "swiglu", "qk_norm": True}, "huggingface", "model.mlp = 'swiglu', model.qk_norm = True"),
        ({"positions": "learned"}, "timm", "model.positions = 'learned'"),
        ({"layer_scale": 0.1, "positions": "sincos"}, "timm-stock", "export with --format torch or onnx"),
        ({}, "timm-stock", "a stock vit of timm cannot hold tables of relative positions"),
        ({"positions": "sincos"}, "timm-stock", "timm has no vit_nano_patch8_224"),
    ],
)
def test_a_model_that_timm_cannot_hold_is_refused(
    tmp_path: Path, model: dict[str, Any], form: str, message: str
) -> None:
    pytest.importorskip("timm", reason="needs the extra timm")
    folder = make_run(tmp_path / "run", config_of(**model))
    assert message in refusal(CheckpointError, folder, tmp_path / "out", form)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_left_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    assert "an export is written into a new folder" in refusal(StorageError, run, tmp_path, "torch")
    assert "unknown format 'caffe'" in refusal(ConfigError, run, tmp_path / "out", "caffe")
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]
    (tmp_path / "empty").mkdir()
    assert export(run, tmp_path / "empty", "torch").path == tmp_path / "empty"


def test_an_export_goes_into_the_folder_one_works_in(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert export(run, Path(), "torch").path == tmp_path / "here"
    assert load_export(Path())[1]["samples"] == 4096
    assert [p.name for p in tmp_path.iterdir()] == ["here"]


def test_a_run_without_what_was_asked_for_is_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", config_of())
    text = refusal(CheckpointError, folder, tmp_path / "o", "torch", best=True)
    assert "no checkpoint is pinned as the best by a probe" in text
    assert "there is no checkpoint" in refusal(CheckpointError, tmp_path / "absent", tmp_path / "o", "torch")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "this is no exported encoder: FileNotFoundError"),
        ("{", "this is no exported encoder: JSONDecodeError"),
        ("[]", "this is no exported encoder: TypeError"),
        ('{"architecture": "vit"}', "this is no exported encoder: KeyError 'foundation'"),
        ('{"foundation": {"format": "of tomorrow"}}', "this is no export of the format «sar-foundation encoder"),
        (f'{{"foundation": {{"format": "{FORMAT}"}}}}', "says how the encoder is built: KeyError 'parts'"),
        (f'{{"foundation": {{"format": "{FORMAT}", "hivit": {{"width": 3}}}}}}', "is built: TypeError"),
    ],
)
def test_a_folder_that_is_no_export_is_named(run: Path, tmp_path: Path, content: str | None, message: str) -> None:
    out = export(run, tmp_path / "out", "torch").path
    (out / "config.json").unlink()
    if content is not None:
        (out / "config.json").write_text(content)
    with pytest.raises(CheckpointError) as caught:
        load_export(out)
    assert message in str(caught.value)
    assert "name a folder that `foundation export` wrote" in str(caught.value)


def test_weights_that_do_not_fit_their_configuration_are_named(run: Path, tmp_path: Path) -> None:
    out = export(run, tmp_path / "out", "torch").path
    config = json.loads((out / "config.json").read_text())
    config["foundation"]["parts"]["model"]["size"] = "tiny"
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="the checkpoint is of another model"):
        load_export(out)
    (out / "model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="this is no exported encoder: SafetensorError"):
        load_export(out)


@pytest.mark.parametrize(("form", "package", "extra"), [("timm", "timm", "timm"), ("onnx", "onnxruntime", "export")])
def test_a_missing_package_is_named_with_its_extra(
    run: Path, tmp_path: Path, form: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    text = refusal(ConfigError, run, tmp_path / "out", form)
    assert f"pip install 'sar-foundation[{extra}]'" in text
    assert not (tmp_path / "out").exists()


def test_the_images_of_the_comparison_are_addressed(run: Path) -> None:
    source = open_source(run)
    assert torch.equal(images(source, 3)[1:], images(source, 2, first=1))
    assert images(source, 1).shape == (1, 1, 32, 32)
    assert set(FORMATS) == {"timm", "timm-stock", "torch", "onnx", "huggingface"}
