"""A job script says what was asked for and nothing else; a submission is whole or not there."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import ROOT
from typer.testing import CliRunner

from foundation.config import load
from foundation.errors import ConfigError, LaunchError
from launch import accelerated, cli, freeze
from launch import submit as submission
from launch.cluster import Cluster
from launch.submit import Submission, prepare, render, submit

CLUSTERS = ROOT / "launch" / "slurm"
CONFIG = ROOT / "configs" / "sar-jepa.yaml"
TEXT = st.text(st.characters(exclude_categories=["C", "Z"], include_characters=" "), min_size=1, max_size=20)
SCONTROL = """case "$*" in
    "show hostnames"*) printf 'n1\\nn2\\n' ;;
    *"show node n1") echo "NodeName=n1 NodeAddr=10.0.0.1 Port=1" ;;
    *) exit 1 ;;
esac"""
Stub = Callable[..., Path]


def cluster_file(folder: Path, text: str) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Submission]:
    """`job("nodes: 2", "name=x")`: a submission whose run stands in `tmp_path`."""

    def prepared(text: str = "nodes: 2", *overrides: str, **more: Any) -> Submission:
        given = [f"run_root={tmp_path}", "data.catalog=s3://b/c", *overrides]
        return prepare(CONFIG, cluster_file(tmp_path, text), given, **more)

    return prepared


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    """`stub("sbatch", "echo 7")`: a command of this name, found first; its calls stand in `NAME.calls`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def written(name: str, body: str) -> Path:
        calls = folder / f"{name}.calls"
        (folder / name).write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" >> {calls}; echo >> {calls}\n{body}\n')
        (folder / name).chmod(0o755)
        return calls

    return written


def calls(file: Path) -> list[list[str]]:
    """The arguments of every call of a stub."""
    lines = file.read_text(encoding="utf-8").split("\0\n")[:-1] if file.exists() else []
    return [line.split("\0") for line in lines]


# --- the cluster file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time: '00:03:00'", "time = '00:03:00': more than signal_seconds + 60 s = 180 s"),
        ("launcher: accelerate", "accelerate_config = None: needed by launcher = accelerate"),
        ("accelerate_config: a.yaml", "only read with launcher = accelerate"),
        ("launcher: accelerate\naccelerate_config: a.yaml", "an existing file, relative to"),
        ("extra: [--no-requeue]", "no --no-requeue: `foundation submit` sets it"),
        ("extra: [--output=x]", "no --output: `foundation submit` sets it"),
        ("extra: ['-J x']", "no -J: `foundation submit` sets it"),
        ("extra: [--dependency=afterok:7]", "no --dependency: `foundation submit` sets it"),
        ("extra: [--depend=afterok:7]", "no --depend: `foundation submit` sets it"),
        ("extra: ['-d afterok:7']", "no -d: `foundation submit` sets it"),
        ("extra: [constraint=x]", "options that begin with -, not 'constraint=x'"),
        ("nodes: 7", "7 processes (7 nodes x 1) do not divide the run"),
        ("gpus_per_node: 7", "start 1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30 or 60 processes in all"),
    ],
)
def test_what_cannot_work_is_refused_before_the_queue(job: Callable[..., Submission], text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        job(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.catalog=null", "no data: data.catalog is not set"),
        ("train.engine=single", "engine single, but 2 processes"),
        ("train.float8=true", "float8 does not go with engine ddp"),
        ("train.shard_size=2", "engine ddp has no groups of processes"),
        ("train.micro_batch=100", "start 1 or 3 processes in all"),
    ],
)
def test_a_run_that_cannot_start_is_refused_before_the_queue(
    job: Callable[..., Submission], override: str, message: str
) -> None:
    with pytest.raises((ConfigError, LaunchError)) as caught:
        job("nodes: 2", override)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("accelerate", "message"),
    [
        ("distributed_type: 'NO'", "with NO every machine starts one process, a training of its own"),
        ("distributed_type: MULTI_CPU", "a file with distributed_type MULTI_GPU, FSDP, DEEPSPEED"),
        ("distributed_type: DEEPSPEED", "a file with deepspeed_multinode_launcher: standard"),
        ("distributed_type: FSDP", "set fsdp_version: 2 (accelerate launch declares FSDP version 1)"),
        ("[", "a YAML file that can be read"),
        ("- x", "a YAML file of `accelerate launch`"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 2}", "engine ddp, that of accelerate declares fsdp2"),
    ],
)
def test_an_accelerate_file_that_would_not_start_this_run_is_refused_before_the_queue(
    job: Callable[..., Submission], tmp_path: Path, accelerate: str, message: str
) -> None:
    (tmp_path / "a.yaml").write_text(accelerate)
    with pytest.raises(ConfigError) as caught:
        job("nodes: 2\nlauncher: accelerate\naccelerate_config: a.yaml", "train.engine=ddp")
    assert message in str(caught.value)


