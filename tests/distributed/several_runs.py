"""A program for torchrun: trains several configurations in one process group, one after another.

python -m torch.distributed.run ... several_runs.py YAML OVERRIDE ... -- OVERRIDE ...
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from foundation.config import load
from foundation.training import run as running
from foundation.training.engine import unwrap

SPOILT = (32, 104, 112)  # positions in samples
STUCK = 24


class Spoilt:
    """An objective whose loss is NaN in the updates at SPOILT."""

    def __init__(self, inner: Any, position: int) -> None:
        self._inner, self._position = inner, position

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def loss(self, prediction: Any, inputs: Any) -> Any:
        loss, parts = self._inner.loss(prediction, inputs)
        return loss * (float("nan") if self._position in SPOILT else 1.0), parts


def main(yaml: str, *arguments: str) -> None:
    loop = running.loop

    def noting_loop(learner: Any, *rest: Any) -> None:
        """Also notes the weights of every replica."""
        loop(learner, *rest)
        if learner.engine.name == "ddp":
            digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in unwrap(learner.model).state_dict().values()))
            (learner.config.run_folder / f"rank-{learner.engine.rank}.sha256").write_text(digest.hexdigest())

    step = running.train_step

    def spoilt_step(learner: Any, batches: Any, position: int, limit: float) -> Any:
        """In runs of such names the last process alone has losses that are not finite, is slow, or stands still."""
        if learner.engine.rank == learner.engine.world_size - 1:
            time.sleep(0.1 if "slow" in learner.config.name else 0)
            if "stuck" in learner.config.name and position == STUCK:
                time.sleep(12)
            if "spoilt" in learner.config.name:
                learner = learner._replace(objective=Spoilt(learner.objective, position))
        return step(learner, batches, position, limit)

    running.train_step = spoilt_step
    running.loop, running.publish = noting_loop, lambda *_: None  # pictures take longer than these runs
    gc.freeze()  # DeepSpeed collects garbage at every start
    dist.init_process_group("cpu:gloo")  # once: libraries do not survive a second one
    for separator, overrides in itertools.groupby(arguments, lambda argument: argument == "--"):
        if not separator:
            config = load(Path(yaml), list(overrides))
            print(f"run {config.name}", flush=True)
            running.train(config)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
