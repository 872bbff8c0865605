"""Metrics of class probabilities, and their values over many resampled test sets at once.

The values come from scikit-learn and torchmetrics. `resampled` gives the same numbers for thousands of bootstrap
samples, each written as how often it holds every image, in a few products.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from shards.addressed import bits

BINS = 15


def accuracy(y: Tensor, probabilities: Tensor) -> float:
    """Share of right answers; `y` int64 [N], `probabilities` [N, C]."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(y.numpy(), probabilities.argmax(1).numpy()))


def balanced_accuracy(y: Tensor, probabilities: Tensor) -> float:
    """Mean over the classes that occur in `y` of the share of right answers."""
    from sklearn.metrics import balanced_accuracy_score

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes that a small test set lacks
        return float(balanced_accuracy_score(y.numpy(), probabilities.argmax(1).numpy()))


def calibration_error(y: Tensor, probabilities: Tensor) -> float:
    """Expected calibration error in 15 bins: how far confidence lies from the share of right answers, 0 is best."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    classes = probabilities.shape[1]
    # Clamped: torchmetrics takes votes that sum to 1.0000001 for logits.
    shares = probabilities.float().clamp(0, 1)
    return multiclass_calibration_error(shares, y, classes, n_bins=BINS, norm="l1").item()


def certain(y: Tensor, answers: Tensor) -> Tensor:
    """Class probabilities [N, C] as they are; of classes int64 [N], probability 1 for each."""
    return (
        answers if answers.ndim == 2 else one_hot(answers.long(), max(int(y.max()), int(answers.max()), 1) + 1).float()
    )


METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": accuracy,
    "balanced accuracy": balanced_accuracy,
    "calibration error": calibration_error,
}


def resamples(seed: int, purpose: str, count: int, length: int, chunk: int = 100) -> Iterator[Tensor]:
    """How often each of `length` things is in each of `count` bootstrap samples: fp64 [chunk, length], addressed."""
    for first in range(0, count, chunk):
        number = torch.arange(first, min(first + chunk, count))
        pick = bits(seed, purpose, number, length) % length
        yield torch.zeros(len(number), length, dtype=torch.float64).scatter_add_(
            1, pick, torch.ones_like(pick).double()
        )


def interval(metric: str, value: float, found: Tensor) -> tuple[float, float]:
    """Ends of the 95 % interval of a metric that is `value` on the test set and `found` [R] on bootstrap samples of it.

    The percentiles; of the calibration error the basic interval, cut at 0: the error of finitely many answers is too
    large on average, that of a sample of these once more, so the percentiles of calibrated answers lie above 0.
    The basic interval of these holds 0 in two of three cases, not in 95 of 100; an error far from 0 it holds in about
    90 of 100.
    """
    low, high = found.double().quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    if metric == "calibration error":
        return max(0.0, 2 * value - high), max(0.0, 2 * value - low)
    return low, high


def resampled(metric: str, y: Tensor, probabilities: Tensor, counts: Tensor) -> Tensor:
    """The metric of test sets that hold image i `counts[r, i]` times (fp64 [R, N]): fp64 [R]."""
    confidence, predicted = probabilities.float().clamp(0, 1).max(1)
    right, total = (predicted == y).double(), counts.sum(1)
    if metric == "accuracy":
        return counts @ right / total
    if metric == "balanced accuracy":
        member = one_hot(y).double()
        support = counts @ member
        share = (counts @ (member * right[:, None])) / support.clamp_min(1)
        return share.sum(1) / (support > 0).sum(1)
    edges = torch.linspace(0, 1, BINS + 1)
    inside = one_hot(torch.bucketize(confidence, edges, right=True) - 1, BINS + 1).double()  # certainty is its own bin
    return (counts @ (inside * (right - confidence)[:, None])).abs().sum(1) / total
