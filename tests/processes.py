"""What the tests of whole runs share: a small configuration, the command line, and the record."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from foundation.training import checkpoint

ROOT = Path(__file__).resolve().parents[1]
TINY = """
name: tiny
run_root: {root}/runs
data: {{catalog: {catalog}, image_size: 64, lanes: 8, block_shards: 2, workers: 0}}
model: {{size: nano, patch: 8, decoder: {{width: 24, depth: 1, heads: 2}}}}
objective: {{windows: 2, window: 5, radii: [3, 5]}}
optim: {{lr: 2e-2, warmup_samples: 16}}
train: {{samples: 96, global_batch: 8, log_every: 8, checkpoint_every: 16, keep: 100}}
monitor: {{images: 8}}
tracking: {{mlflow: false}}
"""
ROWS = "[{name: SAR-JEPA, published: 70.3}, {name: Pixels (raw), overrides: [objective.name=lomar-sar]}]"
"""Of a comparison."""
TAIL = 8192  # bytes, several lines of a record
MEASURED = ("time", "images_per_s", "data_wait", "window_s", "peak_rss_gb", "peak_device_gb", "checkpoint_stall_s")
MEASURED += ("monitor_s", "slowest_rank", "slowest_ratio", "slowest_wait")


def start(*arguments: object, program: tuple[str, ...] = ("-m", "foundation")) -> subprocess.Popen[str]:
    """A real process of the command line, its stderr in a pipe (stdout joins it)."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "COLUMNS": "200",
    }
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str]:
    """Exit status and output of a process, which is killed when it hangs."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # a launcher ends its processes, which hold the pipe too
        try:
            output, _ = process.communicate(timeout=60)
        except subprocess.TimeoutExpired as expired:
            process.kill()
            output = f"{expired.output}, and did not end when it was asked to"
        raise AssertionError(f"the process hangs; it printed\n{output}") from None
    return process.returncode, output


def wait(process: subprocess.Popen[str], condition: Callable[[], bool], seconds: float = 120) -> None:
    """Until `condition` holds; fails when the process ends before."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the process ended before its time:\n{process.communicate()[0]}"
        assert time.monotonic() < end, "the process makes no progress"
        time.sleep(0.01)


def position(run: Path) -> int:
    """The position of the last whole line of the record, 0 without one."""
    file = run / "metrics.jsonl"
    if not file.exists():
        return 0
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - TAIL))  # who waits for a line asks often
        lines = opened.read().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    return int(json.loads(whole[-1])["position"]) if whole else 0


def interrupted(finished: Path, copy: Path, at: int) -> Path:
    """A copy of a finished run as a kill left it: its checkpoints up to `at` samples, and a longer record."""
    shutil.copytree(finished, copy)
    for folder in (copy / "checkpoints").glob("samples-*"):
        if int(folder.name.removeprefix("samples-")) > at:
            shutil.rmtree(folder)
    return copy


def record(run: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl, at full precision, without what a clock or a meter gave."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if name not in MEASURED and not name.startswith("system/")}
        for row in rows
    ]


def close(run: Path, other: Path) -> None:
    """Numbers agree to 1e-5 at every line; the norm of Adam's step to 1e-3, since it divides by small moments."""
    for row, expected in zip(record(run), record(other), strict=True):
        assert row.pop("update_norm") == pytest.approx(expected.pop("update_norm"), rel=1e-3)
        assert row == pytest.approx(expected, rel=1e-5)


def hashes(run: Path) -> list[tuple[int, float]]:
    """(position, samples_hash) of every line."""
    return [(row["position"], row["samples_hash"]) for row in record(run)]


def same_state(a: Path, b: Path) -> bool:
    """Whether the newest checkpoints of two runs hold the same weights and optimiser state, bit for bit."""
    one, two = (checkpoint.load(run)["tensors"] for run in (a, b))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
