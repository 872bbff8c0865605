"""The collapse monitor's numbers: how much features, targets and predictions differ from image to image.

Collapsed features are the same for every image, or differ along one direction only; a loss may look well meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foundation.config_records import MonitorConfig


def feature_std(x: Tensor) -> float:
    """Standard deviation over images of features [N, D] of length 1, mean over dimensions, times sqrt(D): in [0, 1].

    1 for directions spread over a sphere, 0 for equal ones (SimSiam, arXiv 2011.10566, figure 2).
    """
    return float(normalize(x.double(), dim=1).std(0, correction=0).mean()) * math.sqrt(x.shape[1])


def rankme(x: Tensor) -> float:
    """Effective rank of features [N, D], in [1, min(N, D)]: RankMe (arXiv 2210.02885, equation 1).

    The exponential of the entropy of the singular values, normalised to a sum of 1; 1 where all features are zero.
    """
    values = torch.linalg.svdvals(x.double())
    return float(torch.special.entr(values / values.sum().clamp_min(1e-300)).sum().exp())


def mean_cosine(x: Tensor) -> float:
    """Mean cosine between the features [N, D] of two different images, in [-1, 1]; 1: all look the same way."""
    unit, count = normalize(x.double(), dim=1), len(x)
    return float((unit.sum(0).square().sum() - unit.square().sum()) / (count * (count - 1)))


class Moments(NamedTuple):
    """Rows that were seen, and their sum and sum of squares, float64 [D]: what processes exchange of a variance."""

    rows: int
    total: Tensor
    squares: Tensor

    @staticmethod
    def of(rows: Tensor) -> Moments:
        """Of values [..., D], on the CPU."""
        rows = rows.detach().double().flatten(0, -2)
        return Moments(len(rows), rows.sum(0).cpu(), rows.square().sum(0).cpu())


def variance(parts: Iterable[Moments]) -> float:
    """Variance over the rows of all parts, mean over dimensions."""
    counts, totals, squares = zip(*parts, strict=True)
    mean = sum(totals) / sum(counts)
    return float((sum(squares) / sum(counts) - mean.square()).clamp_min(0).mean())


def describe(features: Tensor) -> dict[str, float]:
    """The metrics of pooled features [N, D]; NaN where they are not finite."""
    if not features.isfinite().all():
        return dict.fromkeys(("feature_std", "feature_cosine", "rankme"), math.nan)
    return {
        "feature_std": feature_std(features),
        "feature_cosine": mean_cosine(features),
        "rankme": rankme(features),
    }


def collapsed(metrics: Mapping[str, float], limits: MonitorConfig) -> str | None:
    """What has collapsed, by these metrics and limits, in words; None when nothing has. A NaN is below every limit.

    The default limits lie between nano encoders on measured chips: untrained 0.05 to 0.17 and rank 2.3 to 2.6, trained
    0.02 (MAE) to 0.3 and 1.2 to 4.1, collapsed by step size or decay 0.0001 to 0.003 and 1.00 to 1.03.
    """
    bounds = {
        "feature_std": ("the features of different images are the same", limits.min_feature_std),
        "rankme": ("the features differ along one direction only", limits.min_rankme),
        "target_variance": ("the target is the same everywhere", limits.min_target_variance),
    }
    found = [
        f"{what} ({name} {metrics[name]:.3g}, limit {least:g})"
        for name, (what, least) in bounds.items()
        if name in metrics and not metrics[name] >= least
    ]
    return "; ".join(found) or None
