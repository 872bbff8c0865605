"""What a run costs: images per second, waiting for data, memory; and the versions it ran with."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

JOB = {
    "slurm_job_id": "SLURM_JOB_ID",
    "slurm_job_name": "SLURM_JOB_NAME",
    "slurm_array_job_id": "SLURM_ARRAY_JOB_ID",
    "slurm_array_task_id": "SLURM_ARRAY_TASK_ID",
    "slurm_restart_count": "SLURM_RESTART_COUNT",
    "slurm_nodes": "SLURM_JOB_NODELIST",
}


class Throughput:
    """Images per second and the share of time spent waiting for data, from one `read` to the next.

    `clock` gives seconds. The images are those the caller counts: the run counts global batches.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._start, self._images, self._waited = clock, clock(), 0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        start = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - start

    def update(self, images: int) -> None:
        """Count images that were trained on."""
        self._images += images

    def read(self) -> dict[str, float]:
        """`images_per_s`, `data_wait` (share of time in [0, 1]), `window_s` (that time) and peak memory in GB.

        Starts a new window.
        """
        now = self._clock()
        seconds = max(now - self._start, 1e-9)
        rates = {"images_per_s": self._images / seconds, "data_wait": self._waited / seconds, "window_s": seconds}
        self._start, self._images, self._waited = now, 0, 0.0
        return rates | peak_memory()


def peak_memory() -> dict[str, float]:
    """Highest resident memory of this process since it started and, with CUDA in use, of its device; GB = 1e9 bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts kibibytes, macOS bytes
    memory = {"peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
    if torch.cuda.is_available():
        memory["peak_device_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return memory


def environment() -> dict[str, str]:
    """Versions of what computes, the platform and the device; the git commit where it is known."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "torch": str(torch.__version__)}
    for package in ("numpy", "triton", "mlflow", "sar-foundation"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    cuda = torch.cuda.is_available()
    found["device"] = torch.cuda.get_device_name() if cuda else platform.machine()
    if cuda:
        found["cuda"] = str(torch.version.cuda)
    if commit := _commit(Path(__file__).resolve().parents[2]):
        found["commit"] = commit
    return found


def job() -> dict[str, str]:
    """Where this process runs: its host and, under Slurm, the job, the task of its array and how often it came back."""
    found = {name: os.environ[variable] for name, variable in JOB.items() if variable in os.environ}
    if found:
        found.setdefault("slurm_restart_count", "0")  # Slurm sets it from the first requeue on
    return {"host": socket.gethostname(), **found}


def _commit(root: Path) -> str:
    """The commit of the checkout at `root`, with -dirty when files were changed; else that of the copy or the image."""
    if not (root / ".git").exists():
        return _submitted(root.parent / "submission.json") or os.environ.get("SAR_FOUNDATION_COMMIT", "")
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _submitted(record: Path) -> str:
    """The same of code that was copied beside a job."""
    try:
        facts = json.loads(record.read_text(encoding="utf-8"))
        return (facts["commit"] or "") + "-dirty" * bool(facts["commit"] and facts["dirty"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""
