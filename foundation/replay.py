"""One update of a run again, alone: its weights, samples, crops and masks, and what every part made of them.

Nothing is learnt and the run is not touched: the newest checkpoint before the update is loaded, the updates in between
are made again (samples, crops and masks are functions of the position), and the one asked for is taken apart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from foundation.config import Config, load
from foundation.errors import ConfigError
from foundation.evaluation.figures.pictures import sar
from foundation.evaluation.figures.style import grid, save
from foundation.files import read_json, write_whole
from foundation.models.initialise import Given
from foundation.training import checkpoint
from foundation.training.data import last_position, open_data, open_stream
from foundation.training.engine import Engine, unwrap
from foundation.training.evidence import FOLDER, folder_of, identity
from foundation.training.guard import Guard
from foundation.training.places import home
from foundation.training.ranks import ALONE
from foundation.training.rewinding import JUMPS
from foundation.training.run import whole_steps
from foundation.training.setup import beginning, build_learner, fill
from foundation.training.step import Learner, train_step
from shards.stream import Batch

SHOWN = 8  # images in the figure
ONE_PROCESS = ("train.engine=single", "train.offload=false", "train.shard_size=null", "train.float8=false")


class Replay(NamedTuple):
    """What an update did: `samples` with losses, largest first; `modules` in the order in which they computed."""

    position: int
    begun: int
    """samples seen by the checkpoint it started from; 0: initial weights"""
    loss: float
    limit: float
    """the loss above which the guard makes no update"""
    grad_norm: float
    samples: list[dict[str, Any]]
    modules: list[str]
    """whose outputs are not finite"""
    parameters: list[tuple[str, float, int]]
    """name, norm of the gradient, numbers in it that are not finite; largest norms first"""
    same_batch: bool | None
    """whether images and masks are those that were kept; None when none were"""


def kept(run: Path) -> list[int]:
    """Positions of the updates of a run whose batches were kept."""
    return sorted(int(folder.name.removeprefix("samples-")) for folder in (run / FOLDER).glob("samples-*"))


def replay(run: Path, at: int | None = None, progress: Callable[[int, int], None] = lambda done, of: None) -> Replay:
    """Take the update at `at` samples (default: the last one that was skipped) of a run folder apart, on one process.

    `progress(done, of)` is called for the updates on the way. Writes `replay.json` and `replay.png` to the folder of
    the update. Raises ConfigError for a run or a position that is none, else as `train`.
    """
    if not (run / "config.yaml").is_file():
        raise ConfigError("this is no run folder: it holds no config.yaml", where=str(run), do="give RUN_ROOT/NAME")
    config = _alone(run)
    at = _position(run, config, at)
    path, state, _ = checkpoint.restore(home(config), ALONE, at_most=at)
    given: Mapping[str, Given] = {} if path else beginning(config, ALONE, resume=False).values
    learner = build_learner(config, engine := Engine(config), given)
    if path:
        fill(learner, path, state, ALONE)
    begun: int = state["position"] if path else 0
    catalog = open_data(config, check=False)
    stream = open_stream(config, catalog, engine, begun)
    spans = [span for span in _jumps(run) if span[1] <= at]
    guard = Guard(config, lambda *_, **__: None, lambda *_: None, state.get("guard"), spans)
    steps, stride = whole_steps(stream, config.train.global_batch), config.train.global_batch
    for position in range(begun, at, stride):
        batches = next(steps)
        if not guard.passes_over(position):
            limit = guard.limit()
            guard.note(train_step(learner, batches, position, limit), batches, position, limit)
        progress((position - begun) // stride + 1, (at - begun) // stride)
    guard.check()
    batches = next(steps)
    found, images = _apart(learner, batches, at, guard.limit())
    for sample in found["samples"]:
        sample |= identity(stream.reader, sample["sample_id"])
    result = Replay(position=at, begun=begun, same_batch=_same(run, at, images), **found)
    folder = folder_of(run, at)
    write_whole(folder / "replay.json", json.dumps(_plain(result._asdict()), indent=1) + "\n")
    _figure(result, images, folder / "replay.png")
    return result


def _alone(run: Path) -> Config:
    """The configuration of a run for one process, where its folder now is; its micro-batches bound the memory."""
    config = load(run / "config.yaml")
    each = read_json(run / "environment.json").get("micro_batch") or config.train.global_batch
    place = (f"run_root={run.resolve().parent}", f"name={run.resolve().name}", f"train.micro_batch={each}")
    quiet = ("monitor.images=0", "monitor.probe=null", "guard.skips=1000000000")
    return load(run / "config.yaml", [*ONE_PROCESS, *place, *quiet])


def _position(run: Path, config: Config, at: int | None) -> int:
    positions, stride, end = kept(run), config.train.global_batch, last_position(config)
    if at is None and not positions:
        raise ConfigError("no update of this run was skipped", where=str(run), do="say which one: --at SAMPLES")
    at = positions[-1] if at is None else at
    if at % stride or not 0 <= at < end:
        raise ConfigError(
            f"no update begins at {at:,} samples: they begin at multiples of {stride:,} below {end:,}",
            where="--at",
            do=f"--at {min(max(at // stride * stride, 0), end - stride)}"
            + (f"; skipped were {', '.join(map(str, positions))}" if positions else ""),
        )
    return at


def _jumps(run: Path) -> list[list[int]]:
    return list(read_json(run / JUMPS)["jumps"]) if (run / JUMPS).exists() else []


def _apart(learner: Learner, batches: Sequence[Batch], at: int, limit: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Losses of single images, outputs and gradients of all; and images and masks, named as in `evidence`."""
    engine, objective, model = learner.engine, learner.objective, learner.model
    samples, total, arrays = [], 0.0, []
    with _watched(unwrap(model)) as modules:
        for index, cpu in enumerate(batches):
            batch = cpu.to(engine.device)
            images = learner.augment(batch, learner.config.seed)
            inputs = objective.prepare(images, batch.position, at)
            with engine.autocast():
                prediction = model(*inputs.model_args)
            loss = objective.loss(prediction, inputs)[0]
            total += loss.item() / len(batches)
            with engine.accumulate(model, last=index == len(batches) - 1):
                engine.backward(model, loss / len(batches))
            shown = {"images": images, **{f"argument{i}": a for i, a in enumerate(inputs.model_args) if i}}
            arrays.append({name: value.cpu().numpy() for name, value in shown.items()})
    gradients = {n: p.grad.float() for n, p in unwrap(model).named_parameters() if p.grad is not None}
    for batch in batches:
        samples += [_single(learner, batch, i, at) for i in range(len(batch))]
    order = lambda value: -value if math.isfinite(value) else -math.inf  # noqa: E731
    found = {
        "loss": total,
        "limit": limit,
        "grad_norm": nn.utils.get_total_norm(list(gradients.values())).item(),
        "samples": sorted(samples, key=lambda sample: order(sample["loss"])),
        "modules": modules,
        "parameters": sorted(
            ((n, g.norm().item(), int((~g.isfinite()).sum())) for n, g in gradients.items()), key=lambda r: order(r[1])
        ),
    }
    names = arrays[0]
    return found, {name: np.concatenate([part[name] for part in arrays]) for name in names}


