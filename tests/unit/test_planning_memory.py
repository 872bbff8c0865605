"""The bytes of a process are those a run keeps: activations measured, state by the shares of each engine."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation.config import Config, from_dict
from foundation.models.families import FAMILY, parameters, shapes
from foundation.objectives.registry import build
from foundation.planning.activations import activations
from foundation.planning.memory import memory, share
from foundation.training.blocks import prepare
from kernels.rpe_attention import BACKENDS, Backend

ENGINES = ("ddp", "zero1", "zero2", "hsdp", "fsdp2", "zero3")
BRIEF = settings(max_examples=40, deadline=None)


def recipe(size: str = "base", lanes: int = 512, batch: int = 2048, precision: str = "bf16", **train: Any) -> Config:
    """The published recipe in another size, with a batch that many processes can share."""
    tree = {"model": {"size": size}, "data": {"lanes": lanes}}
    return from_dict({**tree, "train": {"global_batch": batch, "precision": precision, **train}})


def little(**changes: Any) -> Config:
    """A model small enough to run: 8 x 8 patches, two windows, two scales."""
    model = {"size": "nano", "decoder": {"width": 48, "depth": 2, "heads": 3}, **changes.pop("model", {})}
    objective = {"windows": 2, "window": 7, "radii": (3, 5), **changes.pop("objective", {})}
    return from_dict({"data": {"image_size": 128}, "model": model, "objective": objective, **changes})


def tensors_in_memory() -> list[torch.Tensor]:
    """Every tensor of the process but those that stand for others (of a compiler).

    Not isinstance: asking every object of the process for its class wakes lazy modules.
    """
    return [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter) and t.device.type == "cpu"]


def kept_for_backward(run: Config, images: int) -> int:
    """Bytes of the storages that live between forward and backward, without parameters and inputs."""
    objective = build(run)
    model = prepare(objective.build_model(), run.train)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    inputs = objective.prepare(torch.rand(images, 1, 128, 128), torch.arange(images))
    before = {t.untyped_storage().data_ptr() for t in tensors_in_memory()}
    found, held = dict[int, int](), list[torch.Tensor]()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in before:
            found[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return tensor

    half = torch.autocast("cpu", torch.bfloat16, enabled=run.train.precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), half:
        prediction = model(*inputs.model_args)
        loss, _ = objective.loss(prediction, inputs)
    del prediction
    # Selective checkpointing keeps its products in Python, where no hook of autograd passes.
    for tensor in tensors_in_memory():
        note(tensor)
    assert loss.requires_grad
    return sum(found.values())


@pytest.mark.filterwarnings("ignore:A saved_tensors_hooks context:FutureWarning")
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("backend", ["reference", "dense", "sdpa"])
@pytest.mark.parametrize("window", [3, 7])
def test_the_activation_formula_is_what_a_run_keeps(backend: str, checkpointing: str, window: int) -> None:
    """Within 10 %: left out are states of generators and constants that all blocks share."""
    train = {"activation_checkpointing": checkpointing}
    run = little(model={"attention": backend}, objective={"window": window}, train=train)
    expected = activations(run, 4, "cpu")
    assert kept_for_backward(run, 4) == pytest.approx(expected.blocks + expected.rest, rel=0.1)


@pytest.mark.parametrize(
    "objective", [{"name": "pgga"}, {"name": "hog"}, {"name": "saratr-x-v2-target", "fusion": "learned"}], ids=str
)
def test_the_activation_formula_is_what_a_run_keeps_under_other_objectives(objective: dict[str, Any]) -> None:
    run = little(model={"attention": "reference"}, objective=objective)
    expected = activations(run, 4, "cpu")
    assert kept_for_backward(run, 4) == pytest.approx(expected.blocks + expected.rest, rel=0.1)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("backend", ["reference", "dense", "sdpa"])
def test_the_activation_formula_is_what_a_run_keeps_of_visible_patches(backend: str, checkpointing: str) -> None:
    train, objective = {"activation_checkpointing": checkpointing}, {"name": "mae", "mask_ratio": 0.75}
    run = little(model={"attention": backend, "positions": "sincos"}, objective=objective, train=train)
    expected = activations(run, 4, "cpu")
    assert kept_for_backward(run, 4) == pytest.approx(expected.blocks + expected.rest, rel=0.1)
    assert expected.positions == 0


@pytest.mark.parametrize(("name", "depth"), [("sar-jepa", 2), ("lomar", 0), ("mae", 2)])
def test_the_activation_formula_is_what_a_run_keeps_with_registers(name: str, depth: int) -> None:
    decoder = {"width": 48, "depth": depth, "heads": 3}
    model = {"attention": "dense", "registers": 8, "decoder": decoder}
    positions = "sincos" if name == "mae" else "relative"
    run = little(model={**model, "positions": positions}, objective={"name": name})
    expected = activations(run, 4, "cpu")
    assert kept_for_backward(run, 4) == pytest.approx(expected.blocks + expected.rest, rel=0.1)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "options",
    [{"mlp": "swiglu"}, {"layer_scale": 0.1}, {"qk_norm": True}, {"positions": "learned", "mlp": "swiglu"}],
    ids=str,
)
def test_the_activation_formula_is_what_a_run_keeps_of_blocks_with_options(
    options: dict[str, Any], checkpointing: str
) -> None:
    train, objective = {"activation_checkpointing": checkpointing}, {"name": "pgga", "radii": (3,)}
    run = little(model={"attention": "dense", **options}, objective=objective, train=train)
    expected = activations(run, 4, "cpu")
    kept_for_backward(run, 4)  # the constants that all blocks share, once for the process
    assert kept_for_backward(run, 4) == pytest.approx(expected.blocks + expected.rest, rel=0.02)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_the_activation_formula_is_what_a_run_keeps_with_a_linear_head(checkpointing: str) -> None:
    train = {"activation_checkpointing": checkpointing}
    run = little(model={"attention": "dense", "decoder": {"depth": 0}}, objective={"name": "lomar"}, train=train)
    expected = activations(run, 4, "cpu")
    assert kept_for_backward(run, 4) == pytest.approx(expected.blocks + expected.rest, rel=0.1)


@pytest.mark.parametrize("backend", ["reference", "dense", "sdpa"])
def test_the_activation_formula_holds_in_bf16_beside_the_cast_weights(backend: str) -> None:
    run = little(model={"attention": backend}, train={"precision": "bf16"})
    cast = memory(run, "ddp", 4, 1, 2, 8, "cpu").copies
    expected = activations(run, 4, "cpu")
    assert kept_for_backward(run, 4) == pytest.approx(expected.blocks + expected.rest + cast, rel=0.1)


def test_activations_grow_with_images_and_shrink_with_recomputation() -> None:
    none, selective, full = (
        [activations(recipe(activation_checkpointing=mode), n).total for n in (64, 128)]
        for mode in ("none", "selective", "full")
    )
    assert none[1] == pytest.approx(2 * none[0], rel=1e-3)  # the spread table does not grow
    assert none[0] > selective[0] > full[0]


@BRIEF
@given(
    size=st.sampled_from(sorted(FAMILY)),
    nodes=st.sampled_from([2, 4, 8, 64]),
    precision=st.sampled_from(["fp32", "bf16"]),
)
def test_the_state_of_each_engine_is_its_shares_of_the_parameters(size: str, nodes: int, precision: str) -> None:
    run, world = recipe(size, precision=precision), 8 * nodes
    count, e = parameters(run).total, {"fp32": 4, "bf16": 2}[precision]
    need = {engine: memory(run, engine, 1, 1, world, 8, "cuda") for engine in ENGINES}
    state = {engine: m.parameters + m.gradients + m.optimizer for engine, m in need.items()}
    assert state == pytest.approx(
        {
            "ddp": 16 * count,
            "zero1": (2 * e + 12 / world) * count,
            "zero2": (e + (e + 12) / world) * count,
            # Whole rows: the process with the most of them.
            "hsdp": 16 * share(shapes(run).every, 8),
            "fsdp2": 16 * share(shapes(run).every, world),
            "zero3": (2 * e + 12) * count / world,
        }
    )
    for each in need.values():
        terms = each._asdict()
        assert each.total == pytest.approx(sum(terms.values()) - each.host)
        assert each.margin > 1.5e9


@pytest.mark.parametrize("engine", ["single", "ddp", "zero2", "fsdp2"])
def test_an_average_of_the_weights_is_a_copy_in_fp32(engine: str) -> None:
    run = recipe()
    averaged = run.model_copy(update={"optim": run.optim.model_copy(update={"ema_half_life": 1e6})})
    without, with_it = (memory(c, engine, 4, 1, 16, 8, "cuda") for c in (run, averaged))
    assert without.ema == 0
    held = share(shapes(run).every, 16) if engine == "fsdp2" else parameters(run).total
    assert with_it.ema == 4 * held


def test_offloading_moves_the_state_to_the_host() -> None:
    run = recipe("7b")
    away = run.model_copy(update={"train": run.train.model_copy(update={"offload": True})})
    here, there = (memory(c, "fsdp2", 4, 1, 64, 8, "cuda") for c in (run, away))
    assert there.host == pytest.approx(here.parameters + here.gradients + here.optimizer)
    assert there.parameters == there.gradients == there.optimizer == 0
    assert there.total < here.total


def test_accumulating_under_fsdp_keeps_whole_gradients() -> None:
    once, twice = (memory(recipe("7b"), "hsdp", 2, n, 64, 8, "cuda") for n in (1, 2))
    assert twice.gradients - once.gradients == pytest.approx(4 * parameters(recipe("7b")).total, rel=1e-3)


@BRIEF
@given(size=st.sampled_from(sorted(FAMILY)), shards=st.integers(1, 600))
def test_all_pieces_together_are_the_parameters_and_the_first_is_the_largest(size: str, shards: int) -> None:
    tensors = shapes(recipe(size)).every
    pieces = [share(tensors, shards, index) for index in range(shards)]
    assert sum(pieces) == parameters(recipe(size)).total
    assert pieces == sorted(pieces, reverse=True)


@pytest.mark.parametrize("backend", ["reference", "dense"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_what_relative_positions_take_is_what_attention_without_them_saves(
    backend: str, checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plain(q: Any, k: Any, v: Any, *rest: Any) -> Any:
        length, dim = q.shape[-2:]
        queries, keys, values = (x.reshape(-1, length, dim) for x in (q, k, v))
        probabilities = torch.bmm(queries * rest[3], keys.transpose(1, 2)).softmax(-1)
        return torch.bmm(probabilities, values).view(q.shape)

    run = little(model={"attention": backend}, train={"activation_checkpointing": checkpointing})
    positions, whole = activations(run, 4, "cpu").positions, kept_for_backward(run, 4)
    if checkpointing == "full":
        # Only the block that is computed again has them, and no block does between forward and backward.
        assert 0 < positions < activations(run, 4, "cpu").recomputed
        return
    monkeypatch.setitem(BACKENDS, backend, Backend(plain, "no positions"))
    assert whole - kept_for_backward(run, 4) == pytest.approx(positions, rel=0.1)
