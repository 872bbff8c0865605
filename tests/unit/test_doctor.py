"""What `foundation doctor` makes of facts: every deviation is named with its place and what to do."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from doctor_threads import places
from hypothesis import given
from hypothesis import strategies as st

from foundation.errors import LaunchError
from launch.doctor import devices, gpus, software, system
from launch.doctor.rows import Row, Status, each, equal, least, span, where

ROOT = Path(__file__).parents[2]
SMI = """\
0, GPU-8f1c0000-aaaa, NVIDIA H100 80GB HBM3, 81559, 4, 33, 345, 1980, 0, 550.54.15, 0x0000000000000001
1, GPU-8f1c0000-bbbb, NVIDIA H100 80GB HBM3, 81559, 4, 35, 345, 1980, 0, 550.54.15, 0x0000000000000001
"""
SILENT = "0, GPU-1, Tesla T4, 15360, [N/A], [Not Supported], [N/A], 1590, [N/A], 535.1, [Not Supported]\n"


def bad(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.status in (Status.warning, Status.failed)]


def one(rows: Sequence[Row], check: str) -> Row:
    (row,) = (row for row in rows if row.check == check)
    return row


# --- words


def test_places_are_whole_nodes_or_ranks() -> None:
    every = places("a", "a", "b", "b", "c")
    assert where(every, every) == "all 3 nodes"
    assert where(every[:2], every) == "node a"
    assert where(every[:4], every) == "nodes a, b"
    assert where([every[1], every[4]], every) == "node c, rank 1 (a)"
    assert where(places("a"), places("a")) == "node a"


def test_sixty_four_nodes_stay_one_short_row() -> None:
    every = places(*(f"n{rank // 8:02}" for rank in range(512)))
    row = equal("version", every, ["2.14"] * 504 + ["2.13"] * 8, "do this")
    assert row.status is Status.failed
    assert row.found == "differs: 2.14 on nodes n00, n01, n02, n03, n04, n05 and 57 more; 2.13 on node n63"
    assert equal("version", every, ["2.14"] * 512, "do this") == Row("version", Status.ok, "2.14")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2)), min_size=1, max_size=6))
def test_every_process_belongs_to_exactly_one_verdict(found: list[tuple[str, int]]) -> None:
    every = places(*(node for node, _ in found))
    rows = list(each("check", every, [(Status.ok, f"value {value}", "") for _, value in found]))
    assert len(rows) == len({value for _, value in found})
    if len(rows) == 1:
        assert rows[0].found == f"value {found[0][1]}"
    for place, (node, value) in zip(every, found, strict=True):
        (row,) = (row for row in rows if row.found.startswith(f"value {value}"))
        named = f"rank {place.rank} ({node})" in row.found or node in row.found.partition(" on ")[2]
        assert named or len(rows) == 1


@given(st.lists(st.integers(0, 100), min_size=1, max_size=9), st.integers(0, 100))
def test_a_limit_splits_the_numbers_into_those_that_reach_it_and_the_others(values: list[int], limit: int) -> None:
    every = places(*(f"n{index}" for index in range(len(values))))
    rows = list(least("check", every, values, limit, lambda value: f"{value:g}", "more"))
    good, low = [v for v in values if v >= limit], [v for v in values if v < limit]
    assert [row.status for row in rows] == [Status.ok] * bool(good) + [Status.warning] * bool(low)
    if low:
        assert rows[-1].found.startswith(f"only {span(low, lambda value: f'{value:g}')} on ")
        assert rows[-1].do == "more"


# --- software


@pytest.fixture(scope="module")
def ours() -> software.Software:
    return software.look()


def changed(found: software.Software, **update: Any) -> software.Software:
    return found.model_copy(update=update)


def test_equal_software_is_five_rows_and_none_of_them_bad(ours: software.Software) -> None:
    rows = list(software.rows(places("a", "b"), [ours, ours]))
    assert bad(rows) == []
    assert f"torch {torch.__version__.partition('+')[0]}" in one(rows, "versions").found
    assert one(rows, "packages").found == "foundation, shards, kernels, launch are those of this project"
    assert one(rows, "source files").found == software.digest(ROOT)


@pytest.mark.parametrize(
    ("update", "check", "found", "do"),
    [
        ({"code": "f" * 12}, "source files", "f" * 12 + " on node b", "start all processes from one checkout"),
        ({"commit": "no checkout"}, "commit", "no checkout on node b", "`foundation submit` freezes"),
        ({"optional": {"deepspeed": "0.1"}}, "optional packages", "deepspeed 0.1 on node b", "use one environment"),
        ({"root": "/other"}, "code in", "/other on node b", "the same PYTHONPATH"),
    ],
)
def test_software_that_differs_is_named(
    ours: software.Software, update: dict[str, Any], check: str, found: str, do: str
) -> None:
    rows = bad(list(software.rows(places("a", "a", "b"), [ours, ours, changed(ours, **update)])))
    row = one(rows, check)
    assert found in row.found
    assert do in row.do


@pytest.mark.parametrize("name", ["python", "torch", "numpy", "sar-foundation"])
def test_each_version_that_differs_has_a_row_of_its_own(ours: software.Software, name: str) -> None:
    other = changed(ours, versions={**ours.versions, name: "9.9"})
    rows = list(software.rows(places("a", "a"), [ours, other]))
    assert [row.check for row in bad(rows)] == [f"version of {name}"]
    assert bad(rows)[0].found.endswith("9.9 on rank 1 (a)")
    assert name not in one(rows, "versions").found


def test_a_foreign_package_on_the_path_is_found_and_the_cure_names_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise SystemExit('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kernels")
    (row,) = bad(list(software.rows(places("a"), [software.look()])))
    assert row.status is Status.failed
    assert row.found == f"`kernels` is {tmp_path}/kernels, not {ROOT}/kernels"
    assert row.do.startswith(f"take {tmp_path} off PYTHONPATH, or give this project an environment of its own")


def test_another_distribution_of_our_name_is_told_apart_by_whether_it_wins(ours: software.Software) -> None:
    rival = changed(ours, rivals={"kernels": "0.9"})
    (row,) = bad(list(software.rows(places("a"), [rival])))
    assert (row.status, row.found) == (
        Status.warning,
        "a distribution kernels 0.9 is installed too, and may win elsewhere",
    )
    wins = changed(rival, folders={**ours.folders, "kernels": "/site-packages/kernels"})
    (row,) = bad(list(software.rows(places("a"), [wins])))
    assert row.status is Status.failed
    assert row.do.startswith("pip uninstall kernels, or give this project")
    (row,) = bad(list(software.rows(places("a"), [changed(ours, folders={**ours.folders, "shards": ""})])))
    assert (row.found, row.status) == ("`shards` is found nowhere", Status.failed)


def test_the_digest_knows_every_source_file_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "a.py").write_text("1")
    before = software.digest(tmp_path)
    (tmp_path / "kernels" / "a.txt").write_text("2")
    (tmp_path / "elsewhere.py").write_text("2")
    assert software.digest(tmp_path) == before
    (tmp_path / "kernels" / "a.py").rename(tmp_path / "kernels" / "b.py")
    assert software.digest(tmp_path) != before


# --- system

GRANTED = system.System(
    cores=8, memory_total=64 << 30, memory_free=32 << 30, shm=32 << 30, open_files=system.UNLIMITED, locked=-1
)


@pytest.mark.parametrize(
    ("update", "check", "found", "do"),
    [
        ({"cores": 1}, "cores", "1 for 2 processes of a node on node b", "--cpus-per-task"),
        ({"memory_free": 1 << 30}, "host memory", "only 0.5 GiB on node b; a node has 64.0 GiB", "--mem"),
        ({"shm": 64 << 20}, "/dev/shm", "only 0.1 GiB on node b", "--shm-size=8g"),
        ({"open_files": 1024}, "open files", "only 1,024 on node b", "ulimit -Hn"),
        ({"locked": 8 << 20}, "locked memory", "at most 8 MiB on node b", "ulimit -l unlimited"),
    ],
)
def test_a_node_that_grants_too_little_is_named(update: dict[str, Any], check: str, found: str, do: str) -> None:
    every = places("a", "a", "b", "b")
    poor = GRANTED.model_copy(update=update)
    rows = list(system.rows(every, [GRANTED, GRANTED, poor, poor], gpus=True))
    (row,) = bad(rows)
    assert row.check == check
    assert found in row.found
    assert do in row.do
    assert bad(list(system.rows(every, [GRANTED] * 4, gpus=True))) == []


def test_locked_memory_matters_only_to_gpus_of_several_nodes() -> None:
    low = GRANTED.model_copy(update={"locked": 1 << 20})
    assert bad(list(system.rows(places("a", "b"), [low, low], gpus=False))) == []
    assert bad(list(system.rows(places("a", "a"), [low, low], gpus=True))) == []


def test_memory_is_that_of_the_tightest_control_group_and_its_cache_counts_as_free(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup/job/step"
    (tmp_path / "proc/self").mkdir(parents=True)
    group.mkdir(parents=True)
    assert system.memory(tmp_path) == (None, None)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 800 kB\n")
    assert system.memory(tmp_path) == (1024_000, 819_200)
    (tmp_path / "proc/self/cgroup").write_text("1:name=x:/else\n0::/job/step\n")
    for folder, limit, used, cached in ((group, "max", 5, 0), (group.parent, "500000", 300_000, 100_000)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\nfile {cached}\n")
    assert system.memory(tmp_path) == (500_000, 300_000)


# --- GPUs


def smi(text: str = SMI, tenants: str = "") -> gpus.Smi:
    return gpus.Smi(gpus=gpus.parse_gpus(text), tenants=gpus.parse_tenants(tenants))


def test_the_answer_of_nvidia_smi_is_read_with_what_it_does_not_say() -> None:
    first, second = gpus.parse_gpus(SMI)
    assert (first.uuid, first.total_mib, first.used_mib, first.reasons) == ("8f1c0000-aaaa", 81559, 4, 1)
    assert (second.index, second.temperature, second.max_clock, second.driver) == (1, 35, 1980, "550.54.15")
    (silent,) = gpus.parse_gpus(SILENT)
    assert (silent.used_mib, silent.ecc, silent.reasons, silent.total_mib) == (None, None, None, 15360)
    assert gpus.parse_tenants("GPU-1, 77, /usr/bin/python, 10\n") == (
        gpus.Tenant(uuid="1", pid=77, name="/usr/bin/python", used_mib=10),
    )
    with pytest.raises(ValueError, match="nvidia-smi printed 2 columns, not 11: 0, GPU-1"):
        gpus.parse_gpus("0, GPU-1\n")


def test_idle_gpus_are_fine_and_silent_ones_only_noted() -> None:
    rows = list(gpus.rows(places("a"), [smi()], {}))
    assert bad(rows) == []
    assert one(rows, "GPUs idle").found == "2 GPU(s), at most 4 MiB in use"
    assert one(rows, "GPU temperature").found == "33 °C to 35 °C"
    rows = list(gpus.rows(places("a"), [smi(SILENT)], {}))
    assert one(rows, "GPU clocks").found == "1 GPU(s) do not say whether they are slowed down"
    assert one(rows, "GPU memory errors").found == "not counted on 1 GPU(s)"
    assert bad(rows) == []


@pytest.mark.parametrize(
    ("old", "new", "tenants", "check", "status", "found"),
    [
        (", 4, 35", ", 40210, 35", "GPU-8f1c0000-bbbb, 77, python, 40200", "GPUs idle", Status.failed,
         "GPU 1 (b): python (process 77), 40210 MiB in use"),
        (", 4, 35", ", 2000, 35", "", "GPUs idle", Status.warning,
         "GPU 1 (b): a process that is not seen from here, 2000 MiB in use"),
        (", 4, 35", ", 60000, 35", "", "GPUs idle", Status.failed,
         "GPU 1 (b): a process that is not seen from here, 60000 MiB in use"),
        (", 4, 35", ", 30, 35", "GPU-8f1c0000-bbbb, 8, dcgm, 20", "GPUs idle", Status.warning,
         "GPU 1 (b): dcgm (process 8), 30 MiB in use"),
        ("345, 1980, 0, 550.54.15, 0x0000000000000001\n1", "210, 1980, 0, 550.54.15, 0x0000000000000048\n1", "",
         "GPU clocks", Status.warning, "GPU 0 (b): hardware slowdown, hardware thermal slowdown, 210 of 1980 MHz"),
        ("1980, 0, 550", "1980, 3, 550", "", "GPU memory errors", Status.warning,
         "not correctable: GPU 0 (b): 3, GPU 1 (b): 3"),
        ("550.54.15", "535.1", "", "GPU driver", Status.warning, "differs: 550.54.15 on node a; 535.1 on node b"),
        ("1980, 0", "1755, 0", "", "GPU kind", Status.warning, "81559 MiB, at most 1755 MHz on node b"),
    ],
)  # fmt: skip
def test_a_gpu_that_is_not_as_it_should_be_is_named(
    old: str, new: str, tenants: str, check: str, status: Status, found: str
) -> None:
    assert old in SMI
    rows = list(gpus.rows(places("a", "b"), [smi(), smi(SMI.replace(old, new), tenants)], {}))
    (row,) = bad(rows)
    assert (row.check, row.status) == (check, status)
    assert found in row.found
    assert row.do


def test_gpus_of_other_jobs_on_the_node_are_none_of_our_business() -> None:
    busy = smi(SMI.replace(", 4, 35", ", 40000, 35"))
    assert bad(list(gpus.rows(places("a"), [busy], {"a": {"8f1c0000-aaaa"}}))) == []
    assert bad(list(gpus.rows(places("a"), [busy], {"a": {"8f1c0000-bbbb"}}))) != []


def test_no_nvidia_smi_is_a_warning_only_where_gpus_are_used() -> None:
    assert list(gpus.rows(places("a"), [None], {"a": set()})) == []
    (row,) = gpus.rows(places("a", "b"), [None, None], {"a": {"1"}, "b": set()})
    assert row.status is Status.warning
    assert row.found.startswith("no nvidia-smi on node a: ")


@pytest.mark.parametrize(
    ("script", "error", "count"),
    [
        ('case "$1" in *event*) echo no such field; exit 2 ;; *gpu=*) cat {sample} ;; esac', "", 2),
        ("echo 'No devices were found'; exit 6", "No devices were found", 0),
        ("echo nonsense", "nvidia-smi printed 1 columns, not 11: nonsense", 0),
    ],
)
def test_nvidia_smi_is_asked_by_its_newer_and_then_its_older_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, error: str, count: int
) -> None:
    (tmp_path / "sample").write_text(SMI)
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\n" + script.format(sample=tmp_path / "sample"))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = gpus.look()
    assert found is not None
    assert (found.error, len(found.gpus)) == (error, count)
    failed = [row for row in gpus.rows(places("a"), [found], {}) if row.status is Status.failed]
    assert [row.found for row in failed] == ([f"nvidia-smi fails on a: {error}"] if error else [])


# --- devices

CUDA = devices.Device(kind="cuda", name="NVIDIA H100", uuid="1", total=80 << 30, free=79 << 30, nccl="2.27.3")


def test_two_processes_on_one_gpu_are_named() -> None:
    every = places("a", "a", "b")
    other = CUDA.model_copy(update={"uuid": "2"})
    (row,) = bad(list(devices.rows(every, [CUDA, CUDA, CUDA])))  # the UUID of another node is another GPU
    assert (row.status, row.found) == (Status.failed, "GPU 1 of a is taken by ranks 0, 1")
    assert "CUDA_VISIBLE_DEVICES" in row.do
    rows = list(devices.rows(every, [CUDA, other, CUDA]))
    assert bad(rows) == []
    assert one(rows, "devices").found == "3 GPU(s), one for each process: NVIDIA H100"


def test_a_node_without_gpus_a_full_gpu_and_another_nccl_are_named() -> None:
    every = places("a", "b")
    (row,) = devices.rows(every, [CUDA, devices.Device(kind="cpu")])
    assert (row.status, row.found) == (Status.failed, "torch sees no GPU on node b")
    (row,) = bad(list(devices.rows(every, [CUDA, CUDA.model_copy(update={"free": 8 << 30})])))
    assert (row.status, row.found) == (Status.warning, "only 10% on node b of 80.0 GiB")
    (row,) = bad(list(devices.rows(every, [CUDA, CUDA.model_copy(update={"nccl": "2.21.5"})])))
    assert row.found == "differs: 2.27.3 on node a; 2.21.5 on node b"
    (row,) = devices.rows(every, [devices.Device(kind="cpu")] * 2)
    assert row == Row("devices", Status.note, "no GPU: the processes compute on CPUs")


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(LaunchError, match="process 2 of this node has no GPU: 2 are seen"):
        devices.claim(2)
