"""Running statistics of a source's pixels: exact for integers, percentiles within 1 % for float32."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from shards.catalog import Amplitude

_PERCENTILES = {"p1": 1.0, "p50": 50.0, "p99": 99.0, "p99_9": 99.9}


class Statistics:
    """Counts over the samples added so far. Values are not negative; a histogram bin of float32 is the top 16 bits."""

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype = dtype
        self.bins = np.zeros(1 << 16, np.int64)
        self.total = self.square = 0.0
        self.low, self.high = np.inf, 0.0
        self.heights: list[int] = []
        self.widths: list[int] = []
        self.labels: Counter[str | None] = Counter()

    def add(self, pixels: np.ndarray, label: str | None) -> None:
        """Count one sample [..., H, W] of this dtype."""
        flat = pixels.ravel() + pixels.dtype.type(0)  # -0.0, whose sign bit would be the highest bin, becomes 0.0
        # The bit pattern of a non-negative float32 grows with its value, so its upper half is a logarithmic bin.
        codes = flat.view(np.uint32) >> 16 if self.dtype == np.float32 else flat
        self.bins += np.bincount(codes, minlength=1 << 16)
        wide = flat.astype(np.float64)
        self.total += float(wide.sum())
        self.square += float(np.square(wide).sum())
        self.low, self.high = min(self.low, float(flat.min())), max(self.high, float(flat.max()))
        self.heights.append(pixels.shape[-2])
        self.widths.append(pixels.shape[-1])
        self.labels[label] += 1

    def percentile(self, percent: float) -> float:
        """The smallest pixel value with at least this share at or below it."""
        below = np.cumsum(self.bins)
        code = int(np.searchsorted(below, np.ceil(percent / 100 * below[-1])))
        if self.dtype != np.float32:
            return float(code)
        return min(float(np.array(code << 16 | 0xFFFF, np.uint32).view(np.float32)), self.high)

    def amplitude(self) -> Amplitude:
        """8 bits were already scaled by whoever made them; for wider pixels 1 is the 99.9th percentile."""
        if self.dtype == np.uint8:
            return Amplitude("full", 255.0)
        return Amplitude("percentile", self.percentile(99.9) or self.high)

    def summary(self) -> dict[str, Any]:
        """Plain numbers for the catalog."""
        count = int(self.bins.sum())
        mean = self.total / count
        return {
            "mean": mean,
            "std": max(self.square / count - mean**2, 0.0) ** 0.5,
            "min": self.low,
            "max": self.high,
            **{name: self.percentile(percent) for name, percent in _PERCENTILES.items()},
            "height": [min(self.heights), int(np.median(self.heights)), max(self.heights)],
            "width": [min(self.widths), int(np.median(self.widths)), max(self.widths)],
            "class_counts": dict(sorted((k, n) for k, n in self.labels.items() if k is not None)),
            "unlabelled": self.labels[None],
        }
