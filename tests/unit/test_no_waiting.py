"""A step never waits for the device: seen on a GPU that is not there (PyTorch's fake tensors know its device only)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from foundation.config import from_dict
from foundation.objectives.latent import JointEmbeddingPrediction
from foundation.objectives.registry import OBJECTIVES, build
from foundation.training.engine import Engine
from foundation.training.optim import build_optimizer, rules
from kernels.gradient_ratio import BACKENDS
from kernels.rpe_attention import BACKENDS as ATTENTION
from shards.augment import Augment
from shards.placing import placed
from shards.stream import Batch


class Waits(TorchDispatchMode):
    """Lists the calls for which a CPU waits until a GPU has answered, or copies without pinned memory."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = [{leaf.device.type for leaf in tree_leaves(each) if isinstance(leaf, Tensor)} for each in (args, out)]
        if func in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
            source, target = (args[1], args[0]) if func is torch.ops.aten.copy_.default else (args[0], out)
            waited = not ((kwargs or {}).get("non_blocking") or args[2:3] == (True,))
            if source.device.type != target.device.type and (waited or (target.is_cuda and not _is_pinned(source))):
                self.found.append(f"{func} from {source.device.type} to {target.device.type}")
        elif "cpu" in devices[1] and "cuda" in devices[0]:
            self.found.append(str(func))
        if "local_scalar" in str(func) or "nonzero" in str(func):
            self.found.append(str(func))
        return out


def _is_pinned(tensor: Tensor) -> bool:
    return getattr(tensor, "counts_as_pinned", False)


def _pinned(tensor: Tensor) -> Tensor:
    tensor.counts_as_pinned = True  # type: ignore[attr-defined]
    return tensor


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs a driver: pinned memory (what is asked to be pinned counts as such) and launches of kernels."""
    monkeypatch.setattr(Tensor, "pin_memory", _pinned)
    monkeypatch.setattr(Tensor, "is_pinned", _is_pinned)
    monkeypatch.setitem(BACKENDS, "triton", BACKENDS["triton"]._replace(unavailable="there is no GPU"))
    monkeypatch.setitem(ATTENTION, "triton", ATTENTION["triton"]._replace(refuses=lambda problem: ""))  # also fp32


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


@pytest.mark.parametrize(
    "call",
    [
        lambda: on_gpu(2)[0].item(),
        lambda: on_gpu(2).cpu(),
        lambda: torch.ones(2).cuda(),
        lambda: torch.ones(2).to("cuda", non_blocking=True),
        lambda: on_gpu(2).copy_(torch.ones(2)),
    ],
)
def test_this_test_sees_what_waits(call: Any) -> None:
    with FakeTensorMode(), Waits() as waits:
        try:
            call()
        except Exception as error:  # a fake tensor has no value to give
            waits.found.append(str(error))
    assert waits.found


def test_a_copy_from_the_device_that_nobody_waits_for_is_none() -> None:
    with FakeTensorMode(), Waits() as waits:
        torch.empty(2).copy_(on_gpu(2), non_blocking=True)
    assert waits.found == []


@pytest.mark.usefixtures("no_driver")
def test_values_travel_to_a_gpu_from_pinned_memory() -> None:
    with FakeTensorMode(), Waits() as waits:
        assert placed([1, 2], "cuda").device.type == "cuda"
        assert placed(on_gpu(2), "cuda").device.type == "cuda"
    assert waits.found == []


@pytest.mark.usefixtures("no_driver")
@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("sar-jepa", {"attention": "triton"}),
        ("lomar", {"attention": "triton", "decoder": {"depth": 0}}),
        ("mae", {"attention": "sdpa", "positions": "sincos"}),
        ("i-jepa", {"attention": "sdpa", "positions": "sincos"}),
    ],
)
def test_nothing_waits_from_the_batch_to_the_update(name: str, model: dict[str, Any]) -> None:
    config = from_dict(
        {
            "data": {"image_size": 128},
            "model": {"size": "nano", "patch": 8, **model},
            "objective": {"name": name, "windows": 2, "radii": (3, 5)},
            "optim": {"grad_clip": 1.0},
        }
    )
    pixels = [(100, 90), (100, 90), (128, 128), (300, 200)]
    objective = build(config)
    if isinstance(objective, JointEmbeddingPrediction):
        objective.blocks(0)  # the host draws sizes on its own; nothing on it is real here
    with FakeTensorMode(allow_non_fake_inputs=True), Waits() as waits:
        numbers = on_gpu(4, dtype=torch.int64)
        batch = Batch([on_gpu(1, *shape, dtype=torch.uint8) for shape in pixels], on_gpu(4), on_gpu(4), *(numbers,) * 3)
        images = Augment(128)(batch, seed=0)
        with torch.device("cuda"):
            built = objective.build_model()
        inputs = objective.prepare(images, batch.position)
        loss, parts = objective.loss(built(*inputs.model_args), inputs)
        assert {t.device.type for t in (loss, *parts.values())} == {"cuda"}
        # Backward passes need a device; what they leave does not.
        for parameter in built.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        optimizer = build_optimizer(built, rules(built, 0.05), config.optim)
        engine = Engine(config)
        engine.device = torch.device("cuda")
        norm = engine.update(built, optimizer, 1e-3)
        assert norm.device.type == "cuda"
        if (kept := objective.momentum(0)) is not None:
            engine.follow(built, kept)
    assert waits.found == []


@pytest.mark.usefixtures("no_driver")
@pytest.mark.parametrize(
    "objective",
    [
        *({"name": name} for name in OBJECTIVES if name != "i-jepa"),  # its target is the model's, as seen above
        {"name": "hog", "gaussian_window": 16},
        {"name": "lomar-sar", "normalise_pixels": True},
        {"name": "saratr-x-v2-target", "fusion": "equal"},
        {"name": "saratr-x-v2-target", "fusion": "learned"},
    ],
    ids=lambda value: " ".join(map(str, value.values())),
)
def test_no_target_and_no_loss_waits(objective: dict[str, Any]) -> None:
    positions = "sincos" if objective["name"] in ("mae", "fg-mae") else "relative"
    tree = {"data": {"image_size": 64}, "model": {"size": "nano", "patch": 8, "positions": positions}}
    task = build(from_dict({**tree, "objective": {"windows": 2, "radii": (3, 5), **objective}}))
    with FakeTensorMode(allow_non_fake_inputs=True), Waits() as waits:
        inputs = task.prepare(on_gpu(2, 1, 64, 64), on_gpu(2, dtype=torch.int64))
        # What the model returns: predictions, and weights where maps are fused by learnt ones.
        sizes = task.tokens()
        predicted = on_gpu(*inputs.target.shape[:-1], sizes.values)
        loss, parts = task.loss((predicted, on_gpu(sizes.fusion)) if sizes.fusion else predicted, inputs)
        assert {t.device.type for t in (inputs.target, loss, *parts.values())} == {"cuda"}
        assert inputs.target.dtype == torch.float32
    assert waits.found == []


def test_values_are_placed_where_they_are_wanted() -> None:
    assert torch.equal(placed([1, 2], "cpu"), torch.tensor([1, 2]))
    assert placed([(1, 2)], "cpu", torch.float64).dtype == torch.float64
    kept = torch.ones(2)
    assert placed(kept, "cpu") is kept
