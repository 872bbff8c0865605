"""Runs of several processes that are asked to stop by a signal to one of them, at a random moment.

Run number N notes in its folder, per rank, the position at which it stopped and why.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from threading import Thread

import torch.distributed as dist
from processes import position

from foundation import signals
from foundation.config import load
from foundation.training import run as running
from foundation.training.stopping import Stopped


def send(signal: int, run: Path, goal: int, delay: float) -> None:
    """To this process, `delay` seconds after `goal` samples of the run."""
    while position(run) < goal:
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(os.getpid(), signal)


def main(yaml: Path, count: int) -> None:
    signals.listen()
    dist.init_process_group("cpu:gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for number in range(count):
        drawn = random.Random(number)  # the same on all ranks
        victim, goal = drawn.randrange(world), 8 * drawn.randrange(-4, 16)  # below 0: while it starts
        delay, signal = drawn.uniform(0, 0.05 if goal >= 0 else 0.5), drawn.choice(signals.SIGNALS)
        config = load(yaml, [f"name=run-{number}", "train.samples=80000", "train.checkpoint_every=64"])
        signals.forget()
        dist.barrier()
        if rank == victim:
            Thread(target=send, args=(signal, config.run_folder, goal, delay)).start()
        try:
            running.train(config)
        except Stopped as stopped:
            (config.run_folder / f"stopped-{rank}").write_text(f"{stopped.position} {stopped.reason}")
    dist.destroy_process_group()
