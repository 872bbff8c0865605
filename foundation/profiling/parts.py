"""The parts of an update, seen from outside: what a step calls is wrapped, the step stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import Any

import torch
from torch.profiler import record_function

from foundation.training.step import Learner

PARTS = ("augment", "target", "forward", "loss", "backward", "optimiser")


class Parts:
    """Names the parts of an update in a trace, and with `timed` adds up their seconds, waiting for the device."""

    def __init__(self, device: torch.device, timed: bool) -> None:
        self.device, self.timed = device, timed
        self.seconds = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Around one part. When it is timed, the device has ended what came before and what is inside."""
        began = self._now()
        with record_function(f"## {name}"):
            yield
        self.seconds[name] += self._now() - began

    def _now(self) -> float:
        if self.timed and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return perf_counter()

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function as a part."""

        def named(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return function(*arguments, **options)

        return named

    @contextmanager
    def watch(self, learner: Learner) -> Iterator[Learner]:
        """A learner whose updates tell their parts; the given one is as before at the end."""
        engine, objective = learner.engine, learner.objective
        methods: list[tuple[Any, str, str]] = [
            (objective, "prepare", "target"),
            (objective, "loss", "loss"),
            (engine, "mean", "loss"),
            (engine, "backward", "backward"),
            *((engine, name, "optimiser") for name in ("update", "update_norm", "follow")),
            *([(learner.average, "update", "optimiser")] if learner.average else []),
        ]
        open_parts: list[Any] = []

        def enter(*_: Any) -> None:
            open_parts.append(self.part("forward"))
            open_parts[-1].__enter__()

        def leave(*_: Any) -> None:
            open_parts.pop().__exit__(None, None, None)

        with ExitStack() as undo:
            for owner, method, name in methods:
                setattr(owner, method, self.around(name, getattr(owner, method)))
                undo.callback(delattr, owner, method)
            for hook in (
                learner.model.register_forward_pre_hook(enter, prepend=True),
                learner.model.register_forward_hook(leave),
            ):
                undo.callback(hook.remove)
            augment: Any = self.around("augment", learner.augment)
            yield learner._replace(augment=augment)
