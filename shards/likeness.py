"""Near duplicates: a short descriptor of every chip, and the pairs of chips whose descriptors say "the same picture".

A copy with another gain, gamma, clipping, decibel rendering, bit depth, JPEG quality, a small resize, flipped,
transposed or turned by 90 degrees nearly keeps its descriptor; another look at the same vehicle does not, because its
speckle and scatterers differ. Not found are crops, shifts, and copies that destroyed most of what a small chip held (5
bits or a JPEG made of a 16-bit chip whose one scatterer outshines the rest).

The pixels are replaced by their ranks, which no monotone change of contrast can move, and projected on the lowest
16 x 16 cosines of the DCT-II. Each ring of frequencies is scaled to the same energy, so that fine structure counts as
much as the blob in the middle, and cut to 4 bits: 128 bytes a chip. A flip changes the sign of the coefficients of odd
frequency, a transposition swaps axes: all 8 symmetries are compared for the price of two. Candidates come from hashing
signs in many tables (locality-sensitive hashing, Indyk and Motwani, STOC 1998), then every one is compared exactly.

Distance is 1 - correlation of descriptors, smallest over the symmetries. `docs/results/audit.md` has the measured
distributions that THRESHOLD is taken from.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

BYTES = 128
THRESHOLD = 0.09  # copies lie below it, the most alike different chips at 0.137 (3,961 vehicle chips)
TABLES = 48
_SIDE = 16  # frequencies along each axis
_SMALLEST = 8  # shorter chips have too few coefficients to tell pictures apart: they get no likeness
_STEP = 0.25  # standard deviations of its ring that one of the 16 levels of a coefficient spans
_HASHED = np.uint64(2**18 - 1)  # of a key these bits are looked up first
_PART = 16_384  # chips to learn from that are compared with a test set at a time
_WINDOW = 16  # of a hash bucket, each chip is compared with so many neighbours
_U, _V = np.mgrid[:_SIDE, :_SIDE]
_RING = np.minimum(np.digitize(np.hypot(_U, _V), (0.5, 4.0, 8.0, 12.0, 16.0)), 5)  # ring 0: the mean, not used


def descriptor(amplitude: np.ndarray) -> bytes:
    """128 bytes that are nearly equal for copies of a chip: amplitude [H, W] or [C, H, W] (its first channel), >= 0.

    uint8, uint16 or float32. Chips of fewer than 8 pixels a side and constant ones give zeros: alike to nothing.
    """
    image = amplitude[0] if amplitude.ndim == 3 else amplitude
    if min(image.shape) < _SMALLEST:
        return bytes(BYTES)
    coefficients = _cosines(image.shape[0]) @ _ranks(image) @ _cosines(image.shape[1]).T
    energy = np.bincount(_RING.ravel(), (coefficients**2).ravel()) / np.bincount(_RING.ravel())
    if energy[1:].max() < 1e-12:
        return bytes(BYTES)
    energy[0] = np.inf
    scaled = coefficients / np.sqrt(np.maximum(energy, 1e-12))[_RING]
    # The small addition: a coefficient that is 0 but for rounding has the same code on every machine.
    codes = np.clip(np.floor(scaled / _STEP + 1e-9), -8, 7).astype(np.int8).ravel()
    return ((codes[::2] & 15) << 4 | (codes[1::2] & 15)).astype(np.uint8).tobytes()


def pairs(
    descriptors: Sequence[bytes] | np.ndarray, threshold: float = THRESHOLD, tables: int = TABLES
) -> list[tuple[int, int, float]]:
    """(i, j, distance) with i < j and distance <= threshold, the closest first, among N descriptors (uint8 [N, 128]).

    Time and memory grow as N log N. A chip with more than 16 copies is linked to some of them, not to each.
    """
    packed = descriptors if isinstance(descriptors, np.ndarray) else np.frombuffer(b"".join(descriptors), np.uint8)
    packed = packed.reshape(-1, BYTES)
    present = np.flatnonzero(packed.any(1))
    codes = _unpack(packed[present])
    first, second = _candidates(codes, tables)
    found = np.empty(len(first), np.float32)
    for start in range(0, len(first), 4096):
        part = slice(start, start + 4096)
        found[part] = _distances(codes[first[part]], codes[second[part]])
    kept = np.flatnonzero(found <= threshold)
    kept = kept[np.argsort(found[kept], kind="stable")]
    rows = zip(present[first[kept]], present[second[kept]], found[kept], strict=True)
    return [(int(i), int(j), max(0.0, round(float(d), 4))) for i, j, d in rows]


class Index:
    """Descriptors of a test set (uint8 [T, 128]), ready to be compared with those of any number of chips to learn from.

    Unlike `pairs` it never compares chips to learn from with each other: time grows with their number, memory only with
    T and the chips compared at a time.
    """

    def __init__(self, tested: np.ndarray, threshold: float = THRESHOLD) -> None:
        packed = np.ascontiguousarray(tested).reshape(-1, BYTES)
        self.threshold = threshold
        self._present = np.flatnonzero(packed.any(1))
        self._codes = _unpack(packed[self._present])
        self._places = _places(TABLES)
        self._bits = max(16, int(2 * len(self._codes)).bit_length() + 8)
        negative = _signs(self._codes)
        self._tables = []
        for places in self._places if len(self._codes) else ():
            keys = np.concatenate([_hash(signs, *places, self._bits) for signs in (negative, _transposed(negative))])
            order = np.argsort(keys, kind="stable")
            occupied = np.zeros(int(_HASHED) + 1, bool)
            occupied[keys & _HASHED] = True
            self._tables.append((keys[order], order % len(self._codes), occupied))

    def near(self, learnt: np.ndarray) -> list[tuple[int, int, float]]:
        """(i, j, distance <= threshold) of chips to learn from (uint8 [N, 128]) and tested ones, by i, then distance.

        Of more than 16 tested chips that are alike, some are found.
        """
        packed = np.ascontiguousarray(learnt).reshape(-1, BYTES)
        found: list[tuple[int, int, float]] = []
        for start in range(0, len(packed), _PART):
            part = packed[start : start + _PART]
            present = np.flatnonzero(part.any(1))
            codes = _unpack(part[present])
            first, second = self._candidates(_signs(codes))
            distance = _distances(codes[first], self._codes[second])
            kept = np.flatnonzero(distance <= self.threshold)
            kept = kept[np.lexsort((distance[kept], first[kept]))]
            rows = zip(present[first[kept]], self._present[second[kept]], distance[kept], strict=True)
            found += [(int(i) + start, int(j), max(0.0, round(float(d), 4))) for i, j, d in rows]
        return found

    def _candidates(self, negative: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows (learnt, tested) that share a hash bucket of any table."""
        n, pairs = len(self._codes), [np.empty(0, np.int64)]
        for places, (keys, rows, occupied) in zip(self._places, self._tables, strict=False):  # none: nothing is tested
            wanted = _hash(negative, *places, self._bits)
            hit = np.flatnonzero(occupied[wanted & _HASHED])  # most chips end here
            at = np.searchsorted(keys, wanted[hit])
            for step in range(_WINDOW):
                inside = at + step < len(keys)
                hit, at = hit[inside], at[inside]
                same = keys[at + step] == wanted[hit]
                hit, at = hit[same], at[same]
                pairs.append(hit * n + rows[at + step])
        return np.divmod(np.unique(np.concatenate(pairs)), max(n, 1))


