"""Is one encoder better than another? Paired tests on the same test images, from the answers that runs keep.

Two intervals that overlap do not answer this: both encoders fail on the same hard images. One seed: McNemar's exact
test (McNemar 1947; Dietterich 1998). Several: a bootstrap over test images and seeds together, of the difference.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from foundation.evaluation.metrics import resamples
from foundation.evaluation.predictions import Predictions, read
from foundation.evaluation.scores import p_value
from shards.errors import DataError

HEADER = ("protocol", "first", "second", "difference", "95 % interval", "p", "test", "seeds", "test images")
KINDS = {"training images": r"train (\w+)", "crop": r"crop (\w+)", "image size": r"(\d+ px)", "epochs": r"(\d+) epochs"}
MCNEMAR, BOOTSTRAP = "McNemar, exact", "bootstrap of images and seeds"


@dataclass(frozen=True)
class Paired:
    """Accuracy of `second` minus that of `first`, its 95 % interval and the two-sided p of no difference."""

    protocol: str
    first: str
    second: str
    accuracy: tuple[float, float]
    difference: float
    low: float
    high: float
    p: float
    test: str
    seeds: int
    n_test: int
    differing: str = ""
    """how the two were measured otherwise, beyond their weights; empty: alike, or not recorded"""

    def cells(self) -> tuple[str, ...]:
        """The row of the table, as `HEADER` names it."""
        names = (f"{name}: {100 * share:.1f} %" for name, share in zip((self.first, self.second), self.accuracy))  # noqa: B905
        interval = f"{100 * self.low:+.1f} – {100 * self.high:+.1f}"
        numbers = (f"{100 * self.difference:+.1f}", interval, p_value(self.p), self.test)
        return self.protocol, *names, *numbers, str(self.seeds), str(self.n_test)


def mcnemar(first: Tensor, second: Tensor) -> float:
    """Two-sided exact p that both are right equally often; bool [N] each: right or wrong, image by image."""
    from scipy.stats import binomtest  # comes with scikit-learn

    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second, 0.5).pvalue)


def bootstrap(difference: Tensor, seed: int = 0, count: int = 2000) -> tuple[float, float, float]:
    """Ends of the 95 % interval of the mean of `difference` fp64 [S, N] and the two-sided p that it is 0.

    Images (columns) and, where there are several, seeds (rows) are drawn anew together. p is not below 2 / (count + 1).
    """
    seeds, images = difference.shape
    rows = resamples(seed, "evaluation/paired/seeds", count, seeds)
    columns = resamples(seed, "evaluation/paired/images", count, images)
    found = torch.cat([((r @ difference) * c).sum(1) for r, c in zip(rows, columns, strict=True)]) / (seeds * images)
    low, high = found.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    tail = min(int((found <= 0).sum()), int((found >= 0).sum()))
    return low, high, min(1.0, 2 * (tail + 1) / (count + 1))


def compare(first: Predictions, second: Predictions, names: tuple[str, str] | None = None) -> Paired:
    """The paired test of two sets of answers to the same protocol.

    Raises DataError unless test images, their classes and the seeds are the same on both sides.
    """
    mine, theirs = order(first), order(second)
    check_same(first, second, mine, theirs)
    a = first.predicted[:, mine] == first.y[mine]
    b = second.predicted[:, theirs] == second.y[theirs]
    difference = b.double() - a.double()
    low, high, p = bootstrap(difference)
    single = len(first.seeds) == 1
    return Paired(
        first.protocol,
        *(names or (first.encoder, second.encoder)),
        (a.double().mean().item(), b.double().mean().item()),
        difference.mean().item(),
        low,
        high,
        mcnemar(a[0], b[0]) if single else p,
        MCNEMAR if single else BOOTSTRAP,
        len(first.seeds),
        difference.shape[1],
        differing(first, second),
    )


def settings(measurement: str) -> dict[str, str]:
    """Training images, crop, image size and epochs that the name of a measurement tells, by what they are."""
    found = {}
    for part in measurement.split(", "):
        for kind, pattern in KINDS.items():
            if match := re.fullmatch(pattern, part):
                found[kind] = match[1]
    return found


def differing(first: Predictions, second: Predictions) -> str:
    """How two measurements differ in what both tell of their settings: a line for the reader, empty if in nothing.

    Training images are told apart by the catalog or the split file that names them, so those of a split file differ
    from the same ones of a catalog.
    """
    a, b = settings(first.measurement), settings(second.measurement)
    return ", ".join(f"{kind} {a[kind]} and {b[kind]}" for kind in a if kind in b and a[kind] != b[kind])


def order(found: Predictions) -> Tensor:
    """Indices that sort the test images by their hash: int64 [N]."""
    return torch.tensor(sorted(range(len(found.hashes)), key=found.hashes.__getitem__), dtype=torch.int64)


def check_same(first: Predictions, second: Predictions, mine: Tensor, theirs: Tensor) -> None:
    """Raise DataError unless both answered about the same images, of the same classes, for the same seeds."""
    a, b = ([found.hashes[i] for i in at.tolist()] for found, at in ((first, mine), (second, theirs)))
    where = f"{first.protocol}: {first.encoder} ({first.measurement}), {second.encoder} ({second.measurement})"
    if a != b:
        lost, new = sorted({*a} - {*b}), sorted({*b} - {*a})
        shown = ", ".join(h[:12] for h in (lost + new)[:3])
        raise DataError(
            f"the test images differ: {len(a):,} and {len(b):,}, {len(lost):,} only in the first, {len(new):,} only in "
            f"the second" + f" ({shown}, ...)" * bool(shown),
            where=where,
            do="evaluate both on the same test images: foundation evaluate RUN --split FILE",
        )
    labels = ([found.classes[i] for i in found.y[at].tolist()] for found, at in ((first, mine), (second, theirs)))
    if wrong := [h for h, x, y in zip(a, *labels, strict=True) if x != y]:
        what = f"the classes of {len(wrong):,} test images differ: {', '.join(h[:12] for h in wrong[:3])}"
        raise DataError(what, where=where, do="evaluate both with the same labels")
    if first.seeds != second.seeds:
        what = f"the seeds differ: {first.seeds} and {second.seeds}"
        raise DataError(what, where=where, do="evaluate both with the same --seeds")


def compare_runs(first: Path, second: Path, protocols: Sequence[str] = ()) -> list[Paired]:
    """The paired tests of the answers of two runs, for all protocols that both have or for those named.

    Two checkpoints that were scored into one run are compared by naming it twice. Raises DataError when nothing is
    comparable, or when the test images of a protocol differ.
    """
    mine, theirs = ([p for p in read(run) if p.encoder == "pretrained"] for run in (first, second))
    both = sorted({p.protocol for p in mine} & {p.protocol for p in theirs})
    if missing := [name for name in protocols or both[:1] or ("any protocol",) if name not in both]:
        has = (", ".join(sorted({p.protocol for p in found})) or "none" for found in (mine, theirs))
        raise DataError(
            f"the runs do not both have answers of «pretrained» to {', '.join(missing)}",
            where="; ".join(f"{run} has {found}" for run, found in zip((first, second), has, strict=True)),
            do="foundation evaluate RUN --data CATALOG keeps them; name the protocols as in its table",
        )
    return [pair for name in protocols or both for pair in _pairs(first, second, mine, theirs, name)]


def _pairs(
    first: Path, second: Path, mine: list[Predictions], theirs: list[Predictions], protocol: str
) -> list[Paired]:
    """All pairs of measurements of one protocol on the same images; their difference when there are none."""
    same_run = first.resolve() == second.resolve()
    found: list[tuple[Predictions, Predictions]] = []
    for i, a in enumerate(p for p in mine if p.protocol == protocol):
        for j, b in enumerate(p for p in theirs if p.protocol == protocol):
            if not same_run or i < j:
                found.append((a, b))
    if not found:
        what = f"the run was measured once under {protocol}: there is nothing to compare it with"
        raise DataError(what, where=str(first), do="score another checkpoint of it, or name another run")
    alike = [(a, b) for a, b in found if sorted(a.hashes) == sorted(b.hashes)]
    several = len(alike) > 1 or same_run
    labels = (first.name, second.name)
    return [
        compare(a, b, tuple(f"{n} ({p.measurement})" if several else n for n, p in zip(labels, (a, b), strict=True)))  # type: ignore[arg-type]
        for a, b in alike or found[:1]
    ]
