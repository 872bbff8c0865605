"""Whether an encoder's probabilities can be believed: confidence against share of right answers."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from foundation.evaluation import metrics
from foundation.evaluation.predictions import Predictions

Z = 1.959964  # of a two-sided 95 % interval


class Bin(NamedTuple):
    """Answers of similar confidence: mean `confidence`, share of right answers with its 95 % interval, `weight`."""

    confidence: float
    accuracy: float
    low: float
    high: float
    weight: float


def wilson(right: float, total: float) -> tuple[float, float]:
    """Ends of the 95 % interval of a share (Wilson, 1927): `right` of `total` > 0; both need not be whole."""
    share, z2 = right / total, Z**2 / total
    centre, half = share + z2 / 2, Z * math.sqrt(share * (1 - share) / total + z2 / (4 * total))
    # At 0 and 1 the end is the share itself, which rounding would leave outside.
    return min(share, max(0.0, (centre - half) / (1 + z2))), max(share, min(1.0, (centre + half) / (1 + z2)))


def reliability(p: Predictions) -> list[Bin]:
    """Ten bins of equal width in confidence (the probability of the answer) that hold any answer, all seeds together.

    Answers to one image under several seeds are not independent: intervals count each image once.
    """
    confidence, answer = p.probabilities.double().max(-1)
    right = (answer == p.y).double()
    which = (confidence * 10).long().clamp_(0, 9)
    found = []
    for number in range(10):
        inside = which == number
        if total := int(inside.sum()):
            accuracy, once = right[inside].mean().item(), total / len(p.seeds)
            low, high = wilson(accuracy * once, once)
            found.append(Bin(confidence[inside].mean().item(), accuracy, low, high, total / confidence.numel()))
    return found


def calibration_error(p: Predictions) -> float:
    """Expected calibration error as in the table of scores, 15 bins, mean over the seeds; `reliability` draws fewer."""
    return sum(metrics.calibration_error(p.y, each) for each in p.probabilities) / len(p.seeds)


def confusion(p: Predictions) -> torch.Tensor:
    """Answers by true class (rows) and predicted class (columns), mean over the seeds: fp64 [C, C]."""
    from sklearn.metrics import confusion_matrix

    labels = range(len(p.classes))
    by_seed = [confusion_matrix(p.y.numpy(), answers.numpy(), labels=labels) for answers in p.predicted]
    return torch.from_numpy(np.mean(by_seed, axis=0))
