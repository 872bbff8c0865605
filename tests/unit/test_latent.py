"""I-JEPA: blocks are a function of (seed, position), the teacher follows exactly, features do not collapse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from latent_runs import config, images, latent
from torch import Tensor
from torch.nn import functional as F

from foundation.config import Config, from_dict, load
from foundation.errors import CheckpointError, ConfigError
from foundation.evaluation.panels import model_panels
from foundation.interchange import import_published, load_encoder
from foundation.models.initialise import initialise
from foundation.models.position import sincos
from foundation.objectives.masks import batch_blocks, block_sizes, in_block, multi_block
from foundation.objectives.reconstruction import build_encoder
from foundation.objectives.registry import build
from foundation.training import checkpoint
from foundation.training.collapse import feature_std
from foundation.training.engine import Engine
from foundation.training.optim import lr_at, weight_decay_at
from foundation.training.run import train
from foundation.training.setup import build_learner
from foundation.training.step import train_step
from shards import synthetic
from shards.catalog import load as open_catalog
from shards.stream import Batch

FILE = Path(__file__).parents[2] / "configs" / "objectives" / "i-jepa.yaml"
BRIEF = settings(max_examples=25, deadline=None)
SCALE, ASPECT = (0.15, 0.2), (0.75, 1.5)


# --- blocks


@BRIEF
@given(side=st.sampled_from([8, 14, 16]), seed=st.integers(0, 9), number=st.integers(0, 2**30), batch=st.integers(1, 9))
def test_targets_are_blocks_in_range_and_the_context_is_the_rest_of_a_larger_one(
    side: int, seed: int, number: int, batch: int
) -> None:
    grid, begin = (side, side), number * batch
    targets, contexts = block_sizes(grid, SCALE, ASPECT), block_sizes(grid, (0.85, 1.0), (1.0, 1.0))
    blocks = batch_blocks(seed, begin, batch, grid, 4, tuple(targets), tuple(contexts))
    height, width = blocks.target
    assert SCALE[0] <= height * width / side**2 <= SCALE[1]
    assert ASPECT[0] <= height / width <= ASPECT[1]
    assert 0.85 <= blocks.context[0] * blocks.context[1] / side**2 <= 1
    context, wanted = multi_block(seed, torch.arange(begin, begin + batch), grid, 4, blocks)
    assert context.shape == (batch, blocks.kept)
    assert wanted.shape == (batch, 4, height * width)
    assert (context.diff(dim=1) > 0).all()
    for seen, hidden in zip(context.tolist(), wanted.tolist(), strict=True):
        assert not {*seen} & {patch for block in hidden for patch in block}
        assert {*seen} <= {*range(side**2)}
        rows, columns = {p // side for p in seen}, {p % side for p in seen}
        assert max(rows) - min(rows) < blocks.context[0]
        assert max(columns) - min(columns) < blocks.context[1]
        for block in hidden:
            top, left = divmod(block[0], side)
            assert block == [(top + i) * side + left + j for i in range(height) for j in range(width)]
            assert top + height <= side
            assert left + width <= side
    free = [len(range(blocks.context[0] * blocks.context[1])) - 4 * height * width, blocks.context[0] ** 2]
    assert max(1, free[0]) <= blocks.kept <= free[1]


@BRIEF
@given(seed=st.integers(0, 9), number=st.integers(0, 2**30), micro=st.sampled_from([1, 2, 4, 8]))
def test_blocks_do_not_depend_on_micro_batches(seed: int, number: int, micro: int) -> None:
    run = config(train={"global_batch": 8}).model_copy(update={"seed": seed})
    begin, objective = 8 * number, latent(run)
    positions = torch.arange(begin, begin + 8)
    whole = objective.prepare(images(8), positions, begin).model_args
    for rows in torch.arange(8).split(micro):
        torch.rand(3)  # the global generator plays no part
        part = objective.prepare(images(8)[rows], positions[rows], begin).model_args
        assert all(torch.equal(ours, theirs[rows]) for ours, theirs in zip(part, whole, strict=True))


def test_the_context_is_cut_to_the_smallest_of_the_global_batch_and_no_further() -> None:
    sizes = ((6, 6),), ((13, 13),)
    few, many = (batch_blocks(0, 0, batch, (14, 14), 4, *sizes).kept for batch in (4, 4096))
    assert 169 - 4 * 36 <= many < few
    context, targets = multi_block(0, torch.arange(4), (14, 14), 4, batch_blocks(0, 0, 4, (14, 14), 4, *sizes))
    left = [169 - len({p for block in t for p in block}) for t in targets.tolist()]
    assert min(left) <= context.shape[1] <= 169


def test_sizes_differ_between_batches_places_between_samples_and_every_place_is_used() -> None:
    objective = latent(load(FILE))
    sizes = [objective.blocks(2048 * n) for n in range(12)]
    assert {b.target for b in sizes} == {(5, 6), (6, 5), (6, 6), (7, 5)}
    assert {b.context for b in sizes} == {(13, 13), (14, 14)}
    context, targets = multi_block(0, torch.arange(2000), (14, 14), 4, sizes[0])
    assert len(targets.flatten(1).unique(dim=0)) > 1900
    assert len(context.unique(dim=0)) > 1900
    tops = targets[..., 0] // 14
    share = torch.bincount(tops.flatten()) / tops.numel()
    assert torch.allclose(share, torch.full_like(share, 1 / len(share)), atol=0.02)


def test_a_block_is_its_rows_and_columns() -> None:
    found = in_block(torch.tensor([1]), torch.tensor([2]), (2, 1), (3, 4))
    assert found.nonzero()[:, 1].tolist() == [6, 10]


@pytest.mark.parametrize(
    ("objective", "rest", "message"),
    [
        ({"block_scale": (0.19, 0.19)}, {}, "objective.block_scale = [0.19, 0.19]: a range in which a block of the"),
        ({"context_scale": (0.8, 0.9)}, {}, "objective.context_scale = [0.8, 0.9]: a range in which a block of the"),
        ({"blocks": 6}, {}, "objective.blocks = 6: fewer or smaller ones: 6 of 12 patches can cover a context of 64"),
        ({"momentum": (1.0, 0.9)}, {}, "objective.momentum = [1.0, 0.9]: [first, last] with first <= last"),
        ({"momentum": (0.9, 1.1)}, {}, "objective.momentum"),
        ({"block_scale": (0.2, 0.1)}, {}, "objective.block_scale = [0.2, 0.1]: [low, high] with low <= high"),
        ({"block_aspect": (2.0, 1.0)}, {}, "objective.block_aspect = [2.0, 1.0]: [low, high] with low <= high"),
        ({}, {"train": {"compile": True, "global_batch": 4}}, "train.compile = True: false: blocks change their"),
        ({}, {"optim": {"warmup_lr": 1.0}}, "optim.warmup_lr = 1.0: at most optim.lr = 0.001"),
    ],
)  # fmt: skip
def test_blocks_that_do_not_fit_are_refused(objective: dict[str, Any], rest: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(objective, **rest)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"positions": "relative"}, "model.positions = 'relative': sincos, which objective.name = 'i-jepa' builds on"),
        ({"decoder": {"depth": 0}}, "model.decoder.depth = 0: at least 1: what is hidden enters in the predictor"),
        ({"decoder": {"width": 30, "heads": 2}}, "model.decoder.width = 30: a multiple of 4: sines and cosines"),
    ],
)
def test_models_that_cannot_predict_are_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict({"model": {"positions": "sincos", **model}, "objective": {"name": "i-jepa"}})
    assert message in str(caught.value)


# --- model


def test_targets_are_normalised_features_of_the_teacher_who_sees_everything() -> None:
    objective = latent(config(registers=2))
    model: Any = objective.build_model()
    initialise(model, 0)
    inputs = objective.prepare(images(), torch.arange(4))
    predicted, target = model(*inputs.model_args)
    features = model.teacher.forward_features(images())[:, 2:]
    whole = F.layer_norm(features, (96,))
    for b, block in enumerate(inputs.model_args[2]):
        assert torch.equal(target[b], whole[b][block])
    assert predicted.shape == target.shape == (4, 4, inputs.model_args[2].shape[2], 96)
    loss, _ = objective.loss((predicted, target), inputs)
    error = (predicted - target).abs()
    assert loss.item() == pytest.approx(torch.where(error < 1, error**2 / 2, error - 0.5).mean().item(), rel=1e-5)
    loss.backward()
    assert all((p.grad is None) != p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in model.teacher.parameters())


def test_the_encoder_sees_nothing_of_the_targets_and_every_block_is_predicted_alone() -> None:
    objective = latent(config())
    model: Any = objective.build_model()
    initialise(model, 0)
    shown, context, targets = objective.prepare(images(1), torch.arange(1)).model_args
    predicted = model(shown, context, targets)[0]
    hidden = shown.clone()
    for patch in {*range(64)} - {*context[0].tolist()}:
        row, column = divmod(patch, 8)
        hidden[..., 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 0
    assert torch.allclose(model(hidden, context, targets)[0], predicted, atol=1e-5)
    alone = model(shown, context, targets[:, 2:3])[0]
    assert torch.allclose(alone[:, 0], predicted[:, 2], atol=1e-5)


def test_the_teacher_begins_as_the_encoder_whatever_the_seed() -> None:
    model: Any = build(config()).build_model()
    initialise(model, 3)
    for ours, theirs in zip(model.teacher.parameters(), model.encoder.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_gain_multiplies_the_first_weights_alone() -> None:
    plain, more = (build_encoder(config().model_copy(update={"model": config().model.model_copy(update=keys)}))
                   for keys in ({"input_gain": 1.0}, {}))  # fmt: skip
    for model in (plain, more):
        initialise(model, 0)
    for name, ours in more.named_parameters():
        gain = 5 if name == "patch_embed.proj.weight" else 1
        assert torch.allclose(ours, gain * plain.get_parameter(name), rtol=1e-6)


# --- training


def learner_of(run: Config) -> Any:
    return build_learner(run, Engine(run))


def batch_of(run: Config, begin: int) -> Batch:
    """Synthetic chips at the positions of a global batch."""
    numbers = torch.arange(begin, begin + run.train.global_batch)
    pixels = [torch.from_numpy(CHIPS[i % len(CHIPS)])[None] for i in numbers.tolist()]
    return Batch(pixels, torch.full((len(pixels),), 255.0), torch.zeros(len(pixels)), numbers * 0, numbers, numbers)


CHIPS = [record.pixels for record in synthetic.generate("train", synthetic.CLASSES, 8, 48, 0)]


def test_the_teacher_follows_exactly_and_its_momentum_grows_with_the_samples() -> None:
    run = config({"momentum": (0.9, 1.0)}, optim={"reference_batch": 8, "lr": 1e-2, "warmup_samples": 0},
                 train={"global_batch": 4, "samples": 16, "micro_batch": 2})  # fmt: skip
    learner, objective = learner_of(run), latent(run)
    assert [objective.momentum(p) for p in (0, 8, 16, 99)] == pytest.approx([0.9**0.5, 0.95**0.5, 1, 1])
    model = learner.model
    expected = {name: p.clone() for name, p in model.encoder.named_parameters()}
    for position in range(0, 16, 4):
        train_step(learner, [batch_of(run, position)], position)
        kept = objective.momentum(position)
        for name, live in model.encoder.named_parameters():
            expected[name] = torch.lerp(expected[name], live.detach(), 1 - kept)
        for name, ours in model.teacher.named_parameters():
            assert torch.equal(ours, expected[name]), name
    apart = [(p - model.encoder.get_parameter(n)).abs().max() for n, p in model.teacher.named_parameters()]
    assert max(apart) > 1e-3


def test_training_lowers_the_loss_and_the_features_stay_apart() -> None:
    run = config(
        {"momentum": (0.996, 1.0)},
        data={"image_size": 40, "lanes": 2},
        optim={"reference_batch": 8, "lr": 1e-3, "warmup_samples": 80},
        train={"global_batch": 8, "samples": 800},
    )
    learner, shown = learner_of(run), torch.stack([torch.from_numpy(chip)[None] / 255 for chip in CHIPS])
    model = learner.model

    def apart() -> float:
        with torch.no_grad():
            return feature_std(model.teacher(shown[..., 4:44, 4:44]))

    before = apart()
    losses = [train_step(learner, [batch_of(run, p)], p)["loss"].item() for p in range(0, 800, 8)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert apart() > 0.5 * before


def test_it_trains_in_bf16_and_recomputed() -> None:
    train = {"global_batch": 4, "samples": 40, "precision": "bf16", "activation_checkpointing": "full"}
    run = config(optim={"reference_batch": 4, "lr": 1e-3, "warmup_samples": 0}, train=train)
    learner = learner_of(run)
    losses = [train_step(learner, [batch_of(run, 0)], 0)["loss"].item() for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]
    assert {p.dtype for p in learner.model.parameters()} == {torch.float32}


def test_schedules_are_cosines_of_the_samples_and_the_warm_up_begins_where_it_is_told() -> None:
    run = load(FILE)
    warm, total = run.optim.warmup_samples, run.train.samples
    assert [lr_at(run, p) for p in (0, warm / 2, warm, total)] == pytest.approx([2e-4, 6e-4, 1e-3, 1e-6])
    assert [weight_decay_at(run, p) for p in (0, total / 2, total)] == pytest.approx([0.04, 0.22, 0.4])
    assert weight_decay_at(Config(), 0) is None
    small = config(
        optim={"final_weight_decay": 0.5, "weight_decay": 0.1, "warmup_samples": 0},
        train={"global_batch": 4, "samples": 8},
    )
    learner = learner_of(small)
    found = []
    for position in (0, 4):
        train_step(learner, [batch_of(small, position)], position)
        found.append([group["weight_decay"] for group in learner.optimizer.param_groups])
    assert found == [[0.0, pytest.approx(0.1)], [0.0, pytest.approx(0.3)]]


def test_a_run_is_saved_with_its_teacher_goes_on_to_the_bit_and_is_judged_by_it(
    tiny_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ("objective.name=i-jepa", "model.positions=sincos", "objective.momentum=[0.9,1.0]",
            "optim.final_weight_decay=0.3", "optim.ema_half_life=20", "train.samples=32",
            "data.image_size=40")  # fmt: skip
    monkeypatch.setattr("foundation.training.run.publish", lambda *_: None)  # pictures take longer than these runs
    whole = train(tiny_config(*keys, "name=whole"))
    half = tiny_config(*keys, "name=parts")
    with monkeypatch.context() as stopping:
        stopping.setattr("foundation.training.run.last_position", lambda _: 16)
        train(half)
    parts = train(half)
    ours, theirs = (checkpoint.load(run)["tensors"] for run in (parts, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    kinds = {name.partition(".")[0] for name in theirs if ".teacher." in name}
    assert kinds == {"model"}
    encoder, _ = load_encoder(whole)
    assert torch.equal(encoder.norm.weight, theirs["model.teacher.norm.weight"])
    assert not torch.equal(encoder.norm.weight, theirs["model.encoder.norm.weight"])
    averaged, _ = load_encoder(whole, averaged=True)
    assert torch.equal(averaged.norm.weight, theirs["ema.encoder.norm.weight"])
    assert encoder(images(2)).shape == (2, 96)


def test_the_report_shows_blocks_and_says_nothing_of_reconstructions(catalog: Path, tmp_path: Path) -> None:
    run, opened = config(), open_catalog(catalog)
    model = build(run).build_model()
    initialise(model, 0)
    panels = model_panels(run, model.state_dict(), opened, tmp_path, count=2)
    assert [caption.partition(" (")[0] for caption in panels] == ["Context and target blocks"]
    assert all(Path(str(panel)).stat().st_size > 1000 for panel in panels.values())


# --- published files


def published(model: Any, prefix: str = "module.") -> dict[str, Any]:
    """A file as the published code writes it: a state dict for each part, positions among the tensors."""

    def named(part: str, predictor: bool) -> dict[str, Tensor]:
        found = {}
        for name, tensor in model.get_submodule(part).state_dict().items():
            name = name.replace(".fc", ".mlp.fc")
            if predictor and name != "mask_token":
                name = "predictor_" + name.replace("pred.", "proj.")
            found[prefix + name] = tensor
        return found

    parts = {"encoder": named("encoder", False), "target_encoder": named("teacher", False)}
    for state in parts.values():
        state[f"{prefix}pos_embed"] = sincos((8, 8), 96, torch.device("cpu"), torch.float32).clone()
    return {**parts, "predictor": named("predictor", True), "epoch": 300, "opt": {}}


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_a_published_file_becomes_a_checkpoint_that_is_judged_by_its_target_encoder(
    prefix: str, tmp_path: Path
) -> None:
    model: Any = build(config()).build_model()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    torch.save(published(model, prefix), tmp_path / "ijepa.pth")
    encoder, run = load_encoder(import_published(tmp_path / "ijepa.pth", tmp_path / "run"))
    assert (run.objective.name, run.model.positions, run.model.decoder.width) == ("i-jepa", "sincos", 48)
    with torch.no_grad():
        assert torch.allclose(encoder(images()), model.teacher(images()), atol=1e-5)
        assert not torch.allclose(encoder(images()), model.encoder(images()), atol=1e-2)


def test_published_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    whole: Any = published(build(config()).build_model())
    del whole["predictor"]["module.predictor_embed.weight"]
    torch.save(whole, tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match=r"not an I-JEPA model: 'predictor\.embed\.weight' is missing"):
        import_published(tmp_path / "part.pth", tmp_path / "run")
    learnt: Any = published(build(config()).build_model())
    learnt["encoder"]["module.pos_embed"] += 1
    torch.save(learnt, tmp_path / "learnt.pth")
    with pytest.raises(CheckpointError, match=r"encoder\.pos_embed is not the fixed table"):
        import_published(tmp_path / "learnt.pth", tmp_path / "run")


# --- planning
