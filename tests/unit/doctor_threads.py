"""Processes of `foundation doctor` as threads that meet in one store."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from launch.doctor.meeting import Several
from launch.doctor.rows import Place


def places(*nodes: str) -> list[Place]:
    """One process for each name, in the order of ranks."""
    return [Place(rank=rank, node=node) for rank, node in enumerate(nodes)]


def together(ranks: Sequence[int], size: int, action: Callable[[Several], Any], patience: float = 20) -> list[Any]:
    """What `action` gives, or raises, in a thread for each of these ranks of a world of `size`."""
    store, results = dist.HashStore(), [None] * len(ranks)

    def run(index: int) -> None:
        try:
            results[index] = action(Several(store, ranks[index], size, patience))
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results
