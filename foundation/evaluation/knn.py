"""Nearest neighbours: the score that nothing is trained for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot


def predict(train: Tensor, y: Tensor, test: Tensor, *, k: int = 20, temperature: float = 0.07) -> Tensor:
    """Classes of `test` [M, D]: int64 [M], the most probable of `probabilities`."""
    return probabilities(train, y, test, int(y.max()) + 1, k=k, temperature=temperature).argmax(1)


def probabilities(
    train: Tensor, y: Tensor, test: Tensor, classes: int, *, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Class probabilities fp32 [M, classes] of `test` [M, D]: the shares of the votes of the k most similar rows of
    `train` [N, D] (classes `y` int64 [N]).

    Similarity is the cosine; a neighbour votes with exp(similarity / temperature). k is at most N. Deterministic:
    fp64 on the CPU, the first of equals wins.
    """
    bank, votes = normalize(train.double().cpu(), dim=1), one_hot(y.cpu(), classes).double()
    found = []
    for part in torch.split(normalize(test.double().cpu(), dim=1), 1024):
        similarity, index = (part @ bank.T).topk(min(k, len(bank)), dim=1)
        # Relative to the nearest neighbour: the same votes, and exp cannot overflow at a low temperature.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        found.append(torch.einsum("mk,mkc->mc", weight / weight.sum(1, keepdim=True), votes[index]).float())
    return torch.cat(found)
