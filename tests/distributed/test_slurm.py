"""A run on a real Slurm cluster of two nodes: preempted, bereft of a node, cancelled, and never started in vain."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT, TINY, record, same_state
from processes import position as trained
from slurm_cluster import SlurmCluster, missing

from foundation.cli_compare import array_command
from foundation.comparing.cells import finished
from foundation.comparing.plan import load
from launch.submit import Submission, prepare, submit

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing() or "-")]
STAND_IN = Path(__file__).with_name("stand_in.py")
CARELESS = """it's a "run" $HOME"""  # a folder that a careless script would trip over
LENGTH = 640  # samples of the training: time to disturb it
Prepare = Callable[..., Submission]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    with pytest.MonkeyPatch.context() as patch:
        try:
            cluster.start()
            for name in ("PATH", "SLURM_CONF"):
                patch.setenv(name, cluster.environment[name])
            yield cluster
        finally:
            cluster.stop()
            assert cluster.leftovers() == []


@pytest.fixture
def job(tmp_path: Path) -> Prepare:
    """`job(samples, mode)`: the stand-in, which starts in a tenth of the time of a trainer."""

    def prepared(samples: int, mode: str = "", more: str = "") -> Submission:
        root = tmp_path / CARELESS
        root.mkdir()
        (root / "run.yaml").write_text(TINY.format(root=tmp_path, catalog=tmp_path))
        env = f"env: {{STAND_IN: {mode}}}" if mode else ""
        (root / "accelerate.yaml").write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\n")
        (root / "cluster.yaml").write_text(f"nodes: 2\ntime: '00:10:00'\nmem: 100M\n{env}\n{more}")
        config = (f"run_root={json.dumps(str(root))}", f"train.samples={samples}")
        return replace(prepare(root / "run.yaml", root / "cluster.yaml", config), program=(str(STAND_IN),))

    return prepared


def started(cluster: SlurmCluster, job: str, run: Path, attempt: int = 0) -> None:
    """Wait until both ranks of an attempt listen."""
    ranks = [run / f"attempt-{attempt}" / f"started-{rank}" for rank in (0, 1)]
    cluster.until(f"attempt {attempt} runs", lambda: all(rank.exists() for rank in ranks), 60, job)


def history(run: Path) -> list[str]:
    """What the chain decided, without the time."""
    return [line.partition(": ")[2] for line in json.loads((run / "chain.json").read_text())["history"]]


def position(run: Path) -> int:
    return max(int(file.parent.name[8:]) for file in (run / "checkpoints").glob("samples-*/COMMIT"))


