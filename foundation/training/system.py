"""What the machine of rank 0 does: processors, memory, disk and GPUs, under the names that MLflow gives them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

PREFIX = "system/"  # MLflow shows what is called so on a page of its own


class System:
    """Reads the machine as it is now; without psutil or pynvml the numbers that need them are missing."""

    def __init__(self, folder: Path) -> None:
        """`folder` lies on the disk that is looked at."""
        self._folder, self._psutil, self._nvml = folder, _imported("psutil"), _imported("pynvml")
        self._gpus: list[Any] = []
        if self._psutil:
            self._psutil.cpu_percent()  # from now to the first reading
        if self._nvml:
            try:
                self._nvml.nvmlInit()
                handle, count = self._nvml.nvmlDeviceGetHandleByIndex, self._nvml.nvmlDeviceGetCount()
                self._gpus = [handle(i) for i in range(count)]
            except self._nvml.NVMLError:  # the package without a driver
                self._gpus = []

    def read(self) -> dict[str, float]:
        """Means since the last reading of what is a share of time, values of now of everything else; MB = 1e6 bytes."""
        found: dict[str, float] = {}
        if self._psutil:
            memory, disk = self._psutil.virtual_memory(), self._psutil.disk_usage(str(self._folder))
            found = {
                "cpu_utilization_percentage": self._psutil.cpu_percent(),
                "system_memory_usage_megabytes": memory.used / 1e6,
                "system_memory_usage_percentage": 100 * memory.used / memory.total,
                "disk_usage_percentage": disk.percent,
                "disk_available_megabytes": disk.free / 1e6,
            }
        for i, gpu in enumerate(self._gpus):
            found |= {f"gpu_{i}_{name}": value for name, value in self._gpu(gpu).items()}
        return {PREFIX + name: round(float(value), 1) for name, value in found.items()}

    def _gpu(self, gpu: Any) -> dict[str, float]:
        """A GPU that does not say something, as a slice of one does not, says the rest."""
        nvml = self._nvml
        found: dict[str, float] = {}
        for read in (
            lambda: {"utilization_percentage": nvml.nvmlDeviceGetUtilizationRates(gpu).gpu},
            lambda: _memory(nvml.nvmlDeviceGetMemoryInfo(gpu)),
            lambda: {"power_usage_watts": nvml.nvmlDeviceGetPowerUsage(gpu) / 1000},
        ):
            try:
                found |= read()
            except nvml.NVMLError:
                continue
        return found


def _memory(info: Any) -> dict[str, float]:
    return {"memory_usage_megabytes": info.used / 1e6, "memory_usage_percentage": 100 * info.used / info.total}


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
