"""How the CUDA kernels are compiled: ahead of time or on first use, once, and never from another source."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import ROOT

from kernels.rpe_attention import building, cuda

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation is compiled with g++")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc on PATH")


@pytest.fixture(autouse=True)
def nothing_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SAR_FOUNDATION_CACHE", str(tmp_path / "cache"))
    cuda.library.cache_clear()
    yield
    cuda.library.cache_clear()


@pytest.mark.parametrize("home", ["", "/nonexistent"])
def test_without_a_compiler_the_error_says_what_to_do(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", home)
    with pytest.raises(
        RuntimeError, match=r"there is no nvcc .*CUDA_HOME.*: install the CUDA toolkit, set CUDA_HOME, or"
    ):
        building.build("cuda")
    with pytest.raises(SystemExit, match="there is no nvcc"):
        building.main(["build", "--out", str(tmp_path / "nowhere.so")])
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match=r"needs a C\+\+20 compiler and g\+\+ is not on PATH: set CXX"):
        building.build("cpu")


def compiler(path: Path, script: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_a_failed_compilation_shows_the_compilers_last_lines_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(tmp_path / "bin" / "nvcc", 'for i in $(seq 30); do echo "line $i"; done; [ "$1" = --version ]')
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match="compiling the attention kernels failed") as caught:
        building.build("cuda", out=tmp_path / "out" / "made.so")
    assert "line 30" in str(caught.value)
    assert "line 10\n" not in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


def test_a_library_is_compiled_once_and_again_when_anything_it_depends_on_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = 'echo compiled >> "$0.log"\nwhile [ "$1" != -o ]; do shift; done; touch "$2"'
    version = '[ "$1" = --version ] && echo {} && exit\n'
    nvcc = compiler(tmp_path / "bin" / "nvcc", version.format("release 13.0") + script)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("SAR_FOUNDATION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(building, "SOURCES", Path(shutil.copytree(building.SOURCES, tmp_path / "csrc")))
    first = building.build("cuda")
    assert first.parent == tmp_path / "cache"
    assert building.build("cuda") == first
    assert (tmp_path / "bin" / "nvcc.log").read_text() == "compiled\n"
    paths = {first, building.build("cuda", ("sm_90a",))}
    (tmp_path / "csrc" / "tile.cuh").write_text("// changed")
    paths.add(building.build("cuda"))
    compiler(nvcc, version.format("release 13.1") + script)
    paths.add(building.build("cuda"))
    assert len(paths) == 4
    assert all(path.exists() for path in paths)


def test_a_library_built_ahead_of_time_comes_first_and_a_broken_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "_cuda.so"
    broken.write_text("not a library")
    monkeypatch.setattr(building, "PREBUILT", broken)
    cuda.library.cache_clear()
    with pytest.raises(RuntimeError, match=r"cannot load the attention kernels in .*_cuda\.so.*delete the file"):
        cuda.library("cuda")


@needs_nvcc
def test_kernels_fit_the_registers_and_the_shared_memory_of_every_architecture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    building.main(["build", "--out", str(tmp_path / "_cuda.so")])
    found = building.statistics(tmp_path / "_cuda.so")
    assert {need.architecture for need in found} == set(building.ARCHITECTURES)
    assert len(found) == len(building.ARCHITECTURES) * 9
    printed = capsys.readouterr().out
    for need in found:
        assert need.kernel in printed
        assert need.spilled == 0, need
        assert need.shared <= 70 << 10, need
        blocks = 2 if need.architecture == "sm_80" else 3  # 164 KB and 228 KB of shared memory, 65536 registers
        assert need.registers * 128 * blocks <= 65536, need
        assert (need.shared + 1024) * blocks <= (164 if need.architecture == "sm_80" else 228) << 10, need


def test_a_report_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"lib\.log is missing, the compiler's report of lib\.so: build the library"):
        building.statistics(tmp_path / "lib.so")


@needs_compiler
def test_a_library_of_another_source_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "PREBUILT", shutil.copy(building.build("cpu"), tmp_path / "_cuda.so"))
    changed = Path(shutil.copytree(building.SOURCES, tmp_path / "csrc"))
    (changed / "tile.cuh").write_text((changed / "tile.cuh").read_text() + "// changed\n")
    monkeypatch.setattr(building, "SOURCES", changed)
    cuda.library.cache_clear()
    with pytest.raises(RuntimeError, match=r"_cuda.so were built of another source; delete the file or build again"):
        cuda.library("cuda")
    cuda.library.cache_clear()


@needs_nvcc
def test_the_build_hook_needs_no_pytorch_and_no_other_package(tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-S", building.__file__, "build", "--out", str(tmp_path / "_cuda.so")]
    done = subprocess.run([*command, "--arch", "sm_90a"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "forward d=64 keys<=56" in done.stdout
    assert (tmp_path / "_cuda.so").exists()


def test_a_library_built_ahead_of_time_may_stand_apart_from_the_code(tmp_path: Path) -> None:
    code = """
from kernels.rpe_attention import building, handwritten
print(building.PREBUILT, handwritten.BUILT)
"""
    (tmp_path / "kernels.so").touch()
    beside = Path(building.__file__).with_name("_cuda.so")
    for value, expected in (
        ("/opt/kernels.so", "/opt/kernels.so False"),
        (f"{tmp_path}/kernels.so", f"{tmp_path}/kernels.so True"),
        ("", f"{beside} {beside.exists()}"),
    ):
        environ = {**os.environ, "SAR_FOUNDATION_KERNELS": value, "CUDA_HOME": str(tmp_path)}  # no nvcc there
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr
