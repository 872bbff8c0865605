"""`model.init`: an encoder starts from a run, a published file or a timm ViT, and says what it made of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published import published_state
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.nn import functional as F

from foundation.config import Config, from_dict, to_dict
from foundation.errors import CheckpointError
from foundation.initial import initial_weights, spread
from foundation.interchange import load_encoder, random_encoder
from foundation.models.families import FAMILY
from foundation.models.heads import MaskedImageModel, MaskedWindowModel
from foundation.models.initialise import initialise
from foundation.models.position import sincos
from foundation.models.vit import ViT
from foundation.objectives.reconstruction import build_encoder
from foundation.objectives.registry import build
from foundation.planning.sharding import alone
from foundation.training import checkpoint
from foundation.training.blocks import on_meta
from foundation.training.run import train
from foundation.training.sharded import local_piece, shard

timm: Any = pytest.importorskip("timm")
Make = Callable[..., Config]


def config(init: Path | str, pixels: int = 64, objective: str = "pgga", **model: Any) -> Config:
    tree: dict[str, Any] = {"size": "nano", "patch": 8, "attention": "reference", "init": str(init), **model}
    tree["decoder"] = {"width": 24, "depth": 1, "heads": 2}
    return from_dict({"data": {"image_size": pixels}, "model": tree, "objective": {"name": objective, "radii": (3,)}})


def started(run: Config) -> tuple[ViT, str]:
    """The encoder that a run starts with, and its line of the log."""
    initial = initial_weights(run)
    model: Any = build(run).build_model()
    initialise(model, 0, given=initial.values)
    assert isinstance(model.encoder, ViT)
    return model.encoder.eval(), "\n".join(initial.notes)


def a_timm(name: str = "vit_tiny_patch16_224", **more: Any) -> nn.Module:
    """A timm ViT of the nano size with random weights, none of them zero."""
    torch.manual_seed(0)
    shape = {"embed_dim": 96, "depth": 4, "num_heads": 3, "patch_size": 8, "img_size": 64, "num_classes": 5}
    return shaken(timm.create_model(name, **{**shape, **more}))


def shaken(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
    return model.eval()


def saved(model: nn.Module, path: Path) -> Path:
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state}, path)
    return path


def message(run: Config) -> str:
    with pytest.raises(CheckpointError) as caught:
        initial_weights(run)
    return str(caught.value)


@torch.no_grad()
def test_tokens_of_timms_own_vit_tiny_are_the_same_and_at_another_size_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = shaken(timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True))
    path = saved(theirs, tmp_path / "tiny.safetensors")
    run = config(path, 224, "mae", size="tiny", patch=16, channels=3, positions="learned")
    ours, note = started(run)
    assert note == f"initial weights: 150 tensors from {path}"
    for sides in ((224, 224), (160, 288), (64, 64)):
        images = torch.rand(1, 3, *sides)
        assert torch.allclose(ours.forward_features(images), theirs.forward_features(images), atol=1e-5)  # type: ignore[operator]


@torch.no_grad()
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_of_colour_images_give_a_grey_one_the_same_tokens(tmp_path: Path, suffix: str) -> None:
    theirs, images = a_timm(), torch.rand(2, 1, 64, 64)
    path = saved(theirs, tmp_path / f"vit{suffix}")
    expected = theirs.forward_features(images.expand(-1, 3, -1, -1))  # type: ignore[operator]
    ours, note = started(config(path, positions="learned"))
    assert torch.allclose(ours.forward_features(images), expected, atol=1e-5)
    assert "3 channels summed" in note
    pair, note = started(config(path, positions="learned", channels=2))
    assert torch.allclose(pair.forward_features(images.expand(-1, 2, -1, -1)), expected, atol=1e-5)
    assert "3 channels summed and spread over 2" in note


@pytest.mark.parametrize(("channels", "wanted"), [(3, 1), (1, 3), (1, 2), (3, 4)])
def test_patch_weights_of_other_channels_answer_a_repeated_image_alike(channels: int, wanted: int) -> None:
    weight, image = torch.rand(4, channels, 2, 2), torch.rand(1, 2, 2)
    ours = spread(weight, wanted)
    assert ours.shape == (4, wanted, 2, 2)
    assert torch.allclose((ours * image).sum((1, 2, 3)), (weight * image).sum((1, 2, 3)), atol=1e-6)


@torch.no_grad()
def test_learnt_positions_are_resized_to_the_grid_of_the_run_as_timm_resizes_them(tmp_path: Path) -> None:
    theirs = a_timm(dynamic_img_size=True, in_chans=1)
    path = saved(theirs, tmp_path / "vit.safetensors")
    ours, note = started(config(path, 96, positions="learned"))
    assert "positions resized from 8x8 to 12x12" in note
    assert ours.pos_embed is not None
    assert ours.pos_embed.embedding.shape == (1, 144, 96)
    images = torch.rand(1, 1, 96, 96)
    assert torch.allclose(ours.forward_features(images), theirs.forward_features(images), atol=1e-5)  # type: ignore[operator]


VARIANTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"init_values": 0.1}, {"layer_scale": 1.0}),
    ({"qk_norm": True}, {"qk_norm": True}),
    ({"reg_tokens": 4, "no_embed_class": True}, {"registers": 4}),
    ({"reg_tokens": 2}, {"registers": 2}),
    ({"mlp_layer": timm.layers.SwiGLUPacked, "mlp_ratio": 512 / 96, "act_layer": nn.SiLU}, {"mlp": "swiglu"}),
    ({"qkv_bias": False}, {}),
]


@torch.no_grad()
@pytest.mark.parametrize(("theirs", "ours"), VARIANTS, ids=str)
def test_options_of_timm_are_our_options(tmp_path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    model = a_timm(in_chans=1, **theirs)
    encoder, _ = started(config(saved(model, tmp_path / "vit.safetensors"), positions="learned", **ours))
    images = torch.rand(1, 1, 64, 64)
    assert torch.allclose(encoder.forward_features(images), model.forward_features(images), atol=2e-5)  # type: ignore[operator]


def test_relative_tables_start_at_zero_and_positions_of_patches_are_left_out(tmp_path: Path) -> None:
    model = a_timm(in_chans=1)
    encoder, note = started(config(saved(model, tmp_path / "vit.pth")))
    assert re.search("left out: positions of the patches; new: blocks.*.attn.rpe.table$", note)
    state: Any = model.state_dict()
    assert torch.equal(encoder.cls_token.detach(), state["cls_token"] + state["pos_embed"][:, :1])  # type: ignore[union-attr]
    for block in encoder.blocks:
        assert not block.attn.rpe.table.any()  # type: ignore[union-attr, operator]


@pytest.fixture
def published(tmp_path: Path) -> dict[str, tuple[Path, ViT]]:
    """Files with the names of SAR-JEPA, MAE and I-JEPA, and the encoders they hold."""
    windows = MaskedWindowModel(ViT(*FAMILY["nano"], 8), 24, 1, 2, 64)
    images = MaskedImageModel(ViT(*FAMILY["nano"], 8, positions="sincos"), 24, 1, 2, 64)
    table, made = sincos((8, 8), 96, torch.device("cpu"), torch.float32), {}
    fixed = {"pos_embed": F.pad(table, (0, 0, 1, 0)), "decoder_pos_embed": torch.zeros(1, 65, 24)}
    for name, model, more in (("sar-jepa", windows, {}), ("mae", images, fixed)):
        shaken(model)
        torch.save({"model": {**published_state(model), **more}, "epoch": 3}, tmp_path / f"{name}.pth")
        made[name] = tmp_path / f"{name}.pth", model.encoder
    encoder = {
        n: t for n, t in published_state(images).items() if not n.startswith(("decoder", "mask", "encoder_pred"))
    }
    encoder.pop("cls_token")
    encoder["pos_embed"] = table
    wrapped = {f"module.{name}": tensor for name, tensor in encoder.items()}
    other = {name: torch.zeros_like(tensor) for name, tensor in wrapped.items()}
    torch.save({"encoder": other, "predictor": {}, "target_encoder": wrapped, "epoch": 3}, tmp_path / "i-jepa.pth")
    return {**made, "i-jepa": (tmp_path / "i-jepa.pth", images.encoder)}


@torch.no_grad()
@pytest.mark.parametrize(("name", "positions"), [("sar-jepa", "relative"), ("mae", "sincos"), ("mae", "learned")])
def test_published_encoders_say_the_same_here(
    published: dict[str, tuple[Path, ViT]], name: str, positions: str
) -> None:
    path, theirs = published[name]
    encoder, note = started(config(path, positions=positions))
    images = torch.rand(1, 1, 64, 64)
    assert torch.allclose(encoder.forward_features(images), theirs.forward_features(images), atol=1e-5)
    assert "new" not in note
    assert "left out" not in note


def test_of_i_jepa_the_target_encoder_is_taken_and_its_class_token_is_new(
    published: dict[str, tuple[Path, ViT]],
) -> None:
    path, theirs = published["i-jepa"]
    encoder, note = started(config(path, positions="sincos"))
    assert note.endswith("new: cls_token")
    weights = theirs.state_dict()
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, weights[name]) == (name != "cls_token"), name


def shapes_in_pieces(run: Config, ranks: int) -> dict[str, Tensor]:
    """The initial weights that `ranks` processes of FSDP2 hold together."""
    given, found = initial_weights(run).values, dict[str, Tensor]()
    for rank in range(ranks):
        _clear_sharding_prop_cache()  # it would remember the mesh of the rank before, which is equal to this one's
        with alone(ranks, rank, ranks) as mesh:
            model = shard(on_meta(build(run).build_model), mesh, run.train).to_empty(device="cpu")
            initialise(model, run.seed, local_piece, given)
            for name, parameter in model.named_parameters():
                piece = local_piece(parameter)
                whole = found.setdefault(name, torch.full(piece.shape, torch.nan))
                whole.view(-1)[piece.first : piece.first + piece.values.numel()] = piece.values.reshape(-1)
    return found


@pytest.mark.parametrize("kind", [".safetensors", ".pth"])
def test_processes_that_share_a_model_start_from_the_weights_of_one(tmp_path: Path, kind: str) -> None:
    run = config(saved(a_timm(), tmp_path / f"vit{kind}"), 96, "mae", positions="learned")
    model = build(run).build_model()
    initialise(model, run.seed, given=initial_weights(run).values)
    pieces = shapes_in_pieces(run, 3)
    assert all(torch.equal(pieces[name], tensor) for name, tensor in model.state_dict().items())
    drawn = build(run).build_model()
    initialise(drawn, run.seed)
    same = {n for n, tensor in drawn.state_dict().items() if torch.equal(tensor, pieces[n])}
    assert same == {n for n in pieces if not n.startswith("encoder.")}


def test_a_process_reads_nothing_of_tensors_it_holds_nothing_of(tmp_path: Path) -> None:
    run = config(saved(a_timm(in_chans=1), tmp_path / "vit.safetensors"), 64, "mae", positions="learned")
    given, asked = initial_weights(run).values, list[str]()
    _clear_sharding_prop_cache()

    def counted(name: str) -> Callable[[], Tensor]:
        return lambda: (asked.append(name), given[name].read())[1]

    with alone(64, 63, 64) as mesh:
        model = shard(on_meta(build(run).build_model), mesh, run.train).to_empty(device="cpu")
        initialise(model, 0, local_piece, {name: g._replace(read=counted(name)) for name, g in given.items()})
        held = {n for n, p in model.named_parameters() if local_piece(p).values.numel()}
    assert set(asked) == held & given.keys()
    assert "encoder.cls_token" not in held


@pytest.mark.parametrize("whole", [True, False])
def test_a_run_starts_from_another_and_never_again_when_it_goes_on(
    finished: Path, tmp_path: Path, tiny_config: Make, whole: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    source = finished if whole else finished / "checkpoints" / "samples-000000000016"
    run = tiny_config("train.samples=16", f"model.init={source}", "data.image_size=80", "optim.lr=1e-12", "name=second")
    folder = train(run)
    assert f"tensors from {source}" in capsys.readouterr().err
    first, second = (checkpoint.load(path, "model.encoder.")["tensors"] for path in (source, folder))
    assert first.keys() == second.keys()
    assert all(torch.allclose(tensor, first[name], atol=1e-6) for name, tensor in second.items())
    elsewhere = tiny_config(
        "train.samples=16", "model.init=gone.pth", "data.image_size=80", "optim.lr=1e-12", "name=second"
    )
    assert train(elsewhere) == folder  # complete, and nobody looks for its beginning
    assert "already complete" in capsys.readouterr().err


def test_a_run_of_learnt_positions_gives_them_to_one_of_another_size(tmp_path: Path) -> None:
    source = random_encoder(config("unused", 64, positions="learned"), 7)
    state = {"config": {}, "position": 8}
    folder = checkpoint.save(
        tmp_path / "a", {f"model.encoder.{n}": t for n, t in source.state_dict().items()}, state, 8
    )
    encoder, note = started(config(folder, 96, positions="learned"))
    images = torch.rand(1, 1, 96, 96)
    assert torch.allclose(encoder.forward_features(images), source.forward_features(images), atol=1e-6)
    assert "positions resized from 8x8 to 12x12" in note


def test_of_a_run_of_i_jepa_the_teacher_is_taken_as_of_a_published_file_and_by_an_evaluation(
    published: dict[str, tuple[Path, ViT]], tmp_path: Path
) -> None:
    teacher = {n: t for n, t in published["i-jepa"][1].state_dict().items() if n != "cls_token"}
    run = config("unused", positions="sincos", objective="i-jepa")
    model: Any = build(run).build_model()
    initialise(model, 1)
    parts = {"encoder": model.encoder.state_dict(), "teacher": teacher}
    tensors = {f"model.{p}.{n}": t for p, names in parts.items() for n, t in names.items()}
    folder = checkpoint.save(tmp_path / "run", tensors, {"config": to_dict(run), "position": 8}, 8)
    ours, theirs = (started(config(path, positions="sincos"))[0] for path in (folder, published["i-jepa"][0]))
    judged, _ = load_encoder(folder)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name])
        assert name == "cls_token" or torch.equal(tensor, judged.state_dict()[name])


def test_a_gain_of_the_first_weights_has_no_effect_on_given_ones_and_says_so(tmp_path: Path) -> None:
    path = saved(a_timm(in_chans=1), tmp_path / "vit.pth")
    plain, note = started(config(path, positions="learned"))
    assert "input_gain" not in note
    more, note = started(config(path, positions="learned", input_gain=5.0))
    assert "model.input_gain=5 has no effect on given weights" in note
    assert torch.equal(more.patch_embed.proj.weight, plain.patch_embed.proj.weight)


def test_the_random_control_of_an_evaluation_stays_random(tmp_path: Path) -> None:
    run = config(saved(a_timm(), tmp_path / "vit.pth"), positions="learned")
    encoder, plain = random_encoder(run, 3), build_encoder(run)
    initialise(plain, 3)
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in encoder.state_dict().items())


def test_pretrained_weights_come_through_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = a_timm(), list[tuple[str, bool]]()
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained, **_: (asked.append((name, pretrained)), model)[1]
    )
    encoder, note = started(config("timm:vit_tiny_patch16_224.augreg_in21k", positions="learned"))
    assert asked == [("vit_tiny_patch16_224.augreg_in21k", True)]
    assert torch.equal(encoder.norm.weight, model.norm.weight)  # type: ignore[arg-type, union-attr]
    assert "from timm:vit_tiny" in note


def test_timm_without_a_network_or_such_a_model_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.search(
        "timm has no such model[\\s\\S]*model.init = timm:vit_of_nobody", message(config("timm:vit_of_nobody"))
    )

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(timm, "create_model", unreachable)
    text = message(config("timm:vit_tiny_patch16_224"))
    assert "timm could not load these weights: ConnectionError no route to host" in text
    assert "without a network, name a file of weights" in text
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    assert re.search(
        r"timm is not installed[\s\S]*sar-foundation\[timm\]", message(config("timm:vit_tiny_patch16_224"))
    )
