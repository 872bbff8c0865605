"""The fused attention compiles for GPUs that are not there, within their registers and shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from kernels.rpe_attention.fused import room
from kernels.rpe_attention.layout import Layout

PROGRAM = """
import json, torch
from kernels.ahead import ARCHITECTURES, needs
from kernels.rpe_attention import tiles, windows
from kernels.rpe_attention.fused import constants, options
from kernels.rpe_attention.layout import Layout

TYPES = {**dict.fromkeys(("grad", "qkv", "out", "d_qkv"), "*bf16"), **dict.fromkeys(("qk_scale", "rpe_scale"), "fp32"),
         **dict.fromkeys(("table", "lse", "delta", "partials"), "*fp32")}
WINDOW, IMAGE = Layout((7, 7)), Layout((32, 32))
encoder = [(windows.forward_kernel, WINDOW, 64), (windows.backward_kernel, WINDOW, 64)]
decoder = [(windows.forward_kernel, WINDOW, 32), (windows.backward_kernel, WINDOW, 32)]
wide = [(windows.forward_kernel, WINDOW, 88), (windows.backward_kernel, WINDOW, 128)]
image = [(tiles.forward_kernel, IMAGE, 64), (tiles.query_backward_kernel, IMAGE, 64),
         (tiles.key_backward_kernel, IMAGE, 64)]
for architecture, number in ARCHITECTURES.items():
    for kernel, layout, dim in encoder + image + (decoder + wide if number == 90 else []):
        qkv = torch.empty(1, layout.length, 3, 12, dim, device="meta")
        values = constants(kernel, qkv, torch.empty(1, dim, 50, device="meta"), layout)
        types = {name: TYPES.get(name, "i32") for name in kernel.arg_names if name not in values}
        how = options(kernel, dim, torch.bfloat16, number // 10)
        if dim > 64 and architecture == "sm_80":
            continue  # too many registers to assert much
        found = needs(kernel, types, values, architecture, **how)
        name = f"{kernel.__module__.split('.')[-1]} {kernel.__name__}"
        print(json.dumps([architecture, name, dim, how["num_warps"], *found]))
"""
SHARED = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024, "sm_100a": 227 * 1024}
"""Bytes of shared memory that a block can have."""


@pytest.mark.slow
def test_the_fused_attention_fits_every_gpu() -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 19
    for architecture, name, dim, warps, registers, spilled, shared, instructions in rows:
        print(f"{architecture:8} {name:28} d {dim}  warps {warps}  registers {registers:3}  spilled {spilled:4}  "
              f"shared {shared:6}  instructions {instructions}")  # fmt: skip  # pytest -s shows the table
        assert shared <= min(SHARED[architecture], room(dim, Layout((7, 7))))
        assert registers * 32 * warps <= 65536
        # Windows on Hopper and later are what training runs most: nothing of them may leave the registers.
        allowed = 256 if dim > 64 else 800 if architecture == "sm_80" else 32 if "windows" in name else 64
        assert spilled <= (0 if architecture == "sm_90a" and "windows" in name and dim <= 64 else allowed), name
