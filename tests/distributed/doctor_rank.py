"""`foundation doctor` with rank 1 on a node of its own, which has other software and a clock that goes wrong."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace

from foundation.cli import main
from launch.doctor import network, software

AHEAD = 5.0
_look = software.look


def _other() -> software.Software:
    found = _look()
    return found.model_copy(
        update={
            "versions": {**found.versions, "torch": "2.11.0"},
            "commit": "0123456789ab with changes",
            "code": "0" * 12,
            "folders": {**found.folders, "kernels": "/opt/site-packages/kernels"},
            "rivals": {"kernels": "0.9.0"},
        }
    )


if __name__ == "__main__":
    rank = os.environ["RANK"]
    os.environ["SLURMD_NODENAME"] = f"n{rank}"
    if rank == "1":
        software.look = _other
        wrong = SimpleNamespace(time=lambda: time.time() + AHEAD, perf_counter=time.perf_counter)
        network.time = wrong  # type: ignore[assignment]
    main()