def _single(learner: Learner, batch: Batch, number: int, at: int) -> dict[str, Any]:
    """Position, id and loss of one image, which sees the same crop and mask by itself."""
    engine, objective = learner.engine, learner.objective
    fields = ("scale", "decibels", "label", "position", "sample_id")
    part = {name: getattr(batch, name)[number : number + 1] for name in fields}
    one = replace(batch, pixels=batch.pixels[number : number + 1], **part).to(engine.device)
    inputs = objective.prepare(learner.augment(one, learner.config.seed), one.position, at)
    with torch.no_grad():
        loss = objective.loss(engine.predict(learner.model, inputs.model_args), inputs)[0]
    return {"position": int(one.position), "sample_id": int(one.sample_id), "loss": loss.item()}


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """Names of modules whose outputs are not finite, in the order in which they compute, inner ones first."""
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            tensors = [t for t in (output if isinstance(output, list | tuple) else [output]) if isinstance(t, Tensor)]
            bad = any(t.is_floating_point() and not t.isfinite().all() for t in tensors)
            if bad and name not in found:
                found.append(name)

        return hook

    handles = [module.register_forward_hook(look(name or "the whole model")) for name, module in model.named_modules()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _same(run: Path, at: int, images: Mapping[str, np.ndarray]) -> bool | None:
    """Whether what was kept is the same, bit for bit: crops to rounding, masks and order exactly."""
    files = sorted(folder_of(run, at).glob("rank*.npz"))
    if not files:
        return None
    parts = []
    for file in files:
        with np.load(file, allow_pickle=False) as arrays:
            parts.append({name: arrays[name] for name in arrays.files})
    order = np.argsort(np.concatenate([part["position"] for part in parts]))
    return all(
        np.allclose(np.concatenate([part[name] for part in parts])[order], value, atol=1e-5, equal_nan=True)
        for name, value in images.items()
    )


def _plain(value: Any) -> Any:
    """For JSON: numbers that are not finite as words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _figure(result: Replay, images: Mapping[str, np.ndarray], path: Path) -> None:
    """The images with the largest losses."""
    worst = result.samples[:SHOWN]
    figure, axes = grid(1, len(worst), 1.7 * len(worst), 2.1)
    for place, sample in zip(axes[0], worst, strict=True):
        image = images["images"][sample["position"] - result.position, 0]
        sar(place, image, f"{sample['source']}\n{sample['loss']:.3g}")
    save(figure, path)
