"""Arrows between packages point down only: launch → foundation → {shards, kernels}; one file knows of processes."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("foundation", "shards", "kernels", "launch")
DISTRIBUTED = ("torch.distributed", "torch.nn.parallel", "torch.multiprocessing", "deepspeed", "accelerate")
ALLOWED = {
    "shards": {
        *("shards", "numpy", "torch", "webdataset", "PIL", "scipy", "pyarrow", "fsspec", "filelock", "zstandard"),
        *("rasterio", "sarkit", "h5py", "matplotlib", "jinja2", "aiohttp", "gcsfs"),
    },
    "kernels": {"kernels", "numpy", "torch", "triton", "filelock", "xformers", "flash_attn"},
}


def imports(source: str, package: str = "") -> set[str]:
    """Dotted names that a module imports anywhere in it, also inside functions and by `import_module("...")`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module]))
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            found |= {
                arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            }
    return found


def imports_of(folder: str) -> dict[Path, set[str]]:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"{folder} holds no Python file"
    return {f.relative_to(ROOT): imports(f.read_text(), f.relative_to(ROOT).parts[0]) for f in files}


def uses(names: set[str], module: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for name in names)


def top(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import torch.distributed as dist", "torch.distributed"),
        ("from torch import distributed", "torch.distributed"),
        ("def f():\n    from torch.distributed.fsdp import FSDP", "torch.distributed"),
        ("import importlib\nimportlib.import_module('deepspeed')", "deepspeed"),
    ],
)
def test_this_test_sees_every_way_to_import(source: str, module: str) -> None:
    assert uses(imports(source), module)


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_a_lower_package_imports_only_what_its_row_of_the_house_allows(package: str) -> None:
    foreign = {str(file): top(names) - ALLOWED[package] for file, names in imports_of(package).items()}
    assert {file: names for file, names in foreign.items() if names} == {}


def test_foundation_never_imports_launch() -> None:
    assert [str(file) for file, names in imports_of("foundation").items() if uses(names, "launch")] == []


def test_only_commands_import_the_command_line() -> None:
    importers = {file for file, names in imports_of("foundation").items() if any("foundation.cli" in n for n in names)}
    commands = re.compile(r"foundation/(cli\w*|__main__|demo)\.py")
    assert [str(file) for file in importers if not commands.fullmatch(str(file))] == []


@pytest.mark.parametrize("folder", ["foundation/models", "foundation/objectives"])
def test_models_and_objectives_import_nothing_distributed(folder: str) -> None:
    found = {str(file): [m for m in DISTRIBUTED if uses(names, m)] for file, names in imports_of(folder).items()}
    assert {file: names for file, names in found.items() if names} == {}


def test_engines_and_checkpoints_are_the_only_importers_of_torch_distributed() -> None:
    everything = {file: names for package in PACKAGES for file, names in imports_of(package).items()}
    importers = {str(file) for file, names in everything.items() if any(uses(names, m) for m in DISTRIBUTED)}
    engines = {f"foundation/training/{name}.py" for name in ("engine", "engines", "sharded", "zero")}
    # Nodes of Slurm start processes by torchrun's own functions; the planner shards among processes that are not there.
    others = {"foundation/training/checkpoint.py", "foundation/planning/sharding.py"}
    others |= {"foundation/training/pieces.py", "launch/node.py", "launch/doctor/meeting.py"}
    assert importers == engines | others


@pytest.mark.parametrize("package", PACKAGES)
def test_a_generic_package_name_resolves_to_ours(package: str) -> None:
    file = importlib.import_module(package).__file__
    assert file is not None
    assert Path(file).resolve() == ROOT / package / "__init__.py", (
        f"another distribution provides `{package}`; uninstall it or use an environment of its own"
    )
