"""Looks at what is being learnt: do features collapse, and what do labelled images say of them?

At given positions every process shows its share of a few images, always the same, to the model as it is, whole or in
pieces; rank 0 computes the metrics. Nothing that is learnt depends on a look.
"""

from __future__ import annotations

import time

from torch import Tensor

from foundation.errors import NumericsError
from foundation.training import collapse
from foundation.training.chosen import Chosen, first
from foundation.training.data import cache, check_channels, last_position, micro_batch, ruled
from foundation.training.online import Probe
from foundation.training.pins import Score
from foundation.training.ranks import Ranks, everywhere
from foundation.training.step import Learner
from foundation.training.tracking import Tracker
from shards.catalog import Catalog, load

BATCH = 64  # images of a forward pass, or a micro-batch where that is less
ADVICE = "lower optim.lr or optim.weight_decay, lengthen optim.warmup_samples, set optim.grad_clip"


class Monitor:
    """The looks of a run; all `ranks` (a group of their own) call the same methods at the same positions.

    When the images of a look cannot be had, every rank raises: DataError where it happened, else OtherRankError.
    """

    def __init__(self, learner: Learner, catalog: Catalog, ranks: Ranks, tracker: Tracker) -> None:
        self.learner, self.ranks, self.tracker = learner, ranks, tracker
        config = learner.config
        m, data = config.monitor, config.data
        batch = min(BATCH, micro_batch(config, ranks.size))

        def opened(key: str, root: str) -> Catalog:
            found = ruled(load(root, cache=cache(data)), data, known=True)
            check_channels(found, config, f"monitor.{key}")
            return found

        def choose() -> tuple[Chosen | None, Probe | None]:
            shown = catalog if m.catalog is None else opened("catalog", m.catalog)
            ids = first(shown, config, m.images)
            images = Chosen(shown, ids, data.image_size, batch) if len(ids) > 1 else None  # one differs from none
            return images, Probe(opened("probe", m.probe), config, batch) if m.probe else None

        self.images, self.probe = everywhere(ranks, choose)

    def due(self, position: int) -> bool:
        """Whether there is something to look at after the update at `position`."""
        return any(self._due(position))

    def _due(self, position: int) -> tuple[bool, bool]:
        """Whether features are due, and the probe. Everything is at the end of the run."""
        config, stride = self.learner.config, self.learner.config.train.global_batch
        finished = position >= last_position(config)
        every = (each or config.train.checkpoint_every for each in (config.monitor.every, config.monitor.probe_every))
        features, probe = (finished or crossed(position, each, stride) for each in every)
        return features and self.images is not None, probe and self.probe is not None

    def look(self, position: int) -> dict[str, float]:
        """The metrics of what is due at `position`, and seconds it took: on rank 0, on others nothing.

        When features or target have collapsed and the configuration says stop, every rank raises: NumericsError on
        rank 0, which has the metrics, OtherRankError on others.
        """
        began, (features, probe) = time.perf_counter(), self._due(position)
        found = (self._statistics() if features else {}) | (self._probe() if probe else {})
        everywhere(self.ranks, lambda: self._judge(found, position))
        return found and found | {"monitor_s": time.perf_counter() - began}

    def score(self, metrics: dict[str, float]) -> Score | None:
        """What a checkpoint of this moment is worth, if the probe was among the metrics."""
        return Score(metrics["probe_knn"], self.probe.name) if self.probe and "probe_knn" in metrics else None

    def _statistics(self) -> dict[str, float]:
        engine, objective, model = self.learner.engine, self.learner.objective, self.learner.model
        assert self.images is not None
        rows, moments = [], []
        for part in self.images.parts(self.ranks, engine.device):
            rows.append(engine.features(model, part.images).cpu())
            # Masks are those of the run's first global batch, whose sizes hold for no other.
            positions = part.numbers % self.learner.config.train.global_batch
            inputs = objective.prepare(part.images, positions.to(engine.device))
            pair = objective.compared(engine.predict(model, inputs.model_args), inputs)
            new = int((part.numbers < len(self.images)).sum())  # repetitions come last
            moments.append(tuple(collapse.Moments.of(values[:new]) for values in pair))
        features = self.images.whole(self.ranks, rows)
        predicted, target = zip(*(pair for each in self.ranks.gather(moments) for pair in each), strict=True)
        if self.ranks.rank:
            return {}
        spread = {"target_variance": collapse.variance(target), "prediction_variance": collapse.variance(predicted)}
        return collapse.describe(features) | spread

    def _probe(self) -> dict[str, float]:
        engine = self.learner.engine
        assert self.probe is not None
        rows: list[Tensor] = []
        labels: list[Tensor] = []
        for part in self.probe.chosen.parts(self.ranks, engine.device):
            rows.append(engine.features(self.learner.model, part.images).cpu())
            labels.append(part.labels)
        x, y = (self.probe.chosen.whole(self.ranks, each) for each in (rows, labels))
        return self.probe.scores(x, y) if self.ranks.rank == 0 else {}

    def _judge(self, metrics: dict[str, float], position: int) -> None:
        """One line, or an error, about what has collapsed."""
        limits = self.learner.config.monitor
        if (what := collapse.collapsed(metrics, limits)) is None:
            return
        self.tracker.event("collapse", position, what=what)
        if limits.on_collapse == "stop":
            do = f"{ADVICE}; an earlier checkpoint of the run may still be sound"
            raise NumericsError(f"collapsed: {what}", where=f"sample {position}", do=do)
        self.tracker.note(
            f"collapsed at sample {position:,}: {what}; {ADVICE}, or stop at once by monitor.on_collapse=stop"
        )


def crossed(position: int, every: int, stride: int) -> bool:
    """Whether a multiple of `every` lies in (position - stride, position]."""
    return position // every > (position - stride) // every
