"""`foundation bench step`: the whole SAR-JEPA training step beside its published definition, and how it divides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foundation.bench import (
    Table,
    compact,
    environment,
    environment_line,
    here,
    markdown,
    roof_line,
    sheet_peak,
    span,
    write,
)
from foundation.bench_kernels import number, share, tiny
from foundation.config import Config, from_dict
from foundation.errors import ConfigError
from foundation.models.attention import Attention
from foundation.models.families import FAMILY, flops
from foundation.models.initialise import initialise
from foundation.objectives.reconstruction import Inputs, MaskedReconstruction
from foundation.objectives.registry import build
from foundation.training.blocks import units
from foundation.training.optim import build_optimizer, rules
from kernels.bench import Budget, Clock, Memory, Roof, Stage, Trial, first_line, measure_roof, run
from kernels.bench_target import published_target, speckle
from kernels.rpe_attention import BACKENDS, choose
from kernels.rpe_attention.layout import Layout, Problem

SIZES = {"cuda": ("small", "base", "large"), "cpu": ("tiny", "small")}
BATCHES = {
    "cuda": {"nano": 256, "tiny": 256, "small": 128, "base": 128, "large": 64},
    "cpu": {"nano": 8, "tiny": 8, "small": 4, "base": 2},
}
"""Images of a step; 1 for sizes that are not listed on a CPU, 16 on a GPU."""
PARTS = ("target, masks", "forward", "backward", "AdamW")
HEADER = (
    *("step", "images/s", "× published", "ms / image", *PARTS),
    *("of products", "MFU", "peak GB", "loss off by"),
)
SMALL_DECODER = {"width": 192, "depth": 2, "heads": 6}
"""Of nano and tiny, as in configs/sar-jepa-tiny.yaml; the others have the published one."""


class Variant(NamedTuple):
    """A way to do the step."""

    label: str
    attention: str = "auto"
    precision: str = "fp32"
    published_target: bool = False
    compiled: bool = False


@dataclass
class Result:
    """A line of the table. Without numbers it says why; times are medians in seconds."""

    size: str
    batch: int
    variant: str
    precision: str
    reason: str = ""
    repeats: int = 0
    seconds: float | None = None
    parts: dict[str, float] | None = None
    images_per_s: float | None = None
    faster: float | None = None
    """than the first variant of its size, median over rounds"""
    flops_per_s: float | None = None
    """executed"""
    of_products: float | None = None
    """executed operations per second over the measured rate of large products in its precision"""
    mfu: float | None = None
    """the same over the data sheet's bfloat16 peak, of a known GPU"""
    peak: int | None = None
    loss: float | None = None


class Report(NamedTuple):
    """Everything of one run."""

    environment: dict[str, Any]
    roof: Roof
    results: list[Result]

    def to_json(self) -> dict[str, Any]:
        """What is written down."""
        roof = {"copy_bytes_per_s": self.roof.copy, "gemm_flop_per_s": self.roof.gemm}
        return {
            "environment": self.environment,
            "roofline": {**roof, "sheet_bf16_flop_per_s": sheet_peak(self.environment["device"])},
            "rows": [vars(result) for result in self.results],
        }