def test_the_delivered_accelerate_files_declare_their_names_on_several_nodes() -> None:
    for path in (ROOT / "launch" / "accelerate").glob("*.yaml"):
        if path.stem == "cpu":
            assert accelerated.engine(path, 1, 1) is None
        else:
            assert accelerated.engine(path, 2, 8) == (None if path.stem == "ddp" else path.stem)


def test_a_path_that_slurm_would_rewrite_is_refused(job: Callable[..., Submission]) -> None:
    with pytest.raises(ConfigError, match="Slurm cannot write a log to this path"):
        job("nodes: 2", "run_root=/x/100%")


# --- the job script


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(path=TEXT, word=TEXT, value=TEXT)
def test_every_value_reaches_its_command_as_it_was_given(
    tmp_path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch, path: str, word: str, value: str
) -> None:
    stub("scontrol", SCONTROL)
    stub("sleep", "")
    stub("host", "")
    srun = stub("srun", f'printf %s "$VALUE" > {tmp_path}/value')
    srun.unlink(missing_ok=True)
    config = prepare(CONFIG, CLUSTERS / "cpu.yaml", ["name=n", "data.catalog=x"]).config.model_copy(
        update={"run_root": path}
    )
    more = {"VALUE": value}
    cluster = Cluster(nodes=2, python=word, env=more, container=(word,), srun_args=(f"--x={word}",), host_python="host")
    run = Submission(config, cluster, {}, cwd=tmp_path / "w d")
    environ = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    done = subprocess.run(["bash"], input=render(run, run.next_folder()), text=True, env=environ, check=False)
    assert done.returncode == 0
    assert (tmp_path / "value").read_text(encoding="utf-8") == value
    (arguments,) = calls(srun)
    assert f"--x={word}" in arguments
    assert arguments[arguments.index("task") + 1 :] == [
        *(word, word, "-m", "launch.node", "torchrun", "--nnodes=2", "--nproc-per-node=1"),
        *("--signals-to-handle=SIGINT", "--rdzv-backend=static", "--master-addr=10.0.0.1", "--master-port=15007"),
        *("-m", "foundation", "train", f"{run.next_folder()}/config.yaml"),
    ]


@given(text=TEXT)
def test_a_quoted_option_of_sbatch_is_one_word(text: str) -> None:
    assert shlex.split(f"--output={submission._quoted(text)}") == [f"--output={text}"]


