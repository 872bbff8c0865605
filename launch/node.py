"""The one task of a node: starts its processes and hands their exit code on.

    python -m launch.node torchrun ARGUMENTS...        python -m launch.node accelerate ARGUMENTS...

Both launchers answer every failure of a process with exit code 1, so they run inside this one, which sees the codes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from foundation.errors import LaunchError
from launch.chain import STOPPED

STOPPED_FILE = "FOUNDATION_STOPPED"
"""Environment: file that says that the run stopped on request; the batch script reads it when all nodes have ended."""
_RANK = {"torchrun": "--node-rank", "accelerate": "--machine_rank"}
_KILLED = (-signal.SIGTERM, -signal.SIGKILL)


def main(arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    """Run the launcher on this node; 0 also for a stop on request, so that srun does not kill the other nodes."""
    launcher, *rest = arguments
    if "SLURM_NODEID" not in environ:
        raise LaunchError("this task does not know its node", where="SLURM_NODEID", do="start it with srun")
    for number in (signal.SIGUSR2, signal.SIGTERM):
        # Slurm signals every process of a step, and the launcher would die of it. Its processes inherit this, so that a
        # request before they listen does not kill them either: the stop file outlives it.
        signal.signal(number, signal.SIG_IGN)
    words = [f"{_RANK[launcher]}={environ['SLURM_NODEID']}", *rest]
    print(f"node {environ['SLURM_NODEID']}: {launcher} {' '.join(words)}", flush=True)
    code = exit_code(_launch(launcher, words))
    if code == STOPPED:
        Path(environ[STOPPED_FILE]).touch()
        return 0
    return code


def exit_code(codes: Iterable[int]) -> int:
    """The exit code of a node from those of its processes that failed, first failure first; negative: a signal.

    >>> exit_code([85, -15]), exit_code([1, 85]), exit_code([-9]), exit_code([])
    (85, 1, 137, 0)
    """
    codes = list(codes)
    if STOPPED in codes and all(code in (STOPPED, *_KILLED) for code in codes):
        return STOPPED
    first = next((code for code in codes if code != STOPPED), 0)
    return 128 - first if first < 0 else first


def _launch(launcher: str, words: list[str]) -> list[int]:
    """Exit codes of the processes that failed, in the order of their failures."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        if launcher == "torchrun":
            from torch.distributed.run import main as torchrun

            torchrun(words)
        else:
            from accelerate.commands.launch import launch_command, launch_command_parser

            given = launch_command_parser().parse_args(words)
            # As torchrun above: otherwise SIGTERM gives the processes 30 s and no more. Accelerate hands it on.
            given.signals_to_handle = "SIGINT"
            launch_command(given)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in sorted(error.failures.values(), key=lambda each: each.timestamp)]
        if exit_code(codes) != STOPPED:
            print(error.format_msg(), file=sys.stderr, flush=True)
        return codes
    except subprocess.CalledProcessError as error:  # accelerate, one process
        return [error.returncode]
    except SignalException as error:  # the processes had 30 s to save; whether they did, the chain sees
        return [STOPPED if error.sigval == signal.SIGTERM else -error.sigval]
    return []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
