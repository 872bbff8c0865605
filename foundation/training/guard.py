"""What happens to updates that would spoil a run: not made, counted, undone, and in the end reported.

1. An update whose loss or gradient is not finite, or whose loss lies far above those before it, is not made. The device
   decides: the loss of the last micro-batch becomes NaN, its gradients spread that over all ranks, and the optimiser
   leaves weights and moments alone. The host learns of it one update later, so that no step waits for the device.
   A step far too large (a kick) is known only when it was made, so it is counted, and undone by the second rule.
2. After more than `guard.skips` skipped or kicked updates within `guard.window` updates the run goes back to the newest
   checkpoint before the first of them and passes over the samples up to here.
3. After `guard.rewinds` times NumericsError says what was seen.

All numbers in here are the same on all ranks, so that all decide alike. Windows hold only what was learnt from.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foundation.config import Config
from foundation.errors import NumericsError
from shards.stream import Batch

MAD = 1.4826  # median absolute deviations to standard deviations, for normal values
LATELY = 20  # windows: going back so far apart is no sign that it does not help
FLAT = 0.01  # least deviation as a share of the median: equal losses are not measured to the last digit
WATCHED = ("loss", "grad_norm", "update_norm")
ADVICE = "lower optim.lr, lengthen optim.warmup_samples, set optim.grad_clip=1.0, or take train.precision=fp32"
Tell = Callable[..., None]  # (kind of event, position, **facts)
Keep = Callable[[Sequence[Batch], int, Mapping[str, float]], None]


class Rewind(Exception):
    """The run has to go back: trouble began with the update at `first` and was seen up to `end` (samples)."""

    def __init__(self, first: int, end: int) -> None:
        super().__init__(f"trouble from sample {first:,} to {end:,}")
        self.first, self.end = first, end


class Window:
    """The last `length` values of a number, and what would be far above them: `score` robust deviations."""

    def __init__(self, length: int, score: float | None, values: Iterable[float] = ()) -> None:
        self.score, self.values = score, deque(values, maxlen=length)

    def add(self, value: float) -> None:
        """Remember a finite value; others are not looked at."""
        if math.isfinite(value):
            self.values.append(value)

    def limit(self) -> float:
        """Median + score x max(1.4826 MAD, 1 % of the median); infinite until the window is half full."""
        if self.score is None or 2 * len(self.values) < (self.values.maxlen or 0):
            return math.inf
        middle = statistics.median(self.values)
        deviation = MAD * statistics.median(abs(value - middle) for value in self.values)
        return middle + self.score * max(deviation, FLAT * abs(middle))


class _Pending(NamedTuple):
    """Numbers of an update on their way from the device, and what they came from."""

    numbers: Tensor
    arrived: torch.cuda.Event | None
    position: int
    limits: tuple[float, float]
    batches: Sequence[Batch]


class Guard:
    """The policy of a run; every rank has one and calls the same methods at the same updates.

    `tell` records an event, `keep` the batch of an update that was spoilt. `state` is what an earlier `state()` gave,
    `jumps` are spans of samples [begin, end) that are passed over, one for each time the run went back.
    """

    def __init__(
        self,
        config: Config,
        tell: Tell,
        keep: Keep,
        state: Mapping[str, Any] | None = None,
        jumps: Sequence[Sequence[int]] = (),
    ) -> None:
        self.config, self._tell, self._keep = config, tell, keep
        self.jumps = [tuple(jump) for jump in jumps]
        self.restore(state or {})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave at a checkpoint."""
        g = self.config.guard
        self._losses = Window(g.window, g.loss_score, state.get("losses", ()))
        self._updates = Window(g.window, g.update_score, state.get("updates", ()))
        self._troubled: list[int] = list(state.get("trouble", ()))
        self.missing: int = state.get("missing", 0)
        self._pending: _Pending | None = None

    def state(self) -> dict[str, Any]:
        """JSON values for a checkpoint; call `check` first. `missing`: updates that the optimiser did not make."""
        losses, updates = (list(window.values) for window in (self._losses, self._updates))
        return {"losses": losses, "updates": updates, "trouble": self._troubled, "missing": self.missing}

    def limit(self) -> float:
        """The largest loss that the next update may have."""
        return self._losses.limit()

    def passes_over(self, position: int) -> bool:
        """Whether the update at `position` lies in a span that led nowhere."""
        jumped = any(begin <= position < end for begin, end in self.jumps)
        self.missing += jumped
        return jumped

    def note(self, values: Mapping[str, Tensor], batches: Sequence[Batch], position: int, limit: float) -> None:
        """The numbers of the update at `position`, under `limit`; looks at those noted before. Raises as `check`."""
        self.check()
        numbers = torch.stack([values[name].float() for name in WATCHED])
        arrived = None
        if numbers.is_cuda:
            numbers = torch.empty(numbers.shape, pin_memory=True).copy_(numbers, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._pending = _Pending(numbers, arrived, position, (limit, self._updates.limit()), batches)

    def check(self) -> None:
        """Look at what was noted last. Raises Rewind, or NumericsError when that was tried often enough."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        if pending.arrived:
            pending.arrived.synchronize()
        found = dict(zip(WATCHED, pending.numbers.tolist(), strict=True))
        limit, most = pending.limits
        if not math.isfinite(found["grad_norm"]):  # the optimiser has looked at the same number
            self.missing += 1
            self._trouble(pending, "skipped", found | {"limit": limit})
        elif found["update_norm"] > most:
            self._trouble(pending, "kicked", found | {"limit": most})
        else:
            self._losses.add(found["loss"])
            self._updates.add(found["update_norm"])

    def _trouble(self, pending: _Pending, kind: str, facts: Mapping[str, float]) -> None:
        g, stride, position = self.config.guard, self.config.train.global_batch, pending.position
        self._keep(pending.batches, position, facts)
        self._tell(kind, position, **facts)
        self._troubled = [p for p in self._troubled if p > position - g.window * stride] + [position]
        if len(self._troubled) <= g.skips:
            return
        lately = [end for _, end in self.jumps if end > position - LATELY * g.window * stride]
        if len(lately) >= g.rewinds:
            raise NumericsError(self._diagnosis(kind, facts), where=f"sample {position}", do=ADVICE)
        raise Rewind(self._troubled[0], position + stride)

    def _diagnosis(self, kind: str, facts: Mapping[str, float]) -> str:
        """What was seen, in words."""
        g = self.config.guard
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in facts.items())
        told = f"{len(self._troubled)} of the last {g.window} updates were spoilt, the last one {kind} ({numbers})"
        back = f"; the run has gone back {len(self.jumps)} times (guard.rewinds)" if self.jumps else ""
        usual = statistics.median(self._losses.values) if self._losses.values else math.nan
        return f"{told}{back}; the usual loss was {usual:.4g}; no checkpoint holds anything that is not finite"
