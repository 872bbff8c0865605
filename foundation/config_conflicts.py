"""Keys of a configuration that are valid one by one and not together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from foundation.config_text import Problem

if TYPE_CHECKING:
    from foundation.config import Config


def conflicts(c: Config) -> Iterator[Problem]:
    """Every conflict between keys, with the dotted paths of all keys that take part."""

    def conflict(value: object, text: str, path: str, *others: str) -> Problem:
        return Problem(path, value, text, others=others)

    d, m, o, t = c.data, c.model, c.objective, c.train
    if t.global_batch % d.lanes:
        text = f"a multiple of data.lanes = {d.lanes}"
        yield conflict(t.global_batch, text, "train.global_batch", "data.lanes")
    if t.micro_batch and t.global_batch % t.micro_batch:
        text = f"a divisor of train.global_batch = {t.global_batch}"
        yield conflict(t.micro_batch, text, "train.micro_batch", "train.global_batch")
    if c.optim.warmup_samples > t.samples:
        text = f"at most train.samples = {t.samples}"
        yield conflict(c.optim.warmup_samples, text, "optim.warmup_samples", "train.samples")
    if c.optim.min_lr > c.optim.lr:
        yield conflict(c.optim.min_lr, f"at most optim.lr = {c.optim.lr}", "optim.min_lr", "optim.lr")
    for key in ("crop_scale", "crop_ratio"):
        low, high = getattr(d, key)
        if not 0 < low <= high:
            yield conflict([low, high], "[low, high] with 0 < low <= high", f"data.{key}")
    if m.decoder.width % m.decoder.heads:
        text = f"a multiple of model.decoder.heads = {m.decoder.heads}"
        yield conflict(m.decoder.width, text, "model.decoder.width", "model.decoder.heads")
    if max(o.radii) >= d.image_size:
        text = f"radii below data.image_size = {d.image_size} (reflect padding)"
        yield conflict(list(o.radii), text, "objective.radii", "data.image_size")
    masked = int(o.window**2 * o.mask_ratio)
    if not 0 < masked < o.window**2:
        text = f"a share that masks at least one of {o.window**2} tokens and leaves one visible, not {masked}"
        yield conflict(o.mask_ratio, text, "objective.mask_ratio", "objective.window")
    sides = ("data.image_size", "model.patch")
    if d.image_size % m.patch:
        yield conflict(d.image_size, f"a multiple of model.patch = {m.patch}", *sides)
    elif o.window > (grid := d.image_size // m.patch):
        yield conflict(o.window, f"at most the token grid's side {grid}", "objective.window", *sides)
    elif o.windows > (places := grid - o.window + 1):
        text = f"at most {places}: a window of {o.window} has {places} distinct rows in a grid of {grid}"
        yield conflict(o.windows, text, "objective.windows", "objective.window", *sides)