class PublishedTarget:
    """The configured maps by sixteen dense convolutions."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def maps(self, images: Tensor) -> Tensor:
        """fp32 [B, 1, H, W] → fp32 [B, 4, H, W]."""
        return published_target(images)


class Step:
    """One model with its optimiser, which all variants share; a learning rate of zero keeps the weights as they are."""

    def __init__(self, size: str, batch: int, device: torch.device) -> None:
        decoder = {"decoder": SMALL_DECODER} if size in ("nano", "tiny") else {}
        self.config: Config = from_dict({"model": {"size": size, **decoder}, "data": {"lanes": 1}})
        self.batch, self.device = batch, device
        objective = build(self.config)
        assert isinstance(objective, MaskedReconstruction)  # sar-jepa: this bench is about its target
        self.objective = objective
        self.targets = self.objective.target, PublishedTarget(self.objective.target.names)
        self.model = self.objective.build_model().to(device)
        initialise(self.model, 0)
        table = rules(self.model, self.config.optim.weight_decay)
        self.optimizer = build_optimizer(self.model, table, self.config.optim)
        self.eager = [(unit, unit.forward) for unit in units(self.model)]
        self.compiled: list[Callable[..., Any]] = []
        self.images = speckle(device, batch, self.config.data.image_size).float() / 255
        self.positions = torch.arange(batch, device=device)

    def become(self, variant: Variant) -> None:
        """Let the model compute in another way."""
        self.objective.target = self.targets[variant.published_target]
        for module in self.model.modules():
            if isinstance(module, Attention):
                module.backend = variant.attention
        if variant.compiled and not self.compiled:
            self.compiled = [torch.compile(forward) for _, forward in self.eager]
        for index, (unit, forward) in enumerate(self.eager):
            unit.forward = self.compiled[index] if variant.compiled else forward

    def stages(self, variant: Variant) -> Sequence[Stage]:
        """The parts of a step, in the order of PARTS."""
        half = variant.precision == "bf16"

        def prepare(_: object) -> Inputs:
            self.become(variant)
            return self.objective.prepare(self.images, self.positions)

        def forward(inputs: Inputs) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext():
                prediction = self.model(*inputs.model_args)
            return self.objective.loss(prediction, inputs)[0]

        def backward(loss: Tensor) -> Tensor:
            loss.backward()
            return loss.detach()

        def update(loss: Tensor) -> Tensor:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            return loss

        return prepare, forward, backward, update

    def refuses(self, backend: str, precision: str) -> str:
        """Why a backend does not take the attention of encoder or decoder; '' when it takes both."""
        return next(filter(None, (BACKENDS[backend].refuses(p) for p in self.problems(precision))), "")

    def problems(self, precision: str) -> list[Problem]:
        """What encoder and decoder ask of an attention backend."""
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        side, decoder, row = self.config.objective.window, self.config.model.decoder, FAMILY[self.config.model.size]
        sizes = [(row.heads, row.dim // row.heads), (decoder.heads, decoder.width // decoder.heads)]
        return [Problem(self.device.type, dtype, *size, Layout((side, side)), trains=True) for size in sizes]


def variants(step: Step) -> Iterator[tuple[Variant, str]]:
    """Every way to do the step, with the reason when it cannot be done here. The first is the published definition."""
    yield Variant("published, fp32", "reference", published_target=True), ""
    defaults = {precision: choose("auto", step.problems(precision)[0]) for precision in ("fp32", "bf16")}
    for precision, chosen in defaults.items():
        yield Variant(f"defaults, {precision} ({chosen})", precision=precision), ""
    cuda = step.device.type == "cuda"
    if cuda:
        yield Variant(f"defaults, bf16, compiled ({defaults['bf16']})", precision="bf16", compiled=True), ""
    precision = "bf16" if cuda else "fp32"
    for name in BACKENDS:
        if name == defaults[precision]:
            continue
        reason = step.refuses(name, precision)
        if name == "triton" and not cuda and not reason:
            reason = "Triton is interpreted on a CPU, which says nothing about its speed"
        yield Variant(f"{name}, {precision}", name, precision), reason


def measure(
    sizes: Sequence[str] = (),
    repeats: int = 5,
    batch: int | None = None,
    budget: float = 420.0,
    quick: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Steps of every size in turn; `quick` rehearses. Raises ConfigError for a size that does not exist."""
    if quick:
        sizes, repeats, batch = sizes or ("nano",), 1, batch or 2
    device, limit = here(), Budget(budget)
    if unknown := [size for size in sizes if size not in FAMILY]:
        raise ConfigError(f"{unknown[0]!r} is no model size", where="--sizes", do=f"choose among {', '.join(FAMILY)}")
    clock, described = Clock(device), environment(device)
    results: list[Result] = []
    progress("roofline")
    roof = measure_roof(clock, quick)
    for size in sizes or SIZES[device.type]:
        progress(f"ViT {size}")
        images = batch or BATCHES[device.type].get(size, 16 if device.type == "cuda" else 1)
        try:
            results += _of_size(size, images, clock, repeats, limit)
        except Exception as error:  # a model that does not fit, say
            results.append(Result(size, images, "all", "", first_line(error)))
            clock.settle()
    progress("roofline")
    with suppress(RuntimeError):  # of a device that a variant broke
        roof = roof.best(measure_roof(clock, quick))
    for result in results:
        _against(result, roof, described)
    return Report(described, roof, results)


