"""Linear probe: logistic regression on standardised frozen features."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from shards.addressed import permutation
from shards.errors import DataError

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)


def held_out(y: Tensor, seed: int = 0) -> Tensor:
    """A part of the training samples for choosing the regularisation, a fifth of each class: bool [N]."""
    out = torch.zeros(len(y), dtype=torch.bool)
    for label in torch.unique(y).tolist():
        members = (y == label).nonzero()[:, 0]
        order = permutation(seed, f"evaluation/held-out/{label}", torch.tensor([0]), len(members))[0]
        count = min(len(members) - 1, max(1, round(0.2 * len(members))))
        out[members[order[:count]]] = True
    return out


def _fit(x: Tensor, y: Tensor, strength: float, steps: int) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=steps, solver="lbfgs"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # recorded as `converged` in the settings instead
        return model.fit(x.numpy(), y.numpy())


def predict(
    train: Tensor, y: Tensor, test: Tensor, *, seed: int = 0, steps: int = 1000
) -> tuple[Tensor, dict[str, Any]]:
    """Classes of `test` [M, D]: int64 [M], the most probable of `probabilities`, and the settings."""
    found, settings = probabilities(train, y, test, int(y.max()) + 1, seed=seed, steps=steps)
    return found.argmax(1), settings


def probabilities(
    train: Tensor, y: Tensor, test: Tensor, classes: int, *, seed: int = 0, steps: int = 1000
) -> tuple[Tensor, dict[str, Any]]:
    """Class probabilities fp32 [M, classes] of `test` [M, D] learnt from `train` [N, D], `y` int64 [N], and settings.

    The strength C is the one with the best accuracy on a held-out fifth of TRAIN (the smaller of equals; 1 if no class
    has two samples); the model is then fitted on all of TRAIN. Raises DataError when there are fewer than two classes.
    """
    if len(torch.unique(y)) < 2:
        what = "a linear probe needs at least two classes in the training samples, found 1"
        raise DataError(what, do="pack labelled images of another class into the train split")
    train, test = train.double().cpu(), test.double().cpu()
    out = held_out(y, seed)
    truth = y[out].numpy()
    tried: dict[float, float] = {}
    for strength in STRENGTHS if out.any() else ():
        guess = _fit(train[~out], y[~out], strength, steps).predict(train[out].numpy())
        tried[strength] = float((guess == truth).mean())
    best = max(tried, key=lambda c: (tried[c], -c), default=1.0)
    model = _fit(train, y, best, steps)
    taken = int(max(model[-1].n_iter_))
    settings = {"C": best, "held_out_accuracy": tried.get(best), "iterations": taken, "converged": taken < steps}
    found = torch.zeros(len(test), classes)
    found[:, torch.from_numpy(model.classes_)] = torch.from_numpy(model.predict_proba(test.numpy())).float()
    return found, settings