def test_a_training_that_is_preempted_and_loses_a_node_ends_with_the_bits_of_an_undisturbed_one(
    cluster: SlurmCluster, tmp_path: Path, catalog: Path, command: Callable[..., Any]
) -> None:
    root = tmp_path / CARELESS
    root.mkdir()
    (root / "run.yaml").write_text(TINY.format(root=root, catalog=catalog))
    files = f"launcher: accelerate\naccelerate_config: {ROOT / 'launch' / 'accelerate' / 'fsdp2.yaml'}\n"
    (root / "cluster.yaml").write_text(f"nodes: 2\ntime: '00:20:00'\nenv: {{OMP_NUM_THREADS: 1}}\n{files}")
    length = (f"train.samples={LENGTH}", f"train.checkpoint_every={LENGTH // 4}")

    def send(name: str) -> tuple[int, str, str]:
        where = ("--cluster", root / "cluster.yaml", f"name={name}", f"run_root={json.dumps(str(root))}")
        return command("submit", root / "run.yaml", *where, *length)

    def sent(name: str) -> str:
        code, out, err = send(name)
        assert code == 0, err
        return dict(line.split(maxsplit=1) for line in out.splitlines())["job"]

    whole, run = sent("whole"), root / "disturbed"
    assert cluster.wait(whole, ("COMPLETED", "FAILED"), 240) == "COMPLETED", cluster.log(whole)
    assert "engine: fsdp2, 2 process(es) on cpu" in cluster.log(whole)
    number = sent("disturbed")
    assert f"LaunchError: this run is in the queue already: job {number} " in send("disturbed")[2]
    cluster.until("it trains", lambda: trained(run) >= LENGTH // 10, 240, number)
    cluster.run("scancel", "--batch", "--signal=USR2", number)
    cluster.start_now(number, 120)
    saved = position(run)
    assert trained(run) == saved < LENGTH
    cluster.until("it trains again", lambda: trained(run) > saved, 240, number)
    cluster.kill_node("n2")
    cluster.revive_node("n2")
    cluster.start_now(number, 120)
    kept = position(run)
    assert cluster.wait(number, ("COMPLETED", "FAILED"), 240) == "COMPLETED", cluster.log(number)
    told = history(run)
    assert told[1] == f"requeue at {saved} samples: stopped on request"
    starts = [line for line in told if line.startswith("start")]  # Slurm or the chain: either may see the loss first
    assert starts == [f"start at {at} samples: attempt {n}" for n, at in enumerate((0, saved, kept), start=1)]
    assert told[-1] == f"done at {LENGTH} samples: finished"
    assert cluster.show(number)["Restarts"] == "2"
    assert len(record(run)) == LENGTH // 8
    assert record(run) == record(root / "whole")
    assert same_state(run, root / "whole")
    left = {"code", "config.yaml", "job.sbatch", "submission.json", "accelerate.yaml", f"job-{number}.log"}
    assert {file.name for file in (run / "submit-001").iterdir()} == left
    assert not (run / "stop").exists()


def test_the_runs_of_a_comparison_are_an_array_whose_tasks_save_and_come_back(
    cluster: SlurmCluster, tmp_path: Path, catalog: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(TINY.format(root=tmp_path, catalog=catalog))
    (tmp_path / "pair.yaml").write_text(
        "name: pair\nconfig: run.yaml\nseeds: [0]\nevaluate: {protocols: [knn]}\n"
        "rows: [{name: A}, {name: B, overrides: [objective.name=lomar-sar]}]\n"
    )
    length = f"train.samples={LENGTH}"
    compare = shlex.join([sys.executable, "-m", "foundation", "compare", "pair.yaml", length])
    words = shlex.split(array_command(compare, 2))
    job = cluster.run(*words, "--parsable", "--time=00:20:00", f"--output={tmp_path}/%a.log").strip()
    run = tmp_path / "runs" / "pair" / "b-seed0"
    cluster.until("it trains", lambda: trained(run) >= LENGTH // 10, 240)
    # By the array and the index: one of the tasks has the number of the array, which names them all.
    cluster.run("scancel", "--signal=USR2", f"{job}_1")
    cluster.start_now(f"{job}_1", 120)
    assert trained(run) == position(run) < LENGTH
    for task in range(2):
        state = cluster.wait(f"{job}_{task}", ("COMPLETED", "FAILED"), 240)
        assert state == "COMPLETED", (tmp_path / f"{task}.log").read_text()
    assert [cluster.show(f"{job}_{task}")["Restarts"] for task in range(2)] == ["0", "1"]
    found = load(tmp_path / "pair.yaml", [length])
    assert all(finished(found, cell) for cell in found.cells)
    assert trained(run) == LENGTH


def test_a_run_that_makes_no_progress_is_started_twice_and_not_again(cluster: SlurmCluster, job: Prepare) -> None:
    run = job(100, "stuck", "launcher: accelerate\naccelerate_config: accelerate.yaml")
    number, _ = submit(run)
    cluster.start_now(number)
    assert cluster.wait(number, ("COMPLETED", "FAILED")) == "FAILED"
    assert history(run.run)[-1] == "stop at 0 samples: stopped on request; 2 attempts without progress"
    assert cluster.show(number)["Restarts"] == "1"


def test_a_run_that_fails_is_not_started_again_and_its_exit_code_is_that_of_the_job(
    cluster: SlurmCluster, job: Prepare
) -> None:
    run = job(100, "fail")
    number, _ = submit(run)
    assert cluster.wait(number, ("COMPLETED", "FAILED")) == "FAILED"
    assert cluster.show(number)["ExitCode"] == "3:0"
    assert history(run.run) == ["start at 0 samples: attempt 1", "failed at 0 samples: exit status 3"]


def test_a_job_script_that_is_sent_again_waits_for_the_chain_that_is_on(cluster: SlurmCluster, job: Prepare) -> None:
    run = job(300)
    number, folder = submit(run)
    started(cluster, number, run.run)
    again = cluster.sbatch(folder / "job.sbatch")
    cluster.until("the second waits", lambda: cluster.show(again)["Reason"] == "Dependency", 60, again)
    cluster.run("scancel", "--batch", "--signal=USR2", number)
    cluster.start_now(number)
    assert cluster.state(again) == "PENDING"
    assert cluster.wait(number, ("COMPLETED", "FAILED")) == "COMPLETED", cluster.log(number)
    assert cluster.wait(again, ("COMPLETED", "FAILED")) == "COMPLETED", cluster.log(again)
    saved = int(history(run.run)[1].split()[2])
    assert history(run.run) == [
        "start at 0 samples: attempt 1",
        f"requeue at {saved} samples: stopped on request",
        f"start at {saved} samples: attempt 2",
        "done at 300 samples: finished",
        "start at 300 samples: attempt 1",
        "done at 300 samples: finished",
    ]


def test_a_second_job_that_does_not_wait_ends_and_leaves_the_chain_alone(cluster: SlurmCluster, job: Prepare) -> None:
    run = job(1000)
    number, folder = submit(run)
    started(cluster, number, run.run)
    again = cluster.sbatch(folder / "job.sbatch", f"--dependency=after:{number}")
    assert cluster.wait(again, ("COMPLETED", "FAILED")) == "FAILED"
    assert f"chain: not started: job {number} trains " in cluster.log(again)
    cluster.run("scancel", "--batch", "--signal=USR2", number)
    assert cluster.wait(number, ("PENDING", "COMPLETED", "FAILED")) == "PENDING", cluster.log(number)
    cluster.run("scancel", number)
    assert history(run.run) == [
        "start at 0 samples: attempt 1",
        f"requeue at {position(run.run)} samples: stopped on request",
    ]


def test_a_cancelled_run_stays_cancelled(cluster: SlurmCluster, job: Prepare) -> None:
    run = job(1000)
    number, _ = submit(run)
    started(cluster, number, run.run)
    cluster.run("scancel", number)
    cluster.wait(number, ("CANCELLED", "PENDING"))
    assert cluster.state(number) == "CANCELLED"
    assert cluster.show(number)["Restarts"] == "0"


def test_a_run_that_may_not_be_requeued_saves_and_stays_away(cluster: SlurmCluster, job: Prepare) -> None:
    run = job(1000)
    number, _ = submit(run)
    started(cluster, number, run.run)
    cluster.run("scontrol", "update", f"JobId={number}", "Requeue=0")
    cluster.run("scancel", "--batch", "--signal=USR2", number)
    assert cluster.wait(number, ("COMPLETED", "FAILED", "PENDING")) == "FAILED"
    assert cluster.show(number)["ExitCode"] == "85:0"
    assert position(run.run) > 0
    assert history(run.run)[-1].startswith("not requeued here: ")


def test_a_run_goes_on_after_the_node_of_its_batch_script_has_died(cluster: SlurmCluster, job: Prepare) -> None:
    run = job(60)
    number, _ = submit(run)
    (run.run / "hold").touch()  # the node dies while it trains, however late
    started(cluster, number, run.run)
    cluster.kill_node("n1")
    (run.run / "hold").unlink()
    cluster.revive_node("n1")
    cluster.start_now(number)  # nobody is left to ask for it: Slurm requeues it by itself
    assert cluster.wait(number, ("COMPLETED", "FAILED")) == "COMPLETED"
    for rank, node in enumerate(("n1", "n2")):  # ranks follow the nodes
        assert cluster.log(number).count(f"rank {rank} of 2 on {node}: from 0 ") == 2
    assert history(run.run) == [
        "start at 0 samples: attempt 1",
        "start at 0 samples: attempt 2",
        "done at 60 samples: finished",
    ]


def test_a_failure_that_a_dead_node_caused_is_not_final(cluster: SlurmCluster, job: Prepare) -> None:
    run = job(60)
    number, _ = submit(run)
    (run.run / "hold").touch()
    started(cluster, number, run.run)
    cluster.kill_node("n2")
    (run.run / "die").touch()  # rank 0 sees the loss before Slurm does
    cluster.until("the chain has decided", lambda: len(history(run.run)) > 1, 90, number)
    assert history(run.run)[1] == "requeue at 0 samples: a node is lost"
    (run.run / "die").unlink()
    (run.run / "hold").unlink()
    cluster.revive_node("n2")
    cluster.start_now(number)
    assert cluster.wait(number, ("COMPLETED", "FAILED")) == "COMPLETED"
