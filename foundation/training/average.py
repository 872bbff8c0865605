"""A running average of the weights: held in pieces as they are, so that no process has to ask another."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the optimiser changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def followed(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters of a model's teacher, and those of its encoder in the same order."""
    named = {part: dict(getattr(model, part).named_parameters()) for part in ("teacher", "encoder")}
    return list(named["teacher"].values()), [named["encoder"][name] for name in named["teacher"]]


class Average:
    """After every update a weight w adds (1 - decay) · w to decay · its average; begins at the initial weights.

    `weights` are the fp32 weights of this process by name: whole, or pieces (DTensors), of which `local` gives the
    part that lies here. `half_life` and `stride` (of one update) in samples: decay = 2^(-stride / half_life), so that
    the average does not depend on the global batch.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], half_life: int, stride: int, local: Callable[[Tensor], Tensor]
    ) -> None:
        self.decay = 2.0 ** (-stride / half_life)
        self.values = {name: weight.detach().clone() for name, weight in weights.items()}
        self._live = [local(weight.detach()) for weight in weights.values()]
        self._mine = [local(value) for value in self.values.values()]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        torch._foreach_lerp_(self._mine, self._live, 1 - self.decay)

    @torch.no_grad()
    def exchange(self) -> None:
        """The weights become the average and the average the weights; a second call undoes it."""
        for live, mine in zip(self._live, self._mine, strict=True):
            held = live.clone()
            live.copy_(mine)
            mine.copy_(held)
