"""How the CUDA kernels of short windows are compiled: ahead of time, or on first use into a cache. Needs no PyTorch.

`python kernels/rpe_attention/building.py build` compiles ahead of time (with `-m kernels.rpe_attention.building` too).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).with_name("csrc")
PREBUILT = Path(os.environ.get("SAR_FOUNDATION_KERNELS") or Path(__file__).with_name("_cuda.so"))
"""The library built ahead of time; in an image it stands apart from the code, of which a job brings a frozen copy"""
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
"""A100, H100 and H200, B200; later ones compile the PTX of the first that is not specific to one architecture"""


class Needs(NamedTuple):
    """What one kernel needs on one architecture. Per thread: registers, bytes spilled. Per block: bytes of memory."""

    kernel: str
    architecture: str
    registers: int
    spilled: int
    shared: int


def find_nvcc() -> str:
    """The CUDA compiler: of CUDA_HOME, else of PATH. Raises RuntimeError when there is none."""
    home = os.environ.get("CUDA_HOME", "")
    found = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")
    if found is None:
        where = f"in {Path(home) / 'bin'} (CUDA_HOME)" if home else "on PATH, and CUDA_HOME is not set"
        raise RuntimeError(
            f"the cuda backend is not built and there is no nvcc {where}: install the CUDA toolkit, set CUDA_HOME, or "
            "choose another attention backend"
        )
    return found


def _find_cxx() -> str:
    name = os.environ.get("CXX", "g++")
    found = shutil.which(name)
    if found is None:
        raise RuntimeError(
            f"the emulation of the cuda backend needs a C++20 compiler and {name} is not on PATH: set CXX"
        )
    return found


def sources() -> str:
    """A name of the present source, which a library made of it carries."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def _command(device_type: str, architectures: tuple[str, ...], out: Path) -> list[str]:
    if device_type == "cpu":
        flags: tuple[str, ...] = (
            "-O2",
            "-std=c++20",
            "-fno-strict-aliasing",
            "-U_FORTIFY_SOURCE",
            "-shared",
            "-fPIC",
            "-Wno-unknown-pragmas",
        )
        return [_find_cxx(), *flags, _named(), str(SOURCES / "emulate.cpp"), "-o", str(out)]
    code = [f"-gencode=arch={a.replace('sm', 'compute')},code={a}" for a in architectures]
    if portable := [a.replace("sm", "compute") for a in architectures if a[-1].isdigit()]:
        code.append(f"-gencode=arch={portable[0]},code={portable[0]}")
    flags = ("-O3", "-std=c++20", "-shared", "-Xcompiler=-fPIC", "-Xptxas=-v")
    return [find_nvcc(), *flags, _named(), *code, str(SOURCES / "window.cu"), "-o", str(out)]


def _named() -> str:
    return f'-DRPE_SOURCES="{sources()}"'


def _compile(device_type: str, architectures: tuple[str, ...], out: Path) -> None:
    """Write the library to `out` and the compiler's report beside it, both whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        made = Path(folder) / out.name
        command = _command(device_type, architectures, made)
        done = subprocess.run(command, capture_output=True, text=True)
        report = done.stdout + done.stderr
        if done.returncode != 0:
            last = "\n".join(report.strip().splitlines()[-20:])
            raise RuntimeError(f"compiling the attention kernels failed ({shlex.join(command)}):\n{last}")
        log = made.with_suffix(".log")
        log.write_text(report)
        log.replace(out.with_suffix(".log"))
        made.replace(out)


def cache_folder() -> Path:
    """Where compiled kernels are kept: $SAR_FOUNDATION_CACHE, else ~/.cache/sar-foundation."""
    return Path(os.environ.get("SAR_FOUNDATION_CACHE") or Path.home() / ".cache" / "sar-foundation")


def _fingerprint(device_type: str, architectures: tuple[str, ...]) -> str:
    """Of everything that the compiled library depends on."""
    command = _command(device_type, architectures, Path("out.so"))
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256()
    for part in (version, *command[1:]):
        digest.update(part.replace(str(SOURCES), "").encode() + b"\0")
    return digest.hexdigest()[:16]  # the name of the source is part of the command


def build(device_type: str = "cuda", architectures: tuple[str, ...] = ARCHITECTURES, out: Path | None = None) -> Path:
    """Compile to `out`, or to the cache unless it is there. Processes that need one library wait for who builds it.

    Returns the library's path. Raises RuntimeError without a compiler, and with its last lines when it fails.
    """
    if out is not None:
        _compile(device_type, architectures, out)
        return out
    kind = "emulation" if device_type == "cpu" else "cuda"
    path = cache_folder() / f"rpe_attention-{kind}-{_fingerprint(device_type, architectures)}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        from filelock import FileLock  # a build from source has only the compiler

        with FileLock(f"{path}.lock"):
            if not path.exists():
                _compile(device_type, architectures, path)
    return path


def statistics(path: Path | None = None) -> list[Needs]:
    """What each kernel of a built library needs on each architecture, from the report beside it; by default the cached.

    Needs no GPU. Raises RuntimeError as `build` does.
    """
    path = path or build("cuda")
    log = path.with_suffix(".log")
    if not log.exists():
        raise RuntimeError(f"{log} is missing, the compiler's report of {path.name}: build the library again")
    kernels, report = ctypes.CDLL(str(path)), log.read_text()
    pattern = (
        r"Compiling entry function '(\S+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    needs = []
    for symbol, architecture, stores, loads, registers in re.findall(pattern, report, re.DOTALL):
        sized = re.search(r"window_(forward|backward)ILi(\d+)ELi(\d+)E", symbol)
        if sized is None:
            name, shared = "sum_partials", 8 * 32 * 4
        else:
            direction, dim, tiles = sized.groups()
            name = f"{direction} d={dim} keys<={8 * int(tiles)}"
            shared = kernels.rpe_window_shared_bytes(direction == "backward", int(dim))
        needs.append(Needs(name, architecture, int(registers), int(stores) + int(loads), shared))
    return sorted(needs, key=lambda n: (n.architecture, n.kernel))


def main(arguments: list[str] | None = None) -> None:
    """`build [--out FILE] [--arch sm_90a,...]`: compile ahead of time and print what the kernels need."""
    import argparse

    parser = argparse.ArgumentParser(prog="building.py", description=main.__doc__)
    parser.add_argument("command", choices=["build"])
    parser.add_argument("--out", type=Path, default=PREBUILT, help="the library to write (default: beside the package)")
    parser.add_argument("--arch", default=",".join(ARCHITECTURES), help="architectures, separated by commas")
    options = parser.parse_args(arguments)
    try:
        path = build("cuda", tuple(options.arch.split(",")), options.out)
    except RuntimeError as error:
        sys.exit(str(error))
    print(f"{path}\n{'kernel':<24} {'arch':<8} registers  spilled B  shared B")
    for need in statistics(path):
        print(f"{need.kernel:<24} {need.architecture:<8} {need.registers:9} {need.spilled:10} {need.shared:9}")


if __name__ == "__main__":
    main()
