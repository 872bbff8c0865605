"""Every delivered accelerate configuration, started as users start it: its engine trains what one process trains."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest
import yaml
from processes import ROOT, close, finish, hashes, record, start

FILES = ROOT / "launch" / "accelerate"
ENGINES = {"cpu": "single", **{name: name for name in ("ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")}}
SEVERAL = tuple(name for name in ENGINES if name != "cpu")
ALONE = ("ddp", "fsdp2", "hsdp", "zero3")  # on one machine zero1 and zero2 differ from zero3 by a digit
pytestmark = pytest.mark.slow


def launch(name: str, run: Path, tiny: Path, *options: object) -> subprocess.Popen[str]:
    """`accelerate launch --config_file NAME.yaml OPTIONS -m foundation train TINY`, into the folder `run`."""
    program = ("-m", "accelerate.commands.launch", "--config_file", f"{FILES / name}.yaml", *map(str, options))
    where = (f"run_root={run.parent}", f"name={run.name}")
    return start("train", tiny, *where, program=(*program, "-m", "foundation"))


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
    code, output = finish(launch("cpu", tmp_path / "one", finished.parents[1] / "tiny.yaml"))
    assert code == 0, output
    assert "engine: single, 1 process(es) on cpu" in output
    assert record(tmp_path / "one") == record(finished)


@pytest.mark.parametrize("name", ALONE)
def test_one_machine_trains_with_the_engine_of_the_file(name: str, tmp_path: Path, finished: Path) -> None:
    options = ("--num_processes", 2, "--main_process_port", 0)
    code, output = finish(launch(name, tmp_path / "one", finished.parents[1] / "tiny.yaml", *options))
    assert code == 0, output
    assert f"engine: {ENGINES[name]}, 2 process(es)" in output
    same_run(tmp_path / "one", finished)


@pytest.mark.parametrize("name", SEVERAL)
def test_two_machines_train_with_the_engine_of_the_file(name: str, tmp_path: Path, finished: Path) -> None:
    processes = 4 if name == "hsdp" else 2  # two replicas of two pieces each
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--num_processes", processes, "--num_machines", 2)
    options += ("--main_process_ip", "127.0.0.1", "--main_process_port", port, "--machine_rank")
    tiny = finished.parents[1] / "tiny.yaml"
    machines = [launch(name, tmp_path / "two", tiny, *options, rank) for rank in (0, 1)]
    ended = [finish(machine) for machine in machines]
    assert [code for code, _ in ended] == [0, 0], ended
    assert f"engine: {ENGINES[name]}, {processes} process(es)" in ended[0][1]
    same_run(tmp_path / "two", finished)
