"""Whole runs in children of a process that has imported the trainer: a start costs what a run itself needs."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from foundation import signals
from foundation.config import Config
from foundation.training import run as runs
from foundation.training.stopping import Stopped


def forked(config: Config, log: Path, prepare: Callable[[], object] = lambda: None) -> int:
    """Train in a child, which prints into `log`; its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        log.parent.mkdir(exist_ok=True, parents=True)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        signals.forget()
        signals.listen()
        prepare()
        runs.train(config)
        status = 0
    except Stopped:
        status = signals.STOPPED
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(pid: int) -> int:
    """Exit code of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
