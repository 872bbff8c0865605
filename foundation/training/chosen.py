"""A few images of a catalog, always the same, that all processes look at together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from foundation.config import Config
from foundation.training.data import order_of
from foundation.training.ranks import Ranks
from shards.augment import resize_center
from shards.catalog import Catalog
from shards.stream import Batch, Reader


class Part(NamedTuple):
    """Images of one forward pass: their numbers among the chosen ones int64 [b], fp32 [b, C, S, S] in [0, 1], labels
    int64 [b] (-1: none). Numbers from the count of chosen ones on are repetitions."""

    numbers: Tensor
    images: Tensor
    labels: Tensor


class Chosen:
    """Samples `ids` of a catalog, read again at every look; nothing of them is held in memory.

    Rank r of n has every n-th from r on. Where they do not divide, the last ones are the first ones again, so that all
    ranks make equally many forward passes.
    """

    def __init__(self, catalog: Catalog, ids: Sequence[int], image_size: int, batch: int) -> None:
        self.reader, self.ids, self.image_size, self.batch = Reader(catalog), list(ids), image_size, batch

    def __len__(self) -> int:
        return len(self.ids)

    def parts(self, ranks: Ranks, device: torch.device) -> Iterator[Part]:
        """This rank's images, resized without randomness. A damaged one is replaced by its neighbour."""
        share = -(-len(self) // ranks.size)
        for numbers in torch.arange(share).mul(ranks.size).add(ranks.rank).split(self.batch):
            samples = [self.reader.valid(self.ids[n % len(self)]) for n in numbers.tolist()]
            batch = Batch.of(samples)
            yield Part(numbers, resize_center(batch.to(device), self.image_size), batch.label)

    def whole(self, ranks: Ranks, mine: Sequence[Tensor]) -> Tensor:
        """The rows of all chosen images in their order, from what each rank found for its own `parts`."""
        return torch.stack(ranks.gather(torch.cat(list(mine))), 1).flatten(0, 1)[: len(self)]


def first(catalog: Catalog, config: Config, count: int) -> list[int]:
    """Ids of `count` samples: those at the first positions of a run over the catalog, mixed by its weights.

    Their shards are the ones that a run opens first, wherever they are.
    """
    order = order_of(config, catalog, weighted=config.monitor.catalog is None)
    return order.sample_ids(np.arange(min(count, catalog.samples))).tolist()
