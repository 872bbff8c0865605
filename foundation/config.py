"""The typed, frozen configuration tree: YAML → dotted overrides → validation of everything at once → hash.

Every key has a default, a unit and a range; the defaults are the published SAR-JEPA recipe. Samples are the clock:
whatever counts time (warm-up, logging, checkpoints, the end) counts images seen, never steps.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from foundation.config_conflicts import conflicts
from foundation.config_records import GuardConfig as GuardConfig
from foundation.config_records import MonitorConfig as MonitorConfig  # also for importers of this file
from foundation.config_records import TrackingConfig as TrackingConfig
from foundation.config_section import Positive, Unit, one_of
from foundation.config_section import Section as Section
from foundation.config_text import (
    Problem,
    allowed,
    field_problems,
    known_paths,
    read_tree,
    summary,
    without_errors,
)

WRITTEN = ("s3", "gs", "gcs", "file", "memory")  # kinds of URL that take files


class AmplitudeConfig(Section):
    """How the amplitudes of a source become values in [0, 1]; ratio targets depend on it."""

    scale: float = Field(gt=0, description="the amplitude that becomes 1, in pixel values")
    decibels: float = Field(
        default=0.0, ge=0, description="0: linear; otherwise a logarithm over this range below scale"
    )


class DataConfig(Section):
    """What is read, in which order, and how it is augmented."""

    catalog: tuple[str, ...] = Field(default=(), description="folders or URLs of catalogs, read as one; or one of them")
    splits: tuple[Literal["pretrain", "train"], ...] = Field(
        default=("pretrain", "train"), min_length=1, description="splits of the catalog to learn from"
    )
    filter: str | None = Field(
        default=None,
        min_length=1,
        description="only samples for which this holds, e.g. band == 'X' and polarisation == 'HH'",
    )
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default={}, description="share of each source in the stream, relative; empty: in proportion to their samples"
    )
    amplitude: dict[str, AmplitudeConfig] = Field(
        default={}, description="amplitude rules of sources that differ from the ones they were packed with"
    )
    held_out: tuple[str, ...] = Field(default=(), description="more catalogs whose test images must not be learnt")
    overlap: Literal["refuse", "identical", "allow"] = Field(
        default="refuse",
        description="images, near copies or scenes of a test split among those to learn from: refuse, allow, or refuse "
        "all but near copies (identical; near copies cost 10 s per million images)",
    )
    corrupt: Literal["replace", "stop"] = Field(
        default="replace", description="damaged sample: take the next valid one of its block and list it, or stop"
    )
    cache: str = Field(
        default="~/.cache/foundation", min_length=1, description="folder for shards of a URL, one per node"
    )
    cache_gb: Positive = Field(
        default=100.0, description="limit of that folder, 10^9 bytes; the oldest shards go first"
    )
    lanes: int = Field(default=60, ge=1, description="lanes of the order; the number of processes must divide it")
    block_shards: int = Field(default=4, ge=1, description="shards that are shuffled together")
    workers: int = Field(default=2, ge=0, description="threads that read ahead in each process; 0: none")
    image_size: int = Field(default=224, ge=1, description="side of the training image, pixels")
    crop_scale: tuple[Unit, Unit] = Field(default=(0.2, 1.0), description="area of the random crop, share of the image")
    crop_ratio: tuple[Positive, Positive] = Field(
        default=(0.75, 1.3333333333333333), description="aspect ratio of the random crop, width / height"
    )
    flip: float = Field(default=0.5, ge=0, le=1, description="probability of a horizontal flip")
    contrast: float = Field(default=0.5, ge=0, le=1, description="contrast factor is drawn from 1 ± this")

    @field_validator("catalog", "held_out", mode="before")
    @classmethod
    def _one(cls, value: object) -> object:
        """One catalog may stand without a list."""
        return (value,) if isinstance(value, str) else () if value is None else value


class DecoderConfig(Section):
    """The decoder behind the encoder."""

    width: int = Field(default=512, ge=1, description="features per token")
    depth: int = Field(default=8, ge=0, description="blocks; 0: one linear layer instead of a decoder")
    heads: int = Field(default=16, ge=1, description="attention heads; must divide the width")


def model_sizes() -> tuple[str, ...]:
    """Names of the size table, looked up only when asked for, so that this file imports no model."""
    return tuple(importlib.import_module("foundation.models.families").FAMILY)


class ModelConfig(Section):
    """The encoder."""

    size: str = Field(default="base", description="row of the size table (foundation/models/families.py)")
    patch: int = Field(default=16, ge=1, description="side of a patch, pixels; must divide data.image_size")
    channels: int = Field(default=1, ge=1, le=1024, description="channels of the image")
    attention: str = Field(default="auto", description="backend of the attention; auto: the fastest for the device")
    positions: Literal["relative", "sincos", "learned"] = Field(
        default="relative",
        description="tables in every block (iRPE), or added once: fixed sines and cosines or a learnt vector per patch",
    )
    layer_scale: float | None = Field(
        default=None,
        gt=0,
        description="initial value of a learnt gain per channel behind attention and MLP; null: none",
    )
    mlp: Literal["gelu", "swiglu"] = Field(
        default="gelu", description="of encoder blocks: 4 widths of GELU, or as many parameters of gated SiLU"
    )
    qk_norm: bool = Field(default=False, description="normalise queries and keys of encoder blocks before the product")
    init: str | None = Field(
        default=None,
        min_length=1,
        description="weights the encoder starts from: a run, checkpoint, .pth, .safetensors or timm:NAME; null: random",
    )
    registers: int = Field(
        default=0, ge=0, le=16, description="learnt tokens beside the patches that nobody reads (arXiv 2309.16588)"
    )
    input_gain: Positive = Field(
        default=1.0, description="initial weights of the patch embedding times this: as if images were brighter"
    )
    decoder: DecoderConfig = Field(default=DecoderConfig(), description="decoder of masked tokens")

    @field_validator("size")
    @classmethod
    def _known_size(cls, value: str) -> str:
        return one_of(value, model_sizes())

    @field_validator("attention")
    @classmethod
    def _known_backend(cls, value: str) -> str:
        return one_of(value, ("auto", *importlib.import_module("kernels.rpe_attention").BACKENDS))


class ObjectiveConfig(Section):
    """What is predicted from what."""

    name: str = Field(default="sar-jepa", min_length=1, description="row of the objective registry")
    mask_ratio: float = Field(default=0.8, gt=0, lt=1, description="share of a window's tokens that are masked")
    windows: int = Field(default=4, ge=1, description="local windows per image, in distinct rows and columns")
    window: int = Field(default=7, ge=1, le=1024, description="side of a window, tokens")
    draw: Literal["per_image", "shared"] = Field(
        default="per_image", description="windows per image, or one draw per batch"
    )
    radii: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(5, 9, 13, 17), min_length=1, description="ratio targets: radii of the half windows, pixels"
    )
    offset: float = Field(
        default=0.01, gt=0, description="ratio targets: added to the padded image; amplitude in [0, 1]"
    )
    centre: Literal["include", "exclude"] = Field(
        default="include", description="ratio targets: centre line of the half windows"
    )
    fusion: Literal["separate", "equal", "learned"] = Field(
        default="separate",
        description="saratr-x-v2-target: a map per scale, their mean, or a softmax that is trained with the model",
    )
    normalise_pixels: bool = Field(
        default=False,
        description="lomar-sar, saratr-x-v2-target: patches of mean 0 and variance 1, as in MAE, LoMaR and SARATR-X v2",
    )
    cutoff: float = Field(
        default=40 / 224,
        gt=0,
        le=0.5,
        description="low-pass: highest frequency kept, cycles per pixel. The paper leaves it open; PixMIM's 40/224",
    )
    cell: int = Field(default=8, ge=1, description="hog, sar-hog: side of a cell, pixels; must divide model.patch")
    bins: int = Field(default=9, ge=1, le=1024, description="hog, sar-hog: bins of half a turn")
    blocks: int = Field(default=4, ge=1, le=64, description="i-jepa: target blocks per image")
    block_scale: tuple[Positive, Positive] = Field(
        default=(0.15, 0.2), description="i-jepa: share of the image that a target block covers, smallest and largest"
    )
    block_aspect: tuple[Positive, Positive] = Field(
        default=(0.75, 1.5), description="i-jepa: height / width of a target block, smallest and largest"
    )
    context_scale: tuple[Positive, Positive] = Field(
        default=(0.85, 1.0), description="i-jepa: share of the image of the block that targets are cut out of"
    )
    momentum: tuple[Unit, Unit] = Field(
        default=(0.996, 1.0),
        description="i-jepa: what the teacher keeps of itself per optim.reference_batch samples, at first and at last",
    )
    gaussian_window: int | None = Field(
        default=None, ge=2, description="hog: side of the Gaussian that weights gradients, pixels; null: no weights"
    )

    @field_validator("name")
    @classmethod
    def _known_objective(cls, value: str) -> str:
        return one_of(value, tuple(importlib.import_module("foundation.objectives.registry").OBJECTIVES))


class OptimConfig(Section):
    """AdamW and its schedule."""

    lr: float = Field(
        default=1e-3, gt=0, description="peak learning rate at reference_batch; scales with the global batch"
    )
    reference_batch: int = Field(default=256, ge=1, description="batch for which lr is given, samples")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.95), description="AdamW decay of the two moments"
    )
    weight_decay: float = Field(default=0.05, ge=0, description="decoupled weight decay of matrices")
    final_weight_decay: float | None = Field(
        default=None, ge=0, description="weight decay at the end of a cosine over the run; null: constant"
    )
    warmup_samples: int = Field(default=1_895_520, ge=0, description="linear warm-up, samples")
    warmup_lr: float = Field(default=0.0, ge=0, description="learning rate at its start, on the scale of lr")
    min_lr: float = Field(default=0.0, ge=0, description="learning rate at the end of the cosine, on the scale of lr")
    grad_clip: float | None = Field(default=None, gt=0, description="largest gradient norm; null does not clip")
    ema_half_life: int | None = Field(
        default=None, ge=1, description="half-life of a running average of the weights, samples; null: no average"
    )


class TrainConfig(Section):
    """How long, in what pieces, on what."""

    samples: int = Field(default=28_432_800, ge=1, description="length of the run, samples")
    global_batch: int = Field(
        default=300, ge=1, description="samples per update over all processes; a multiple of data.lanes"
    )
    micro_batch: int | None = Field(
        default=None, ge=1, description="samples per forward pass and process; null: the whole share of a process"
    )
    engine: str = Field(
        default="auto", min_length=1, description="single, ddp, fsdp2, ...; auto follows how the run was started"
    )
    shard_size: int | None = Field(
        default=None, ge=1, description="hsdp: processes that share one copy of the state; null: those of a node"
    )
    offload: bool = Field(default=False, description="fsdp2, hsdp, zero: keep the state in host memory")
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        default="none", description="compute activations of a block again in backward: all but products, or all"
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="arithmetic of the model; targets are always fp32"
    )
    float8: bool = Field(
        default=False, description="fsdp2, hsdp in bf16: products of the blocks in 8 bits (needs torchao and an H100)"
    )
    compile: bool = Field(default=False, description="torch.compile each block")
    log_every: int = Field(default=30_000, ge=1, description="samples between two log lines")
    checkpoint_every: int = Field(default=947_760, ge=1, description="samples between two checkpoints")
    keep: int = Field(default=3, ge=1, description="newest checkpoints to keep")
    keep_every: int | None = Field(
        default=None,
        ge=1,
        description="also keep the first checkpoint at or after each multiple of so many samples; null: none",
    )
    checkpoints: str | None = Field(
        default=None,
        min_length=1,
        description="folder or URL of the checkpoints of this run alone; null: RUN/checkpoints",
    )
    async_checkpoint: bool = Field(default=True, description="write checkpoints while the training goes on")
    threads: int | None = Field(default=None, ge=1, description="CPU threads per process; null leaves torch's choice")
    patience: float | None = Field(
        default=300.0, gt=0, description="seconds without an update until each process writes where it is; null: never"
    )

    @field_validator("engine")
    @classmethod
    def _known_engine(cls, value: str) -> str:
        return one_of(value, ("auto", *importlib.import_module("foundation.training.engines").ENGINES))

    @field_validator("checkpoints")
    @classmethod
    def _can_be_written(cls, value: str | None) -> str | None:
        """A folder, or a URL that takes files and holds no secret, since the configuration is saved and passed on."""
        scheme, mark, rest = (value or "").partition("://")
        if mark and scheme not in WRITTEN:
            raise ValueError(f"a folder or a URL of {', '.join(WRITTEN)}")
        if mark and ("@" in rest or "?" in rest):
            raise ValueError("a URL without user name or query; credentials come from the environment")
        return value


class Config(Section):
    """A whole run."""

    name: str = Field(default="sar-jepa", pattern=r"^\w[\w.+-]*$", description="name of the run, also of its folder")
    seed: int = Field(default=0, ge=0, description="seed of everything random")
    run_root: str = Field(default="runs", min_length=1, description="folder of run folders")
    data: DataConfig = Field(default=DataConfig(), description="images")
    model: ModelConfig = Field(default=ModelConfig(), description="network")
    objective: ObjectiveConfig = Field(default=ObjectiveConfig(), description="task")
    optim: OptimConfig = Field(default=OptimConfig(), description="optimiser")
    train: TrainConfig = Field(default=TrainConfig(), description="run")
    guard: GuardConfig = Field(default=GuardConfig(), description="updates that go wrong")
    monitor: MonitorConfig = Field(default=MonitorConfig(), description="looks at the features")
    tracking: TrackingConfig = Field(default=TrackingConfig(), description="records")

    @property
    def run_folder(self) -> Path:
        """`run_root/name`: everything this run writes."""
        return Path(self.run_root) / self.name

    @model_validator(mode="after")
    def _fits_together(self, info: ValidationInfo) -> Config:
        """Check keys against each other; the context, if any, is the list that collects the problems."""
        problems = list(conflicts(self))
        if info.context is not None:
            info.context.extend(problems)
        elif problems:
            raise summary(problems, "the configuration")
        return self


class Row(NamedTuple):
    """One key, as documentation shows it."""

    path: str
    type: str
    default: Any
    description: str


def from_dict(tree: Mapping[str, Any], where: str = "the configuration", earlier: Sequence[Problem] = ()) -> Config:
    """Validate a nested mapping; all errors, those found `earlier` included, come in one ConfigError."""
    problems, between = list(earlier), list[Problem]()
    try:
        config = Config.model_validate(tree, context=between)
    except ValidationError as error:
        problems += field_problems(error, known_paths(Config))
        # What remains is valid key by key, so the checks between keys can still run on it.
        config = Config.model_validate(without_errors(tree, error, known_paths(Config)), context=between)
    problems += [conflict for conflict in between if not conflict.follows_from(problems)]
    if problems:
        raise summary(problems, where)
    return config


def load(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (and its `base:` chain), apply `section.key=value` overrides, validate.

    Raises ConfigError with every error of the files and the overrides.
    """
    tree, problems = read_tree(Path(path), overrides)
    return from_dict(tree, str(path), problems)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict of JSON types, all keys present; `from_dict` gives the same configuration back."""
    return config.model_dump(mode="json")


def flatten(config: Config) -> dict[str, Any]:
    """Dotted path → value, for tables and trackers."""

    def walk(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in tree.items():
            if f"{prefix}{key}." in sections:
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    sections = {path.rpartition(".")[0] + "." for path in known_paths(Config) if "." in path}
    return dict(walk(to_dict(config), ""))


def resolved_yaml(config: Config) -> str:
    """The complete configuration as YAML that `load` reads back to an equal one."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None)


def config_hash(config: Config) -> str:
    """The first 12 hex digits of the sha256 of the canonical JSON."""
    text = json.dumps(to_dict(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def describe() -> list[Row]:
    """One row per key in the order of the tree, sections left out."""
    defaults, known = flatten(Config()), known_paths(Config)
    return [Row(path, allowed(known[path]), value, known[path].description or "") for path, value in defaults.items()]
