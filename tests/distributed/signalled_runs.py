"""Runs of several processes that are asked to stop by a signal to one of them, at a random moment.

Run number N notes in its folder, per rank, the position at which it stopped and why.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from threading import Timer

import torch.distributed as dist

from foundation import signals
from foundation.config import load
from foundation.training import run as running
from foundation.training.stopping import Stopped


def main(yaml: Path, count: int) -> None:
    signals.listen()
    dist.init_process_group("cpu:gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for number in range(count):
        drawn = random.Random(number)  # the same on all ranks
        victim, delay = drawn.randrange(world), drawn.uniform(0, 1.5)
        config = load(yaml, [f"name=run-{number}", "train.samples=80000", "train.checkpoint_every=64"])
        signals.forget()
        dist.barrier()
        if rank == victim:
            Timer(delay, os.kill, (os.getpid(), drawn.choice(signals.SIGNALS))).start()
        try:
            running.train(config)
        except Stopped as stopped:
            (config.run_folder / f"stopped-{rank}").write_text(f"{stopped.position} {stopped.reason}")
    dist.destroy_process_group()
