"""A trainer that keeps to the protocol between job and trainer, and learns nothing.

    stand_in.py CONFIG       run by every process; environment STAND_IN: `stuck` never saves, `fail` ends with 3

It stops on a signal (rank 0) or on the stop file (the others), saves, and ends with 85. One sample takes 50 ms; with a
file `hold` in the run folder there is always one more.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import yaml


def main() -> int:
    config = yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8"))
    run, mode = Path(config["run_root"]) / config["name"], os.environ.get("STAND_IN", "")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    asked: list[int] = []
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, lambda got, _: asked.append(got))
    if rank == 0:
        (run / "stop").unlink(missing_ok=True)
    attempt = run / f"attempt-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    attempt.mkdir(exist_ok=True)
    committed = (run / "checkpoints").glob("samples-*/COMMIT")
    position = start = max((int(file.parent.name.partition("-")[2]) for file in committed), default=0)
    node, code = os.environ["SLURMD_NODENAME"], Path(__file__).parent
    print(f"rank {rank} of {world} on {node}: from {start} in {code}", flush=True)
    (attempt / f"started-{rank}").touch()
    while position < config["train"]["samples"] or (run / "hold").exists():
        time.sleep(0.05)
        position += 1
        if mode == "fail" or (rank == 0 and (run / "die").exists()):
            return 3
        if mode == "stuck":
            return 85
        if asked if rank == 0 else (run / "stop").exists():
            break
    (attempt / f"saved-{rank}").touch()
    commit = attempt / "done"
    while not commit.exists():  # nobody leaves before all have saved
        if rank == 0 and len(list(attempt.glob("saved-*"))) == world:
            marker = run / "checkpoints" / f"samples-{position:012d}" / "COMMIT"
            marker.parent.mkdir(parents=True)
            marker.touch()
            commit.touch()
        time.sleep(0.02)
    print(f"rank {rank} saved at {position}", flush=True)
    return 0 if position >= config["train"]["samples"] else 85


if __name__ == "__main__":
    sys.exit(main())
