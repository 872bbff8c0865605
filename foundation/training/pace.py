"""Which process holds the others up: time that each needs before it meets them, compared whenever a line is logged.

Processes that average gradients all take as long as the slowest, so the time of an update says nothing. What a process
needs for itself is its waiting for data, and augmentation, target and forward pass, which meet nobody. Engines that
gather weights in the forward pass wait for each other there already: of them only the waiting for data tells.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median
from time import perf_counter
from typing import Any

import torch

from foundation.training.data import micro_batch
from foundation.training.step import Learner

KEPT = 256  # newest updates of which a mean is taken
Moment = float | torch.cuda.Event


class Pace:
    """The time of this process before it meets the others; all processes call `read` together, after the device."""

    def __init__(self, learner: Learner) -> None:
        self._engine, self._global_batch = learner.engine, learner.config.train.global_batch
        self._begun: Moment | None = None
        self._spans: deque[tuple[Moment, Moment]] = deque(maxlen=KEPT)
        if self._engine.world_size > 1:
            share = self._global_batch // self._engine.world_size
            self._micro_batches = share // micro_batch(learner.config, self._engine.world_size)
            learner.model.register_forward_hook(self._computed)

    def begin(self) -> None:
        """An update begins; its batch is there."""
        if self._engine.world_size > 1:
            self._begun = self._now()

    def _computed(self, *_: Any) -> None:
        """The first forward pass since `begin` has ended; others, and those of looks, do not count."""
        if self._begun is not None:
            self._spans.append((self._begun, self._now()))
            self._begun = None

    def _now(self) -> Moment:
        if self._engine.device.type != "cuda":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self, rates: Mapping[str, float]) -> dict[str, float]:
        """`slowest_rank`, what it needs over the median of all (`slowest_ratio`) and its share of waiting for data.

        `rates` are those of `Throughput.read`. Nothing for one process. What the device was asked for before must have
        been waited for.
        """
        if self._engine.world_size == 1 or not self._spans:
            return {}
        computing = sum(map(seconds, self._spans)) / len(self._spans) * self._micro_batches
        waiting = rates["data_wait"] * self._global_batch / max(rates["images_per_s"], 1e-9)
        every = torch.zeros(self._engine.world_size, 2, dtype=torch.float64, device=self._engine.device)
        every[self._engine.rank] = torch.tensor([computing + waiting, rates["data_wait"]])
        needs, waits = (self._engine.mean(every) * self._engine.world_size).T.tolist()
        self._spans.clear()
        slowest = max(range(len(needs)), key=needs.__getitem__)
        ratio = needs[slowest] / max(median(needs), 1e-9)
        return {"slowest_rank": slowest, "slowest_ratio": ratio, "slowest_wait": waits[slowest]}


def seconds(span: tuple[Moment, Moment]) -> float:
    """From one moment to the other."""
    first, last = span
    if isinstance(first, torch.cuda.Event) and isinstance(last, torch.cuda.Event):
        return first.elapsed_time(last) / 1e3
    assert isinstance(first, float)
    assert isinstance(last, float)
    return last - first
