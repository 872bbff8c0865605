"""Name → complete objective. A row names the class that trains and the target it is given; keys come from the YAML."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from foundation.config import Config
from foundation.config_text import Problem
from foundation.models.families import Tokens
from foundation.objectives.histograms import HOG, SARHOG
from foundation.objectives.latent import JointEmbeddingPrediction
from foundation.objectives.reconstruction import (
    LearnedFusion,
    MaskedReconstruction,
    UnmaskedReconstruction,
    VisibleReconstruction,
)
from foundation.objectives.targets import (
    FixedTarget,
    GaussianRatio,
    GradientRatio,
    LowPass,
    MeanScale,
    NormalisedPixels,
    Pixels,
    StandardisedPatches,
    StructuralScales,
)


class Inputs(Protocol):
    """What one micro-batch asks of the model."""

    @property
    def model_args(self) -> tuple[Tensor, ...]:
        """The arguments of the model, on the device."""


class Objective(Protocol):
    """What is learnt: a frame (masks, what the model sees) and what it predicts. It holds no tensor and no weight."""

    @property
    def config(self) -> Config:
        """The configuration it was built from."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the maps that are predicted, for the log and for figures."""

    @property
    def evaluated(self) -> str:
        """The part of the model that is judged and exported: `encoder`, or `teacher`."""

    @property
    def encodings(self) -> tuple[str, ...]:
        """The values of model.positions that it can build on."""

    @property
    def class_token(self) -> bool:
        """Whether encoders have one."""

    def tokens(self) -> Tokens:
        """The sizes that formulas of memory and time need."""

    def conflicts(self) -> Iterator[Problem]:
        """Keys of the configuration that cannot be together under this objective."""

    def build_model(self) -> nn.Module:
        """A module with `encoder` (and `teacher`, which requires no gradient) without initial weights of its own."""

    def prepare(self, images: Tensor, positions: Tensor, begin: int = 0) -> Inputs:
        """Masks, and targets that need no model, of a micro-batch: images fp32 [B, C, S, S], positions int64 [B].

        `begin` is the first position of the global batch they belong to, which the host knows without asking a device.
        """

    def compared(self, prediction: Any, inputs: Any) -> tuple[Tensor, Tensor]:
        """What the loss compares: predicted and target values, both [..., out]."""

    def loss(self, prediction: Any, inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The fp32 loss of what the model returned, and detached scalars for the log."""

    def momentum(self, position: int) -> float | None:
        """What a teacher keeps of itself in the update that follows `position` samples; None without a teacher."""


class Row(NamedTuple):
    """How an objective is built, and what it is."""

    build: Callable[[Config], Objective]
    description: str


def pixels(config: Config) -> Objective:
    """Raw pixels, or those of patches of mean 0 and variance 1."""
    model = config.model
    normalised = config.objective.normalise_pixels
    target = NormalisedPixels(model.patch, model.channels) if normalised else Pixels(model.channels)
    return MaskedReconstruction(config, target)


def mae(config: Config) -> Objective:
    """Pixels of patches of mean 0 and variance 1, of which the encoder sees nothing."""
    return VisibleReconstruction(config, NormalisedPixels(config.model.patch, config.model.channels))


def fg_mae(config: Config) -> Objective:
    """Histograms of Sobel gradients of patches of which the encoder sees nothing."""
    o = config.objective
    return VisibleReconstruction(config, HOG(o.cell, o.bins, o.gaussian_window, config.model.channels))


def i_jepa(config: Config) -> Objective:
    """A teacher's features in blocks of which the encoder sees nothing."""
    return JointEmbeddingPrediction(config)


def lomar(config: Config) -> Objective:
    """Pixels of patches of mean 0 and variance 1."""
    return MaskedReconstruction(config, NormalisedPixels(config.model.patch, config.model.channels))


def low_pass(config: Config) -> Objective:
    """Low-pass-filtered pixels."""
    return MaskedReconstruction(config, LowPass(config.objective.cutoff, config.model.channels))


def hog(config: Config) -> Objective:
    """Histograms of Sobel gradients."""
    o = config.objective
    return MaskedReconstruction(config, HOG(o.cell, o.bins, o.gaussian_window, config.model.channels))


def sar_hog(config: Config) -> Objective:
    """Histograms of gradient ratios."""
    o = config.objective
    target = SARHOG(o.radii, o.offset, o.centre, o.cell, o.bins, config.model.channels)
    return MaskedReconstruction(config, target)


def pgga(config: Config) -> Objective:
    """The gradient ratio of all patches, nothing hidden."""
    return UnmaskedReconstruction(config, ratio(GradientRatio, config))


def sar_jepa_gaussian(config: Config) -> Objective:
    """The gradient ratio with Gaussian half windows."""
    return MaskedReconstruction(config, ratio(GaussianRatio, config))


def sar_jepa(config: Config) -> Objective:
    """The gradient ratio of box windows."""
    return MaskedReconstruction(config, ratio(GradientRatio, config))


def structural(config: Config) -> Objective:
    """SARATR-X v2's scales, each a map of its own or fused."""
    if config.objective.fusion == "learned":
        return LearnedFusion(config, ratio(StructuralScales, config))
    target = ratio(MeanScale if config.objective.fusion == "equal" else StructuralScales, config)
    normalised = config.objective.normalise_pixels
    return MaskedReconstruction(config, StandardisedPatches(target, config.model.patch) if normalised else target)


def ratio(target: Callable[[tuple[int, ...], float, str, int], FixedTarget], config: Config) -> FixedTarget:
    """A target of half windows with the keys of a configuration."""
    o = config.objective
    return target(o.radii, o.offset, o.centre, config.model.channels)


OBJECTIVES = {
    "mae": Row(mae, "normalised pixels of random patches, the encoder sees the others (MAE, arXiv 2111.06377)"),
    "lomar": Row(lomar, "normalised pixels of masked local windows (LoMaR, arXiv 2206.00790)"),
    "i-jepa": Row(i_jepa, "features of a moving average of the encoder in masked blocks (I-JEPA, arXiv 2301.08243)"),
    "fg-mae": Row(fg_mae, "histograms of oriented gradients of random patches (FG-MAE, arXiv 2310.18653)"),
    "lomar-sar": Row(pixels, "pixels of masked local windows (LoMaR-SAR of arXiv 2311.15153)"),
    "low-pass": Row(low_pass, "low-pass-filtered pixels of masked local windows (arXiv 2311.15153, 2303.02416)"),
    "hog": Row(hog, "histograms of oriented gradients of masked local windows (target of arXiv 2112.09133)"),
    "sar-hog": Row(sar_hog, "histograms of gradient ratios of masked local windows (arXiv 2311.15153)"),
    "pgga": Row(pgga, "multi-scale gradient-ratio features of all patches, no masking (PGGA of arXiv 2311.15153)"),
    "sar-jepa-gaussian": Row(sar_jepa_gaussian, "sar-jepa with Gaussian half windows (arXiv 2311.15153)"),
    "sar-jepa": Row(sar_jepa, "multi-scale gradient-ratio features of masked local windows (arXiv 2311.15153)"),
    "saratr-x-v2-target": Row(structural, "SARATR-X v2's six scales of masked local windows (arXiv 2607.23238)"),
}


def build(config: Config) -> Objective:
    """The objective a configuration names; configurations with an unknown name do not exist."""
    return OBJECTIVES[config.objective.name].build(config)
