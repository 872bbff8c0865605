"""Every delivered accelerate configuration, started as users start it: its engine trains what one process trains."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import accelerate.commands.launch as accelerate
import pytest
import yaml
from groups import Job, together
from processes import ROOT, close, finish, hashes, record, start

FILES = ROOT / "launch" / "accelerate"
ENGINES = {"cpu": "single", **{name: name for name in ("ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")}}
SEVERAL = tuple(name for name in ENGINES if name != "cpu")
ALONE = ("ddp", "fsdp2", "hsdp", "zero3")  # on one machine zero1 and zero2 differ from zero3 by a digit
pytestmark = pytest.mark.slow


def options(name: str, run: Path, tiny: Path, *more: object, module: str = "unreported") -> tuple[str, ...]:
    """What follows `accelerate launch`: `--config_file NAME.yaml MORE -m MODULE train TINY`, into the folder `run`."""
    words = ("--config_file", f"{FILES / name}.yaml", *more, "-m", module, "train", tiny)
    return (*map(str, words), f"run_root={run.parent}", f"name={run.name}")


def machine(*words: str) -> None:
    """`accelerate launch WORDS`."""
    sys.argv = ["accelerate launch", *words]
    accelerate.main()


def launched(*machines: tuple[str, ...]) -> tuple[int, str]:
    """Exit status and output of a launcher on each of these machines."""
    path = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    return together([Job(machine, words, path) for words in machines], 300)


def same_run(run: Path, finished: Path) -> None:
    """Samples are equal, and numbers nearly, at every line."""
    assert hashes(run) == hashes(finished)
    close(run, finished)


def test_each_file_has_its_test_and_decides_nothing_but_the_engine() -> None:
    assert {path.stem for path in FILES.iterdir()} == set(ENGINES)
    chosen = {"fsdp_version", "fsdp_sharding_strategy", "zero_stage", "deepspeed_multinode_launcher"}
    for name in ENGINES:
        tree = yaml.safe_load((FILES / f"{name}.yaml").read_text(encoding="utf-8"))
        sections = {key: tree.pop(key) for key in ("fsdp_config", "deepspeed_config") if key in tree}
        assert {key for section in sections.values() for key in section} <= chosen
        plain = {"compute_environment", "distributed_type", "use_cpu", "rdzv_backend"}
        assert set(tree) == (plain - {"rdzv_backend"} | {"num_processes"} if name == "cpu" else plain)


def test_the_file_for_a_cpu_trains_as_without_a_launcher(tmp_path: Path, finished: Path) -> None:
    words = options("cpu", tmp_path / "one", finished.parents[1] / "tiny.yaml", module="foundation")
    code, output = finish(start(*words, program=("-m", "accelerate.commands.launch")))
    assert code == 0, output
    assert "engine: single, 1 process(es) on cpu" in output
    assert record(tmp_path / "one") == record(finished)


@pytest.mark.parametrize("name", ALONE)
def test_one_machine_trains_with_the_engine_of_the_file(name: str, tmp_path: Path, finished: Path) -> None:
    more = ("--num_processes", 2, "--main_process_port", 0)
    code, output = launched(options(name, tmp_path / "one", finished.parents[1] / "tiny.yaml", *more))
    assert code == 0, output
    assert f"engine: {ENGINES[name]}, 2 process(es)" in output
    same_run(tmp_path / "one", finished)


@pytest.mark.parametrize("name", SEVERAL)
def test_two_machines_train_with_the_engine_of_the_file(name: str, tmp_path: Path, finished: Path) -> None:
    processes = 4 if name == "hsdp" else 2  # two replicas of two pieces each
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    more = ("--num_processes", processes, "--num_machines", 2)
    more += ("--main_process_ip", "127.0.0.1", "--main_process_port", port, "--machine_rank")
    tiny = finished.parents[1] / "tiny.yaml"
    code, output = launched(*(options(name, tmp_path / "two", tiny, *more, rank) for rank in (0, 1)))
    assert code == 0, output
    assert f"engine: {ENGINES[name]}, {processes} process(es)" in output
    same_run(tmp_path / "two", finished)
