"""A program for torchrun: trains several configurations, one after another, and notes the weights of every rank.

python -m torch.distributed.run ... several_runs.py YAML PORT OVERRIDE ... -- PORT OVERRIDE ...
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
from pathlib import Path
from typing import Any

from foundation.config import load
from foundation.training import run as running
from foundation.training.engine import unwrap


def main(yaml: str, *arguments: str) -> None:
    loop = running.loop

    def noting_loop(learner: Any, *rest: Any) -> None:
        loop(learner, *rest)
        digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in unwrap(learner.model).state_dict().values()))
        (learner.config.run_folder / f"rank-{learner.engine.rank}.sha256").write_text(digest.hexdigest())

    running.loop = noting_loop
    groups = itertools.groupby(arguments, lambda argument: argument == "--")
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # it still holds the addresses of the run before
    for port, *overrides in (list(group) for separator, group in groups if not separator):
        os.environ["MASTER_PORT"] = port
        running.train(load(Path(yaml), overrides))


if __name__ == "__main__":
    main(*sys.argv[1:])