def test_a_name_that_the_template_does_not_get_is_an_error(
    job: Callable[..., Submission], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.sbatch.j2").write_text("{{ run }} {{ typo }}")
    monkeypatch.setattr(submission, "TEMPLATES", tmp_path)
    with pytest.raises(jinja2.UndefinedError, match="'typo' is undefined"):
        render(job(), tmp_path)


@pytest.mark.parametrize(
    ("srun", "ended", "status"),
    [
        ("exit 0", ["--status", "0"], 0),
        ('touch "$FOUNDATION_STOPPED"', ["--status", "85"], 0),
        ('[ "$3" = --overlap ] || [ "$1" = --overlap ] || exit 3', ["--status", "3"], 0),
        ("exit 1", ["--status", "1", "--lost"], 0),
    ],
)
def test_the_script_tells_the_chain_how_the_step_ended(
    job: Callable[..., Submission], tmp_path: Path, stub: Stub, srun: str, ended: list[str], status: int
) -> None:
    for name, body in (("scontrol", SCONTROL), ("sleep", ""), ("srun", srun)):
        stub(name, body)
    told = stub("host", "")
    run = job("nodes: 2\nhost_python: host")
    (folder := run.next_folder()).mkdir(parents=True)
    environ = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    done = subprocess.run(["bash"], input=render(run, folder), text=True, env=environ, check=False)
    assert done.returncode == status
    here = ["--run", str(run.run), "--job", "7"]
    assert [call[2:] for call in calls(told)] == [["begin", *here], ["end", *here, *ended]]


def python_of_the_host(minor: int) -> str:
    """A Python 3.MINOR; without one the test is skipped."""
    pyenv = sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python3"))
    for path in (shutil.which(f"python3.{minor}"), *pyenv):
        asks = f"import sys; sys.exit(sys.version_info[:2] != (3, {minor}))"
        if path and not subprocess.run([path, "-c", asks], capture_output=True, check=False).returncode:
            return str(path)
    pytest.skip(f"no Python 3.{minor} here")


@pytest.mark.parametrize("minor", range(6, 14))
def test_any_python_of_the_host_asks_the_frozen_chain_whatever_surrounds_it(
    job: Callable[..., Submission], tmp_path: Path, stub: Stub, minor: int
) -> None:
    here = "*'show job 7') printf 'JobId=7 JobState=RUNNING Comment=\\xfc' ;; 'requeue 7') ;; *) exit 1"
    asked = stub("scontrol", SCONTROL.replace("*) exit 1", here))
    stub("sleep", "")
    stub("srun", 'touch "$FOUNDATION_STOPPED"')
    edited, module = tmp_path / "edited" / "launch", tmp_path / "module" / "json.py"
    for file in (edited / "__init__.py", edited / "chain.py", module):  # a checkout, and a package of another Python
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text("raise SystemExit('not the frozen code')")
    run = job(f"nodes: 2\nhost_python: {python_of_the_host(minor)}", "name=ü")
    freeze.freeze((folder := run.next_folder()) / "code")
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    environ = {**os.environ, **slurm, "LC_ALL": "C", "PYTHONPATH": str(module.parent)}
    done = subprocess.run(
        ["bash"], input=render(run, folder).encode(), cwd=edited.parent, env=environ, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    told = json.loads((run.run / "chain.json").read_text())["history"]
    assert [line.partition(": ")[2] for line in told] == [
        "start at 0 samples: attempt 1",
        "requeue at 0 samples: stopped on request",
    ]
    assert calls(asked)[-1] == ["requeue", "7"]


@pytest.mark.parametrize(
    ("scontrol", "message"),
    [
        ("exit 1", "Slurm names 0 nodes, not 2: n[1-2]"),
        ('[ "$2" = hostnames ] && printf "n1\\nn2\\n"', "the address of n1 is unknown; see: scontrol show node n1"),
    ],
)
def test_without_an_address_of_the_head_nothing_starts(
    job: Callable[..., Submission], stub: Stub, scontrol: str, message: str
) -> None:
    stub("scontrol", scontrol)
    started = stub("srun", "")
    stub("host", '[ "$3" = begin ]')
    run = job("nodes: 2\nhost_python: host")
    environ = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    done = subprocess.run(
        ["bash"], input=render(run, run.next_folder()), text=True, env=environ, capture_output=True, check=False
    )
    assert done.returncode == 1
    assert f"foundation: {message}" in done.stderr
    assert calls(started) == []


def test_accelerate_gets_its_own_words(job: Callable[..., Submission], tmp_path: Path) -> None:
    (tmp_path / "fsdp.yaml").write_text("distributed_type: FSDP\nfsdp_config: {fsdp_version: 2}\n")
    run = job("nodes: 2\ngpus_per_node: 2\nlauncher: accelerate\naccelerate_config: fsdp.yaml")
    script = render(run, run.next_folder())
    assert f"accelerate --config_file={run.next_folder()}/accelerate.yaml --num_machines=2 --num_processes=4" in script
    assert '--rdzv_backend=static --main_process_ip="$address" --main_process_port="$port"' in script
    assert "torchrun" not in script
    assert '#SBATCH --gpus-per-node="2"' in script


def test_an_evaluation_is_one_task_for_each_checkpoint_and_protocol(
    job: Callable[..., Submission], tmp_path: Path, stub: Stub
) -> None:
    with pytest.raises(LaunchError, match="no checkpoint to evaluate"):
        job("nodes: 2", data="s3://b/c")
    for name in ("000000000100/COMMIT", "000000000200/COMMIT", "000000000300/half"):
        file = tmp_path / "sar-jepa" / "checkpoints" / f"samples-{name}"
        file.parent.mkdir(parents=True)
        file.touch()
    run = job("python: interpreter", data="s3://b/c d", protocols=["knn", "linear"])
    script = render(run, run.next_folder())
    assert '#SBATCH --array="0-3%1"' in script
    called = stub("interpreter", "")
    subprocess.run(["bash"], input=script, text=True, env={**os.environ, "SLURM_ARRAY_TASK_ID": "2"}, check=True)
    checkpoint = str(tmp_path / "sar-jepa" / "checkpoints" / "samples-000000000200")
    words = ["-m", "foundation", "evaluate", checkpoint, "--protocol", "knn", "--data", "s3://b/c d"]
    assert calls(called) == [[*words, "--device", "cpu"]]


def test_the_key_of_a_signed_url_is_not_written_into_a_job_script(job: Callable[..., Submission]) -> None:
    with pytest.raises(LaunchError, match=r"not written into a job script[\s\S]*evaluate http://h/c\?\*\*\*") as caught:
        job("nodes: 2", data="http://h/c?sv=2024&sig=S3CR3T")
    assert "S3CR3T" not in str(caught.value)


def test_an_evaluation_of_checkpoints_elsewhere_is_refused_with_what_to_do_instead(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"name: a\nrun_root: {tmp_path}\ntrain: {{checkpoints: 's3://bucket/a'}}\n")
    (tmp_path / "cluster.yaml").write_text("nodes: 1\n")
    with pytest.raises(LaunchError, match=r"not in the run folder[\s\S]*s3://bucket/a[\s\S]*foundation evaluate"):
        prepare(tmp_path / "run.yaml", tmp_path / "cluster.yaml", (), "corpus")


# --- submitting


def test_a_dry_run_shows_the_script_and_writes_nothing(job: Callable[..., Submission], tmp_path: Path) -> None:
    run = job()
    before = sorted(tmp_path.rglob("*"))
    app = typer.Typer()
    app.command()(cli.submit)
    arguments = [CONFIG, f"run_root={tmp_path}", "data.catalog=gone", "--cluster", tmp_path / "cluster.yaml"]
    result = CliRunner().invoke(app, [*map(str, arguments), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert result.stdout == render(run, run.next_folder())
    assert result.stderr == "warning: gone does not exist here; without it on the nodes the job fails\n"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_submission_freezes_code_and_configuration(
    job: Callable[..., Submission], tmp_path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub("squeue", "")
    sent = stub("sbatch", "echo '42;main'")
    run = job("nodes: 2", "seed=5")
    number, folder = submit(run)
    assert (number, folder) == ("42", tmp_path / "sar-jepa" / "submit-001")
    assert calls(sent) == [["--parsable", str(folder / "job.sbatch")]]
    assert (folder / "job.sbatch").read_text() == render(run, folder)
    assert load(folder / "config.yaml") == run.config
    record = json.loads((folder / "submission.json").read_text())
    assert (record["job"], record["overrides"]) == ("42", [f"run_root={tmp_path}", "data.catalog=s3://b/c", "seed=5"])
    assert {"commit", "dirty", "config", "cluster"} <= record.keys()
    assert submit(run)[1].name == "submit-002"
    # A process that starts in the checkout imports the frozen code.
    environ = {**os.environ, "PYTHONPATH": str(folder / "code"), "PYTHONSAFEPATH": "1"}
    code = "import foundation, shards, kernels, launch; print(foundation.__file__, launch.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.stdout.split() == [str(folder / "code" / name / "__init__.py") for name in ("foundation", "launch")]


@pytest.mark.parametrize(
    ("squeue", "sbatch", "message"),
    [
        ("echo '41 PENDING'", "echo 42", "this run is in the queue already: job 41 PENDING"),
        ("", "echo 'invalid account' >&2; exit 1", "sbatch refused: invalid account"),
        ("echo no controller >&2; exit 1", "echo 42", "squeue refused: no controller"),
    ],
)
def test_a_refused_submission_leaves_nothing_behind(
    job: Callable[..., Submission], stub: Stub, squeue: str, sbatch: str, message: str
) -> None:
    stub("squeue", squeue)
    stub("sbatch", sbatch)
    run = job()
    with pytest.raises(LaunchError) as caught:
        submit(run)
    assert message in str(caught.value)
    assert list(run.run.glob("*")) == []


def test_without_slurm_a_submission_says_so(job: Callable[..., Submission], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(LaunchError, match="there is no squeue here"):
        submit(job())


def test_the_job_name_tells_run_folders_apart(job: Callable[..., Submission]) -> None:
    one, two = job(), job("nodes: 2", "run_root=/elsewhere")
    assert one.name != two.name
    assert one.name.startswith("sar-jepa-")