@lru_cache(64)
def _cosines(length: int) -> np.ndarray:
    """The lowest DCT-II basis vectors of this length, float64 [16, length]."""
    basis = np.cos(np.pi / length * np.outer(np.arange(_SIDE), np.arange(length) + 0.5))
    basis[length : length + 1] = 0  # beyond this one, which is only rounding, higher frequencies repeat lower ones
    return basis / np.sqrt(length)


def _ranks(image: np.ndarray) -> np.ndarray:
    """Ranks in -0.5 .. 0.5, float64, the same for equal values. A float32 is cut to 8 bits of mantissa first."""
    if image.dtype.kind == "f":
        # The bits of positive floats sort as they do; adding 0 makes 0.0 of -0.0, whose sign bit would sort last.
        image = (np.ascontiguousarray(image, np.float32) + np.float32(0)).view(np.uint32) >> 15
    counts = np.bincount(image.ravel())
    middle: np.ndarray = (np.cumsum(counts) - counts / 2) / image.size - 0.5
    return middle[image]


def _unpack(packed: np.ndarray) -> np.ndarray:
    """Coefficients int8 [N, 16, 16] of descriptors uint8 [N, 128]: odd, so that each has a sign; the mean is 0."""
    nibbles = packed.view(np.int8)
    codes = np.empty((len(packed), 2 * BYTES), np.int8)
    codes[:, ::2], codes[:, 1::2] = nibbles >> 4, (nibbles << 4) >> 4
    codes = 2 * codes + 1
    codes[:, 0] = 0
    return codes.reshape(-1, _SIDE, _SIDE)


