"""Single values of an HDF5 file, read by a process of its own.

libhdf5 follows the free space of a damaged heap of strings for ever, inside a call that nothing in Python can end.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shards.errors import DataError

CPU_SECONDS = 2  # a whole read takes a fraction of one; counted by the system, since a busy machine is no damage
PATIENCE = 300  # seconds on a slow disk
Value = str | int | float | None


def facts(path: Path, names: Sequence[str], where: str) -> dict[str, Value]:
    """Name → value, stored as a dataset or as an attribute; None when it is neither, or no text and no number.

    Raises DataError, naming `where`, when they cannot be read, or when the reader does not come to an end.
    """
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    command = [sys.executable, "-m", "shards.hdf5", str(path), *names]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False, errors="replace"
        )
        if done.returncode == 0:
            return json.loads(done.stdout)
        if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
            raise subprocess.TimeoutExpired(command, CPU_SECONDS)
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
    except subprocess.TimeoutExpired:
        reason = "the reader does not come to an end"
    except (OSError, ValueError) as error:
        reason = str(error)
    raise DataError(f"its metadata are damaged: {reason}", where=where, do="exclude it, or obtain the product again")


def read(file: Any, name: str) -> Value:
    """One value of an open file."""
    import h5py

    value = file.attrs.get(name)
    if value is None and isinstance(file.get(name, getlink=True), h5py.HardLink):
        value = file[name][()] if getattr(file[name], "size", 0) == 1 else None
    value = value.item() if getattr(value, "size", 0) == 1 else value
    value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return value if isinstance(value, str | int | float) else None


def main(path: str, *names: str) -> None:
    """Print the values as JSON."""
    import h5py

    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    with h5py.File(path, "r", locking=False) as file:
        print(json.dumps({name: read(file, name) for name in names}))


if __name__ == "__main__":
    main(*sys.argv[1:])
