"""Gradients must be finite: looked at one update later, so that no step waits for the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foundation.errors import NumericsError


class Finite:
    """Reads the gradient norm of each update when the next one is under way, and all before anything is saved.

    An update with a gradient that is not finite spoils the weights in memory; the error ends the run before a
    checkpoint, an average or a figure can hold anything of it.
    """

    def __init__(self) -> None:
        self._pending: tuple[Tensor, torch.cuda.Event | None, int] | None = None

    def note(self, norm: Tensor, position: int) -> None:
        """The gradient norm of the update at `position`; looks at the one noted before. Raises NumericsError."""
        self.check()
        if not norm.is_cuda:
            self._pending = norm, None, position
            return
        copy = torch.empty(norm.shape, dtype=norm.dtype, pin_memory=True).copy_(norm, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._pending = copy, arrived, position

    def check(self) -> None:
        """Look at what was noted last. Raises NumericsError when it is not finite."""
        if self._pending is None:
            return
        (norm, arrived, position), self._pending = self._pending, None
        if arrived:
            arrived.synchronize()
        if not math.isfinite(value := norm.item()):
            raise NumericsError(
                f"the gradient norm is {value}; no checkpoint holds anything of it",
                where=f"sample {position}",
                do="resume with train.precision=fp32, or start a new run with optim.grad_clip=1.0 or a lower optim.lr",
            )
