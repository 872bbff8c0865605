"""Triton kernels compiled for GPUs that are not there: what each needs of a multiprocessor.

Needs no GPU and no CUDA toolkit: Triton brings an assembler along. Not for processes that interpret Triton.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

ARCHITECTURES = {"sm_80": 80, "sm_90a": 90, "sm_100a": 100}
"""A100, H100 and H200, B200"""


class Needs(NamedTuple):
    """Per thread: registers, and bytes that did not fit them. Per block: bytes of shared memory. Instructions."""

    registers: int
    spilled: int
    shared: int
    instructions: int


def needs(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], architecture: str, **options: int
) -> Needs:
    """Compile a `triton.jit` function for an architecture.

    types: Triton's name of each argument's type (`*bf16`); constants: values of the others; options: num_warps and
    num_stages.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    # Tensors begin at multiples of 16 bytes, as PyTorch allocates them.
    pointers = [i for i, name in enumerate(kernel.arg_names) if types.get(name, "").startswith("*")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=aligned)
    target = GPUTarget("cuda", ARCHITECTURES[architecture], 32)
    compiled = triton.compile(source, target=target, options=options)
    return _assembled(compiled.asm["ptx"], architecture, compiled.metadata.shared)


def _assembled(ptx: str, architecture: str, shared: int) -> Needs:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        tool = knobs.nvidia.ptxas_blackwell if architecture == "sm_100a" else knobs.nvidia.ptxas
        command = [tool.path, "-v", f"--gpu-name={architecture}", str(path), "-o", str(path.with_suffix(".cubin"))]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        registers = int(re.findall(r"Used (\d+) registers", report)[-1])
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill stores", report)))
    instructions = sum(1 for line in ptx.splitlines() if re.match(r"\s+(@%p\d+\s+)?[a-z][\w.]+\s+.*;", line))
    return Needs(registers, spilled, shared, instructions)
