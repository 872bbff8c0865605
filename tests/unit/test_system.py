"""What a record says of the machine: devices, the job, the code, throughput and versions."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from foundation.training.meters import JOB, Throughput, _commit, environment, job
from foundation.training.system import System


class _Nvml:
    """The calls of pynvml for two devices, of which the second says only its memory."""

    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, i: int) -> int:
        return i

    def _whole(self, gpu: int) -> None:
        if gpu:
            raise self.NVMLError

    def nvmlDeviceGetUtilizationRates(self, gpu: int) -> Any:
        self._whole(gpu)
        return SimpleNamespace(gpu=87)

    def nvmlDeviceGetMemoryInfo(self, gpu: int) -> Any:
        return SimpleNamespace(used=2e9, total=8e9)

    def nvmlDeviceGetPowerUsage(self, gpu: int) -> int:
        self._whole(gpu)
        return 412_340


def test_the_machine_says_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", _Nvml())
    found = System(tmp_path).read()
    assert {k: v for k, v in found.items() if "gpu" in k} == {
        "system/gpu_0_utilization_percentage": 87.0,
        "system/gpu_0_memory_usage_megabytes": 2000.0,
        "system/gpu_0_memory_usage_percentage": 25.0,
        "system/gpu_0_power_usage_watts": 412.3,
        "system/gpu_1_memory_usage_megabytes": 2000.0,
        "system/gpu_1_memory_usage_percentage": 25.0,
    }
    assert 0 < found["system/system_memory_usage_percentage"] < 100
    assert found["system/disk_available_megabytes"] > 0
    assert 0 <= found["system/cpu_utilization_percentage"] <= 100
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert System(tmp_path).read() == {}


def test_a_job_is_named_by_what_slurm_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in JOB.values():
        monkeypatch.delenv(variable, raising=False)
    assert job().keys() == {"host"}
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    found = job()
    assert found | {"host": ""} == {
        "host": "", "slurm_job_id": "12", "slurm_array_task_id": "3", "slurm_restart_count": "0"
    }  # fmt: skip
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert job()["slurm_restart_count"] == "2"


@pytest.mark.parametrize(
    ("record", "commit"),
    [('{"commit": "abc", "dirty": true}', "abc-dirty"), ('{"commit": "abc", "dirty": false}', "abc"),
     ('{"commit": null, "dirty": false}', ""), ("[]", ""), ("{", "")],
)  # fmt: skip
def test_code_that_was_copied_beside_a_job_knows_its_commit(tmp_path: Path, record: str, commit: str) -> None:
    (tmp_path / "submission.json").write_text(record)
    assert _commit(tmp_path / "code") == commit


def test_an_installed_package_knows_the_commit_of_its_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAR_FOUNDATION_COMMIT", "abc")
    assert _commit(tmp_path / "site-packages") == "abc"
    (tmp_path / "submission.json").write_text('{"commit": "def", "dirty": false}')
    assert _commit(tmp_path / "code") == "def", "a job brings its own code"


def test_throughput_counts_images_and_waiting_from_one_reading_to_the_next() -> None:
    now = [0.0]
    meter = Throughput(lambda: now[0])
    with meter.waiting():
        now[0] += 1.0
    now[0] += 3.0
    meter.update(100)
    meter.update(300)
    first = meter.read()
    assert (first["images_per_s"], first["data_wait"]) == (100.0, 0.25)
    assert first["peak_rss_gb"] > 0.01
    now[0] += 2.0
    meter.update(10)
    second = meter.read()
    assert (second["images_per_s"], second["data_wait"]) == (5.0, 0.0)


def test_the_environment_names_what_computed() -> None:
    found = environment()
    assert {"python", "platform", "torch", "numpy", "device"} <= found.keys()
    assert all(isinstance(value, str) and value for value in found.values())
