"""Features made visible: principal components as colours, and chips on a plane."""

from __future__ import annotations

import torch
from torch import Tensor

from foundation.errors import DataError
from foundation.evaluation.calibration import wilson
from shards.addressed import stream_key

PERPLEXITY = 30.0
FEWEST = 4


def components(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Principal directions of rows x [n, D] → fp64 [D, count], and the share of variance of each, fp64 [count].

    Signs are fixed: the entry of largest size in a direction is positive, so neither the order of the rows nor the
    machine decides them. Of fewer than `count` directions the rest is zero.
    """
    centred = x.double() - x.double().mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    values, vectors = values.flip(0)[:count].clamp_min(0), vectors.flip(1)[:, :count]
    sign = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    missing = count - len(values)
    share = values / centred.square().sum().clamp_min(1e-300)
    return torch.nn.functional.pad(vectors * sign, (0, missing)), torch.nn.functional.pad(share, (0, missing))


def pca_colours(tokens: Tensor) -> tuple[Tensor, float]:
    """The first three principal components of patch tokens [B, N, D], fitted on all images together, as red, green and
    blue: fp32 [B, N, 3] in [0, 1], and the share of variance they hold.

    Each component runs from its 1st to its 99th percentile, so one colour means the same in every image.
    """
    flat = tokens.reshape(-1, tokens.shape[-1]).double().cpu()
    directions, share = components(flat, 3)
    values = (flat - flat.mean(0)) @ directions
    ends = values.quantile(torch.tensor([0.01, 0.99], dtype=torch.float64), dim=0)
    colours = ((values - ends[0]) / (ends[1] - ends[0]).clamp_min(1e-12)).clamp_(0, 1)
    return colours.float().view(*tokens.shape[:2], 3), share.sum().item()


def perplexity(count: int) -> float:
    """30, or a third of the neighbours where there are few chips."""
    return min(PERPLEXITY, (count - 1) / 3)


def tsne(x: Tensor, seed: int = 0) -> Tensor:
    """A plane on which neighbours of x [n, D] stay neighbours, fp32 [n, 2] (t-SNE, van der Maaten and Hinton, 2008).

    It starts from the principal components, and what is random is addressed by `seed`. Distances between far groups
    mean nothing. Raises DataError for fewer than four rows or values that are not finite.
    """
    from sklearn.manifold import TSNE

    if len(x) < FEWEST:
        raise DataError(f"t-SNE needs at least {FEWEST} chips, not {len(x)}", do="name a catalog with more of them")
    if not bool(x.isfinite().all()):
        raise DataError("features are not finite: they cannot be put on a plane", do="look at the loss of the run")
    directions, _ = components(x, min(50, x.shape[1]))
    rows = (x.double() - x.double().mean(0)) @ directions
    state = stream_key(seed, "figures/t-sne") & 0x7FFFFFFF
    rows = rows / rows.std(0)[0].clamp_min(1e-12)
    start = rows[:, :2] * 1e-4
    fit = TSNE(perplexity=perplexity(len(x)), init=start.float().numpy(), random_state=state, learning_rate="auto")
    return torch.from_numpy(fit.fit_transform(rows.float().numpy())).float()


def nearest_agree(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Share of rows x [n, D] whose nearest other row has the same class y int64 [n], and its 95 % interval (Wilson)."""
    distance = torch.cdist(x.double(), x.double()).fill_diagonal_(float("inf"))
    right = int((y[distance.argmin(1)] == y).sum())
    return right / len(y), *wilson(right, len(y))
