"""Frozen features: labelled samples of a catalog → what an encoder sees in them, in the catalog's order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from foundation.models.vit import ViT
from shards.augment import resize_center
from shards.errors import DataError
from shards.schema import content_hash
from shards.stream import Batch

Progress = Callable[[int, int], None]
TOKEN_GIB = 8.0  # patch tokens of one listing that may be held, in GiB


class SampleReader(Protocol):
    """What is asked of `shards.stream.Reader`: a length and a sample for each id."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Listing:
    """The labelled samples of a reader; nothing but labels, names and hashes is held.

    `ids` are the sample ids in the reader, `y` int64 [N] indexes `classes`, `hashes` name the
    pixels.
    """

    reader: SampleReader
    ids: tuple[int, ...]
    y: Tensor
    classes: tuple[str, ...]
    keys: tuple[str, ...]
    hashes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: Tensor) -> Listing:
        """The samples at `index` (int64 [M]), in that order."""
        at = index.tolist()
        picked = {name: tuple(getattr(self, name)[i] for i in at) for name in ("ids", "keys", "hashes")}
        return replace(self, y=self.y[index], **picked)

    def batches(self, size: int) -> Iterator[Batch]:
        """Batches of at most `size` samples in order, pixels as stored."""
        for start in range(0, len(self), size):
            ids = self.ids[start : start + size]
            samples = [self.reader[i] for i in ids]
            number = torch.arange(start, start + len(ids))
            batch = Batch.of(samples, number, torch.tensor(ids, dtype=torch.int64))
            yield replace(batch, label=self.y[start : start + size])


def listing(
    reader: SampleReader, names: Sequence[str], classes: Sequence[str] | None = None, where: str = ""
) -> Listing:
    """List the labelled samples of `reader`; `names[label]` is the class of a label of that reader.

    `classes` fixes the numbering (the training set's, for a test set); by default it is the classes that occur, sorted.
    Raises DataError when nothing is labelled (in `where`) or a sample's class is not in `classes`.
    """
    samples = [(i, s.label, s.key, content_hash(s.pixels)) for i, s in _samples(reader) if s.label >= 0]
    if not samples:
        raise DataError(
            f"none of the {len(reader)} samples has a class",
            where=where,
            do="evaluate on sources packed with class labels",
        )
    ids, labels, keys, hashes = zip(*samples, strict=True)
    found = sorted({names[label] for label in labels})
    order = tuple(found if classes is None else classes)
    if unknown := [name for name in found if name not in order]:
        raise DataError(
            f"the test samples have classes that the training samples do not have: {', '.join(unknown)}",
            where=f"training classes: {', '.join(order)}",
            do="name the classes alike in both sources, or leave the others out of the test source",
        )
    y = torch.tensor([order.index(names[label]) for label in labels], dtype=torch.int64)
    return Listing(reader, ids, y, order, keys, hashes)


def _samples(reader: SampleReader) -> Iterator[tuple[int, Any]]:
    return ((i, reader[i]) for i in range(len(reader)))


def check_disjoint(train: Listing, test: Listing) -> None:
    """Raise DataError if `train` and `test` share an image. Pixels decide: keys are counters, and start again."""
    seen = dict(zip(test.hashes, test.keys, strict=True))
    pairs = [f"{k} = {seen[h]}" for k, h in zip(train.keys, train.hashes, strict=True) if h in seen]
    if pairs:
        raise DataError(
            f"{len(pairs)} of {len(train)} training samples are also among the {len(test)} test samples",
            where=", ".join(pairs[:5]) + (", ..." if len(pairs) > 5 else ""),
            do="take them out of the training source and pack it again; scores on seen images mean nothing",
        )


@dataclass(frozen=True)
class Features:
    """`x` fp32 [N, D] class tokens (`mean` where there are none), `mean` fp32 [N, D] averages of the patch tokens.

    `y` int64 [N] indexes `classes`; `tokens` are the patch tokens, fp16 [N, n, D], if they were asked for.
    """

    x: Tensor
    mean: Tensor
    y: Tensor
    classes: tuple[str, ...]
    keys: tuple[str, ...]
    tokens: Tensor | None = None

    def __len__(self) -> int:
        return len(self.y)


def room(samples: int, shape: torch.Size) -> Tensor:
    """An empty fp16 tensor for the patch tokens ([B, n, D]) of so many samples. Raises DataError beyond TOKEN_GIB."""
    if (need := samples * shape[1] * shape[2] * 2 / 2**30) > TOKEN_GIB:
        raise DataError(
            f"the patch tokens of {samples:,} images ({shape[1]} tokens of {shape[2]} numbers in fp16) take {need:.1f} "
            f"GiB; at most {TOKEN_GIB:g} GiB are held",
            do="leave the attentive probe out, or name fewer images in a split file (--split)",
        )
    return torch.empty(samples, *shape[1:], dtype=torch.float16)


def image_batches(
    samples: Listing, image_size: int, crop: int | None = None, batch: int = 64, device: torch.device | str = "cpu"
) -> Iterator[Tensor]:
    """The samples on `device` as fp32 [b, C, image_size, image_size] in [0, 1]: centre crop (if given), resize."""
    for part in samples.batches(batch):
        yield resize_center(part.to(device), image_size, crop)


def images(samples: Listing, image_size: int, crop: int | None = None) -> Tensor:
    """All samples at once, fp32 [N, C, image_size, image_size]; meant for the few shots that an encoder is tuned on."""
    return torch.cat(list(image_batches(samples, image_size, crop)))


@torch.no_grad()
def extract(
    encoder: ViT,
    samples: Listing,
    image_size: int,
    crop: int | None = None,
    *,
    batch: int = 64,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    keep_tokens: bool = False,
) -> Features:
    """Features of all `samples` in their order, computed in fp32 with the encoder in evaluation mode.

    The encoder is moved to `device` and its mode restored; `progress(done, total)` is called after each batch.
    `keep_tokens` keeps all patch tokens; raises DataError when they take more than TOKEN_GIB.
    """
    was_training = encoder.training
    encoder.to(device).eval()
    cls, mean, done = [], [], 0
    kept: Tensor | None = None
    try:
        for pixels in image_batches(samples, image_size, crop, batch, device):
            tokens = encoder.forward_features(pixels).float().cpu()
            patches = tokens[:, encoder.prefix :]
            cls.append(encoder.pooled(tokens).clone())  # a view would keep all tokens
            mean.append(patches.mean(1))
            if keep_tokens:
                kept = room(len(samples), patches.shape) if kept is None else kept
                kept[done : done + len(patches)] = patches
            done += len(tokens)
            if progress is not None:
                progress(done, len(samples))
    finally:
        encoder.train(was_training)
    return Features(torch.cat(cls), torch.cat(mean), samples.y, samples.classes, samples.keys, kept)
