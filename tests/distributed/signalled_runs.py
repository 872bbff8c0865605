"""A program for torchrun: runs that are asked to stop by a signal to one process, at a random moment.

python -m torch.distributed.run ... signalled_runs.py YAML COUNT

Run number N notes in its folder, per rank, the position at which it stopped and why.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from threading import Timer

import torch.distributed as dist

from foundation import signals
from foundation.config import load
from foundation.training import run as running
from foundation.training.stopping import Stopped


def main(yaml: str, count: str) -> None:
    signals.listen()
    dist.init_process_group("cpu:gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for number in range(int(count)):
        drawn = random.Random(number)  # the same on all ranks
        victim, delay = drawn.randrange(world), drawn.uniform(0, 1.5)
        config = load(Path(yaml), [f"name=run-{number}", "train.samples=80000", "train.checkpoint_every=64"])
        signals.forget()
        dist.barrier()
        if rank == victim:
            Timer(delay, os.kill, (os.getpid(), drawn.choice(signals.SIGNALS))).start()
        try:
            running.train(config)
        except Stopped as stopped:
            (config.run_folder / f"stopped-{rank}").write_text(f"{stopped.position} {stopped.reason}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