def _candidates(codes: np.ndarray, tables: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers (first < second) of all pairs that fall into the same hash bucket of a table."""
    n = len(codes)
    negative = _signs(codes)
    prefix = max(12, int(2 * n).bit_length() + 2)
    found = [np.empty(0, np.int64)]
    for places in _places(tables if n > 1 else 0):
        keys = np.concatenate([_hash(signs, *places, prefix + 8) for signs in (negative, _transposed(negative))])
        order = np.argsort(keys)
        buckets, rows = keys[order] >> np.uint64(8), order % n
        for step in range(1, min(_WINDOW, 2 * n - 1) + 1):
            same = np.flatnonzero(buckets[step:] == buckets[:-step])
            if not len(same):
                break
            low, high = np.minimum(rows[same], rows[same + step]), np.maximum(rows[same], rows[same + step])
            found.append(np.unique((low * n + high)[low < high]))
    first, second = np.divmod(np.unique(np.concatenate(found)), max(n, 1))
    return first, second


def _signs(codes: np.ndarray) -> np.ndarray:
    """Whether coefficients [N, 16, 16] are negative, those of one frequency side by side: bool [16, 16, N]."""
    return np.ascontiguousarray((codes < 0).transpose(1, 2, 0))


def _transposed(negative: np.ndarray) -> np.ndarray:
    return negative.transpose(1, 0, 2)


def _places(tables: int) -> list[tuple[int, int, list[int]]]:
    """For each table an odd and an even frequency, and all places but (0, 0) and those two in an order of its own."""
    rng, found = np.random.default_rng(0), []
    for _ in range(tables):
        u, v = 2 * int(rng.integers(_SIDE // 2)) + 1, 2 * int(rng.integers(_SIDE // 2))
        places = rng.permutation(_SIDE * _SIDE)
        found.append((u, v, [int(p) for p in places if p not in (0, u * _SIDE + v, v * _SIDE + u)]))
    return found


def _hash(signs: np.ndarray, u: int, v: int, places: Sequence[int], bits: int) -> np.ndarray:
    """Hash keys uint64 [N] of signs [16, 16, N] at the first `bits` places.

    A flip changes all signs of odd rows (or columns) at once: two of the signs are made positive, so no flip matters.
    """
    keys = np.zeros(signs.shape[2], np.uint64)
    rows, columns = signs[u, v], signs[v, u]
    for place in places[:bits]:
        i, j = divmod(place, _SIDE)
        bit = signs[i, j]
        bit = bit ^ rows if i % 2 else bit
        bit = bit ^ columns if j % 2 else bit
        keys <<= np.uint64(1)
        keys |= bit
    return keys


def _distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """1 - correlation of codes [N, 16, 16], the smallest over flips and transposition; float32 [N]."""
    a, b = left.astype(np.float32), right.astype(np.float32)
    flips = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], np.float32)
    half = _SIDE // 2
    best = np.full(len(a), -np.inf, np.float32)
    for other in (b, b.transpose(0, 2, 1)):
        by_parity = (a * other).reshape(-1, half, 2, half, 2).sum((1, 3)).reshape(-1, 4)
        best = np.maximum(best, (by_parity @ flips).max(1))
    norms = np.sqrt((a**2).sum((1, 2)) * (b**2).sum((1, 2)))
    distance: np.ndarray = 1 - best / norms
    return distance
