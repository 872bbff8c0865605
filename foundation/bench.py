"""What all benches write down: the machine they ran on, their tables as Markdown, and everything as JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import wrap
from typing import Any

import torch

from foundation.bench_loader import Table
from foundation.files import write_whole
from foundation.planning.cluster import GPUS, known_gpu
from kernels.bench import Roof

__all__ = [
    "Table",
    "compact",
    "environment",
    "environment_line",
    "here",
    "markdown",
    "roof_line",
    "sheet_peak",
    "write",
]


def here() -> torch.device:
    """The GPU of this process, or its CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def environment(device: torch.device) -> dict[str, Any]:
    """The device and the versions that a figure depends on."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else _processor()
    found: dict[str, Any] = {
        "device": name,
        "type": device.type,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    if cuda:
        properties = torch.cuda.get_device_properties(device)
        found |= {"multiprocessors": properties.multi_processor_count, "memory": properties.total_memory}
    else:
        found |= {"threads": torch.get_num_threads(), "vectors": torch.backends.cpu.get_cpu_capability()}
    for package in ("triton", "xformers", "flash-attn", "flash-attn-4"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment_line(found: dict[str, Any]) -> str:
    """The same in one line."""
    threads = ""
    if found["type"] == "cpu":
        count = "1 thread (processor time)" if found["threads"] == 1 else f"{found['threads']} threads"
        threads = f", {count}, {found['vectors']}"
    others = [f"{name} {found[name]}" for name in ("triton", "xformers", "flash-attn", "flash-attn-4") if found[name]]
    return ", ".join([f"{found['device']}{threads}", f"torch {found['torch']}", *others])


def roof_line(roof: Roof) -> str:
    """What a device reached, in one line."""
    products = [f"{name} products {rate / 1e12:.3g} TFLOP/s" for name, rate in roof.gemm.items()]
    return ", ".join([f"measured here: copy {roof.copy / 1e9:.3g} GB/s", *products])


def sheet_peak(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a known GPU by its data sheet; None for others, the slower PCIe boards included."""
    name = known_gpu(device_name)
    return GPUS[name].bf16 if name else None


def span(counts: Sequence[int]) -> str:
    """`3`, or `2 to 30`."""
    low, high = min(counts, default=0), max(counts, default=0)
    return str(low) if low == high else f"{low} to {high}"


def compact(table: Table) -> Table:
    """Without the columns that hold nothing here, such as memory on a CPU."""
    kept = [n for n in range(len(table.header)) if any(row[n] != "-" for row in table.rows)]
    rows = [tuple(row[n] for n in kept) for row in table.rows]
    return Table(table.title, tuple(table.header[n] for n in kept), rows)


def markdown(title: str, intro: str, tables: Iterable[Table]) -> str:
    """A page: a heading, a paragraph, and a section for each table."""
    lines = [f"# {title}", "", *wrap(intro, 120, break_long_words=False, break_on_hyphens=False)]
    for table in tables:
        lines += ["", f"## {table.title}", "", _cells(table.header), _cells(["---"] * len(table.header))]
        lines += [_cells(row) for row in table.rows]
    return "\n".join(lines) + "\n"


def _cells(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def write(out: Path, name: str, data: dict[str, Any], page: str) -> list[Path]:
    """`name`.json and `name`.md in the folder `out`. Raises StorageError."""
    text = json.dumps(data, indent=1, default=str)
    return [write_whole(out / f"{name}.json", text + "\n"), write_whole(out / f"{name}.md", page)]
