"""The batches of updates that were spoilt, on disk: what was shown, with which masks, and what came out."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foundation.files import write_whole
from foundation.training.step import Learner
from shards.errors import ExplainedError
from shards.reader import Reader
from shards.stream import Batch

log = logging.getLogger(__name__)
FOLDER = "skipped"  # in the run folder


def folder_of(run: Path, position: int) -> Path:
    """Where the batch of the update at `position` is kept."""
    return run / FOLDER / f"samples-{position:012d}"


class Evidence:
    """Writes this rank's part of a batch: `rankN.npz` with images, masks and numbers, and beside it what they are.

    At most `guard.kept` batches in a run folder. A disk that is full costs one line and never the run.
    """

    def __init__(self, learner: Learner, reader: Reader, rank: int) -> None:
        self.learner, self.reader, self.rank = learner, reader, rank

    def keep(self, batches: Sequence[Batch], position: int, numbers: Mapping[str, float]) -> None:
        """The batch of the update at `position` and its `numbers` (loss, grad_norm, ...)."""
        config = self.learner.config
        folder = folder_of(config.run_folder, position)
        kept = list(folder.parent.glob("samples-*"))
        if folder not in kept and len(kept) >= config.guard.kept:
            return
        try:  # a rank that raised here would leave the others waiting
            self._write(folder, batches, position, numbers)
        except (OSError, ExplainedError) as error:
            log.warning("the batch of the update at sample %d could not be kept: %s", position, error)

    def _write(self, folder: Path, batches: Sequence[Batch], position: int, numbers: Mapping[str, float]) -> None:
        parts = [shown(self.learner, batch, position) for batch in batches]
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        facts = {
            "position": position,
            "numbers": {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()},
            "samples": [
                {"position": p, **identity(self.reader, i)}
                for p, i in zip(arrays["position"].tolist(), arrays["sample_id"].tolist(), strict=True)
            ],
        }
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(folder / f"rank{self.rank}.npz", allow_pickle=False, **arrays)
        write_whole(folder / f"rank{self.rank}.json", json.dumps(facts, indent=1) + "\n")


def identity(reader: Reader, sample_id: int) -> dict[str, Any]:
    """Which sample that is, in words."""
    sample = reader.valid(sample_id)
    return {"sample_id": sample_id, "source": sample.source, "key": sample.key}


@torch.no_grad()
def shown(learner: Learner, batch: Batch, position: int) -> dict[str, np.ndarray]:
    """What a micro-batch of the update at `position` shows the model: ids, images fp32 [B, C, S, S], and as
    `argument1`, ... the masks that the model gets beside them, one row per image."""
    batch = batch.to(learner.engine.device)
    images = learner.augment(batch, learner.config.seed)
    inputs = learner.objective.prepare(images, batch.position, position)
    found = {"position": batch.position, "sample_id": batch.sample_id, "images": images}
    found |= {f"argument{i}": value for i, value in enumerate(inputs.model_args) if i}
    return {name: value.cpu().numpy() for name, value in found.items()}