def _of_size(size: str, batch: int, clock: Clock, repeats: int, budget: Budget) -> list[Result]:
    if budget.spent:
        return [Result(size, batch, "all", "", budget.reason)]
    if clock.device.type == "cuda":
        torch.compiler.reset()  # a compiler that has seen many shapes of one function gives up on it
    step = Step(size, batch, clock.device)
    results, trials = [], []
    for variant, reason in variants(step):
        result = Result(size, batch, variant.label, variant.precision)
        results.append(result)

        def start(variant: Variant = variant, result: Result = result) -> Sequence[Stage]:
            stages = step.stages(variant)
            step.optimizer.zero_grad(set_to_none=True)  # what a variant that failed may have left
            clock.lap(stages)  # compiles what is compiled
            memory = Memory(clock.device)
            value: Any = None
            for stage in stages:
                value = stage(value)
            result.loss = value.item()
            result.peak = memory.highest
            return stages

        trials.append(Trial(start, reason=reason, limit=60.0))
    run(trials, clock, repeats, budget)
    for result, trial in zip(results, trials, strict=True):
        result.reason = trial.reason
        if not trial.reason:
            _fill(result, trial, step.config)
            result.faster = None if trials[0].reason else trial.faster_than(trials[0])
    return results


def _fill(result: Result, trial: Trial, config: Config) -> None:
    """The figures that follow from the times."""
    result.seconds, result.repeats = trial.seconds(), len(trial.laps)
    result.parts = {part: trial.seconds(n, n + 1) for n, part in enumerate(PARTS)}
    result.images_per_s = result.batch / result.seconds
    result.flops_per_s = flops(config).training * result.images_per_s


def _against(result: Result, roof: Roof, described: dict[str, Any]) -> None:
    """The rate as a share of what the device reached, and of its data sheet."""
    if result.flops_per_s is None:
        return
    peak = sheet_peak(described["device"])
    result.of_products = result.flops_per_s / roof.gemm["bfloat16" if result.precision == "bf16" else "float32"]
    result.mfu = result.flops_per_s / peak if peak else None


def tables(report: Report) -> Iterator[Table]:
    """A table for each size, and what has no time, with the reason."""
    for size in dict.fromkeys(result.size for result in report.results):
        mine = [result for result in report.results if result.size == size]
        rows = [_line(result, mine[0]) for result in mine if result.seconds]
        if rows:
            yield compact(Table(f"ViT {size}, {mine[0].batch} images; parts in ms / image", HEADER, rows))
    missing: list[tuple[str, ...]] = [(f"ViT {r.size}", r.variant, r.reason) for r in report.results if r.reason]
    if missing:
        yield Table("Without a time", ("what", "step", "reason"), missing)


def _line(result: Result, first: Result) -> tuple[str, ...]:
    assert result.seconds is not None
    assert result.parts is not None
    each = [number(seconds / result.batch * 1e3) for seconds in (result.seconds, *result.parts.values())]
    difference = None
    if first.loss is not None and result.loss is not None:
        difference = abs(result.loss / first.loss - 1)
    faster = "-" if result.faster is None else f"{result.faster:.2f}"
    end = share(result.of_products), share(result.mfu), "-" if result.peak is None else f"{result.peak / 1e9:.1f}"
    return (result.variant, number(result.images_per_s), faster, *each, *end, tiny(difference))


def intro(report: Report, command: str) -> str:
    """What a reader needs to know beside the tables."""
    repeats = [result.repeats for result in report.results if result.repeats]
    return (
        f"`{command}` on {environment_line(report.environment)}; {roof_line(report.roof)}. Medians of {span(repeats)} "
        "steps, variants taken in turn, `× published` the median of what each round gave. SAR-JEPA at 224 px, four "
        "windows of 7 x 7, all tokens through encoder and decoder; the same fused AdamW in all rows. `of products`: "
        "executed operations (three forward passes) over the measured products in the same precision; MFU: over the "
        "data sheet's dense bfloat16 peak. `loss off by`: relative to the published definition's."
    )


def save(report: Report, out: Path, command: str) -> list[Path]:
    """step.json and step.md in a folder. Raises StorageError."""
    return write(out, "step", report.to_json(), markdown("Training step", intro(report, command), tables(report)))
