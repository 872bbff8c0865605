"""Keys of a configuration that are valid one by one and not together."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from foundation.config_text import Problem

if TYPE_CHECKING:
    from foundation.config import Config


def conflicts(c: Config) -> Iterator[Problem]:
    """Every conflict between keys, with the dotted paths of all keys that take part."""

    def conflict(value: object, text: str, path: str, *others: str) -> Problem:
        return Problem(path, value, text, others=others)

    d, m, t = c.data, c.model, c.train
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
    if c.optim.warmup_lr > c.optim.lr:
        yield conflict(c.optim.warmup_lr, f"at most optim.lr = {c.optim.lr}", "optim.warmup_lr", "optim.lr")
    for key in ("crop_scale", "crop_ratio"):
        low, high = getattr(d, key)
        if not 0 < low <= high:
            yield conflict([low, high], "[low, high] with 0 < low <= high", f"data.{key}")
    if m.decoder.width % m.decoder.heads:
        text = f"a multiple of model.decoder.heads = {m.decoder.heads}"
        yield conflict(m.decoder.width, text, "model.decoder.width", "model.decoder.heads")
    if d.image_size % m.patch:
        yield conflict(d.image_size, f"a multiple of model.patch = {m.patch}", "data.image_size", "model.patch")
    # Looked up here, so that this file imports no model; the name is valid, or its default.
    yield from importlib.import_module("foundation.objectives.registry").build(c).conflicts()
