"""A handful of processes that do something together, on the CPU and apart from the training's own collectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from shards.errors import ExplainedError

T = TypeVar("T")


class OtherRankError(ExplainedError):
    """What went wrong on another rank."""


class Ranks(NamedTuple):
    """This process among `size` ones; `gather(value)` → the values of all, on all; `group` is torch's process group."""

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    group: Any = None


ALONE = Ranks()


def everywhere(ranks: Ranks, action: Callable[[], T]) -> T:
    """The result of `action`, which all ranks call. When it fails on some, every rank raises: its own error, or one
    that names another's. So nobody waits for a rank that has given up."""
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    texts = ranks.gather(None if failure is None else f"rank {ranks.rank}: {failure}")
    if failure is not None:
        raise failure
    if failed := [text for text in texts if text is not None]:
        raise OtherRankError(failed[0], do="see the messages of that rank")
    return result


def together(ranks: Ranks, action: Callable[[], T]) -> list[T]:
    """The results of all ranks, on all; see `everywhere`. Small ones: they travel."""
    return ranks.gather(everywhere(ranks, action))
