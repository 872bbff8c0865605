"""Running statistics of a source's amplitudes: exact for integers, percentiles within 1 % for floats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from shards.catalog import Amplitude
from shards.schema import amplitude_of, image_shape

_PERCENTILES = {"p1": 1.0, "p50": 50.0, "p99": 99.0, "p99_9": 99.9}


class Statistics:
    """Counts over the samples added so far, of pixels of `dtype`; complex pixels and pairs count by their magnitude.

    All have as many `channels`. Amplitudes are not negative; a histogram bin of floats is their top 16 bits.
    """

    def __init__(self, dtype: np.dtype, channels: int = 1) -> None:
        self.dtype, self.channels = dtype, channels
        self.wide = dtype.kind not in "u"  # the amplitude is float32
        self.bins = np.zeros(1 << (8 if dtype == np.uint8 else 16), np.int64)
        self.total = self.square = 0.0
        self.low, self.high = np.inf, 0.0
        self.heights: Counter[int] = Counter()
        self.widths: Counter[int] = Counter()
        self.labels: Counter[str | None] = Counter()

    def add(self, pixels: np.ndarray, label: str | None) -> None:
        """Count one sample of this dtype, as Record describes it."""
        amplitude = amplitude_of(pixels)
        flat = amplitude.ravel() + amplitude.dtype.type(0)  # -0.0, whose sign bit would be the highest bin, becomes 0.0
        # The bit pattern of a non-negative float32 grows with its value, so its upper half is a logarithmic bin.
        codes = flat.view(np.uint32) >> 16 if self.wide else flat
        self.bins += np.bincount(codes, minlength=len(self.bins))
        doubles = flat.astype(np.float64)
        self.total += float(doubles.sum())
        self.square += float(np.square(doubles).sum())
        self.low, self.high = min(self.low, float(flat.min())), max(self.high, float(flat.max()))
        height, width = image_shape(pixels)
        self.heights[height] += 1
        self.widths[width] += 1
        self.labels[label] += 1

    def merge(self, other: Statistics) -> None:
        """Add the counts of other samples of the same dtype."""
        self.bins += other.bins
        self.total += other.total
        self.square += other.square
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        for name in ("heights", "widths", "labels"):
            getattr(self, name).update(getattr(other, name))

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON; `from_json` gives it back exactly."""
        codes = np.flatnonzero(self.bins)
        counters = {name: list(getattr(self, name).items()) for name in ("heights", "widths", "labels")}
        sums = [self.total, self.square, self.low, self.high]
        return {
            "dtype": self.dtype.name,
            "channels": self.channels,
            "bins": [codes.tolist(), self.bins[codes].tolist()],
            "sums": sums,
            **counters,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Statistics:
        """What `to_json` wrote."""
        new = cls(np.dtype(value["dtype"]), value["channels"])
        codes, counts = value["bins"]
        new.bins[codes] = counts
        new.total, new.square, new.low, new.high = value["sums"]
        for name in ("heights", "widths", "labels"):
            getattr(new, name).update(dict(value[name]))
        return new

    def percentile(self, percent: float) -> float:
        """The smallest amplitude with at least this share at or below it."""
        below = np.cumsum(self.bins)
        code = int(np.searchsorted(below, np.ceil(percent / 100 * below[-1])))
        if not self.wide:
            return float(code)
        return min(float(np.array(code << 16 | 0xFFFF, np.uint32).view(np.float32)), self.high)

    @classmethod
    def merged(cls, parts: Sequence[Statistics]) -> Statistics:
        """The counts of one or more parts of the same dtype together."""
        whole = cls(parts[0].dtype, parts[0].channels)
        for part in parts:
            whole.merge(part)
        return whole

    def amplitude(self, of: Sequence[str] = ()) -> Amplitude:
        """8 bits were already scaled by whoever made them; for wider pixels 1 is the 99.9th percentile.

        `of`: the sources counted here, where the rule holds for others too; it then names them.
        """
        if self.dtype == np.uint8:
            return Amplitude("full", 255.0)
        rule = "percentile" + (f" of {', '.join(of)}" if of else "")
        return Amplitude(rule, self.percentile(99.9) or self.high)

    def summary(self) -> dict[str, Any]:
        """Plain numbers for the catalog; all 0 where nothing was counted."""
        count = max(int(self.bins.sum()), 1)
        mean = self.total / count
        return {
            "channels": self.channels,
            "mean": mean,
            "std": max(self.square / count - mean**2, 0.0) ** 0.5,
            "min": min(self.low, self.high),
            "max": self.high,
            **{name: self.percentile(percent) for name, percent in _PERCENTILES.items()},
            "height": _spread(self.heights),
            "width": _spread(self.widths),
            "class_counts": dict(sorted((k, n) for k, n in self.labels.items() if k is not None)),
            "unlabelled": self.labels[None],
        }


def _spread(sides: Counter[int]) -> list[int]:
    """Smallest, median (the lower of two) and largest."""
    known = sorted(sides) or [0]
    below = np.cumsum([sides[side] for side in known])
    return [known[0], known[int(np.searchsorted(below, (below[-1] + 1) // 2))], known[-1]]
