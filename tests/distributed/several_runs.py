"""A program for torchrun: trains several configurations in one process group, one after another.

python -m torch.distributed.run ... several_runs.py YAML OVERRIDE ... -- OVERRIDE ...
"""

from __future__ import annotations

import hashlib
import itertools
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from foundation.config import load
from foundation.training import run as running
from foundation.training.engine import unwrap


def main(yaml: str, *arguments: str) -> None:
    loop = running.loop

    def noting_loop(learner: Any, *rest: Any) -> None:
        """Also notes the weights of every replica."""
        loop(learner, *rest)
        if learner.engine.name == "ddp":
            digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in unwrap(learner.model).state_dict().values()))
            (learner.config.run_folder / f"rank-{learner.engine.rank}.sha256").write_text(digest.hexdigest())

    running.loop, running.publish = noting_loop, lambda *_: None  # pictures take longer than these runs
    dist.init_process_group("cpu:gloo")  # once: libraries do not survive a second one
    for separator, overrides in itertools.groupby(arguments, lambda argument: argument == "--"):
        if not separator:
            config = load(Path(yaml), list(overrides))
            print(f"run {config.name}", flush=True)
            running.train(config)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
