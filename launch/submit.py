"""Send a run to Slurm: check everything, freeze code and configuration beside it, write the job script, `sbatch` it.

RUN_FOLDER/submit-001/   code/   config.yaml   job.sbatch   submission.json   job-1234.log
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foundation.config import Config, load, resolved_yaml
from foundation.errors import ConfigError, LaunchError, StorageError
from foundation.files import write_whole
from foundation.training.refusals import meant, refusals
from launch.chain import STOPPED
from launch.cluster import Cluster, load_cluster
from launch.freeze import freeze
from shards.redaction import tells

TEMPLATES = Path(__file__).with_name("slurm")
PROGRAM = ("-m", "foundation", "train")
PATIENCE = 300
"""Seconds the other nodes get to end once the first has ended well."""


class Verbatim(str):
    """Text that the template writes as it is; everything else is quoted for the shell."""


@dataclass(frozen=True)
class Submission:
    """One job: what it runs, where it stands, and on what."""

    config: Config
    cluster: Cluster
    origin: Mapping[str, Any]
    """What was asked for: the file, its overrides, the cluster file."""
    program: tuple[str, ...] = PROGRAM
    data: str | None = None
    """Catalog of an evaluation; None: a training run."""
    tasks: tuple[tuple[str, str], ...] = ()
    """(checkpoint, protocol) of each task of the evaluation."""
    cwd: Path = field(default_factory=Path.cwd)
    """Folder that relative paths of the configuration start from."""

    @property
    def run(self) -> Path:
        """The run folder, absolute."""
        return self.cwd / self.config.run_folder

    @property
    def name(self) -> str:
        """The job name: one for each run folder, so that a running submission is found."""
        mark = hashlib.sha256(str(self.run).encode()).hexdigest()[:6]
        return f"{self.config.name}-{mark}" + ("-evaluate" if self.tasks else "")

    def next_folder(self) -> Path:
        """The next free `submit-NNN` of the run."""
        taken = [int(p.name[7:]) for p in self.run.glob("submit-*") if p.name[7:].isdecimal()]
        return self.run / f"submit-{max(taken, default=0) + 1:03d}"


def prepare(
    config: Path, cluster: Path, overrides: Sequence[str] = (), data: str | None = None, protocols: Sequence[str] = ()
) -> Submission:
    """Read and check both files. Raises ConfigError or LaunchError when nothing could start, or nothing be scored."""
    loaded, where = load(config, overrides), load_cluster(cluster)
    origin = {"config": str(config), "overrides": list(overrides), "cluster": str(cluster)}
    submission = Submission(loaded, where, origin, data=data)
    if any(not character.isprintable() or character == "%" for character in str(submission.run)):
        raise ConfigError("Slurm cannot write a log to this path", where=repr(str(submission.run)), do="rename it")
    if data is None:
        _check_world(loaded, where)
        return submission
    if tells(data):
        raise LaunchError(
            "a URL with a user name, a password or a query is not written into a job script, which others can read",
            where=f"--evaluate {data}",
            do="take credentials from the environment, or foundation evaluate RUN --data URL on a node",
        )
    if loaded.train.checkpoints:
        raise LaunchError(
            "checkpoints that are not in the run folder cannot be evaluated this way",
            where=f"train.checkpoints = {loaded.train.checkpoints}",
            do=f"foundation evaluate {submission.run} scores the newest one",
        )
    checkpoints = sorted(marker.parent for marker in (submission.run / "checkpoints").glob("samples-*/COMMIT"))
    tasks = tuple((str(checkpoint), protocol) for checkpoint in checkpoints for protocol in protocols or ("linear",))
    if not tasks:
        raise LaunchError("the run has no checkpoint to evaluate", where=str(submission.run), do="train it first")
    return Submission(loaded, where, origin, data=data, tasks=tasks)


def unseen(submission: Submission) -> list[str]:
    """Folders of catalogs that do not exist here; the nodes may see more."""
    named = submission.config.data.catalog if submission.data is None else (submission.data,)
    return [path for path in named if "://" not in path and not (submission.cwd / path).exists()]


def _check_world(config: Config, cluster: Cluster) -> None:
    """What the trainer would refuse on the nodes is refused before the queue. Raises ConfigError or LaunchError."""
    world, lanes, batch = cluster.nodes * cluster.processes, config.data.lanes, config.train.global_batch
    micro, engine = config.train.micro_batch, config.train.engine
    if lanes % world or batch // world % (micro or 1):
        fitting = [str(n) for n in range(1, lanes + 1) if lanes % n == 0 and batch // n % (micro or 1) == 0]
        raise ConfigError(
            f"{world} processes ({cluster.nodes} nodes x {cluster.processes}) do not divide the run",
            where=f"data.lanes = {lanes}, train.global_batch = {batch}, train.micro_batch = {micro}",
            do=f"start {_some(fitting)} processes in all (nodes, processes_per_node), or change these keys",
        )
    if not config.data.catalog:
        raise ConfigError("no data: data.catalog is not set", where="data.catalog", do="add data.catalog=PATH")
    if cluster.engine and engine not in ("auto", cluster.engine):
        raise ConfigError(
            f"the configuration says engine {engine}, that of accelerate declares {cluster.engine}",
            where=f"train.engine, {cluster.accelerate_config}",
            do="use train.engine=auto, or the file for this engine in launch/accelerate",
        )
    for refusal in refusals(config, meant(cluster.engine or engine, world), world, cluster.processes):
        raise refusal


def _some(words: Sequence[str]) -> str:
    """`1, 2, 4 or 8`, shortened in the middle when there are many."""
    words = words if len(words) <= 12 else [*words[:8], "...", *words[-3:]]
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def render(submission: Submission, folder: Path) -> str:
    """The job script. Every value is quoted unless it is Verbatim; a name the template lacks is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(  # noqa: S701 - for a shell: `finalize` quotes
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, (Verbatim, StrictUndefined)) else shlex.quote(str(value)),
        comment_start_string="<#",  # the default is how bash writes a length
        comment_end_string="#>",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    cluster, python = submission.cluster, submission.cluster.interpreter
    values = {
        "directives": [Verbatim(line) for line in _directives(submission, folder)],
        "env": sorted(cluster.env.items()),
        "setup": [Verbatim(line) for line in cluster.setup],
        "run": submission.run,
        "folder": folder,
        "container": _words(cluster.container),
        "python": python,
        "host_python": cluster.host_python or python,
    }
    if submission.tasks:
        device = "cuda" if cluster.gpus_per_node else "cpu"
        values |= {"tasks": submission.tasks, "data": submission.data, "device": device}
        return environment.get_template("evaluate.sbatch.j2").render(values)
    values |= {
        "count": cluster.nodes,
        "processes": cluster.processes,
        "cpus": cluster.cpus_per_task,
        "patience": PATIENCE,
        "stopped": STOPPED,
        "srun_args": _words(cluster.srun_args),
        "accelerate_config": folder / "accelerate.yaml" if cluster.accelerate_config else None,
        "program": _words(submission.program),
    }
    return environment.get_template("train.sbatch.j2").render(values)


def _words(words: Sequence[str]) -> Verbatim:
    return Verbatim("".join(f"{shlex.quote(word)} " for word in words))


def _directives(submission: Submission, folder: Path) -> list[str]:
    """Options of sbatch, quoted by its own rule: a backslash counts inside quotes of both kinds."""
    cluster, tasks = submission.cluster, len(submission.tasks)
    log = folder / ("job-%A-%a.log" if tasks else "job-%j.log")
    options: dict[str, object] = {
        "job-name": submission.name,
        "chdir": submission.cwd,
        "output": log,
        "open-mode": "append",
        "partition": cluster.partition,
        "account": cluster.account,
        "nodes": 1 if tasks else cluster.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": min(cluster.gpus_per_node, 1) if tasks else cluster.gpus_per_node or None,
        "cpus-per-task": cluster.cpus_per_task,
        "mem": cluster.mem,
        "time": cluster.time,
    }
    if tasks:
        # One at a time: each adds its scores to the one scores.json of the run.
        options |= {"array": f"0-{tasks - 1}%1"}
    else:
        # A script that is sent again waits for the job that trains this run: the name is that of the run folder.
        options |= {"signal": f"B:USR2@{cluster.signal_seconds}", "dependency": "singleton"}
    lines = [f"--{name}={_quoted(str(value))}" for name, value in options.items() if value not in (None, 0)]
    return [*lines, "--requeue", *cluster.extra]


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def submit(submission: Submission) -> tuple[str, Path]:
    """Freeze and send it: (job id, its folder). Raises LaunchError, and then leaves nothing behind."""
    running = _slurm("squeue", "--noheader", f"--name={submission.name}", "--format=%i %T").split("\n")[0]
    if running:
        raise LaunchError(
            f"this run is in the queue already: job {running}",
            where=str(submission.run),
            do="wait for it, cancel it (scancel), or choose another `name`",
        )
    folder = submission.next_folder()
    try:
        folder.mkdir(parents=True)
        code = freeze(folder / "code")
        write_whole(folder / "config.yaml", resolved_yaml(submission.config))
        if submission.cluster.accelerate_config:
            shutil.copy2(submission.cluster.accelerate_config, folder / "accelerate.yaml")
        script = write_whole(folder / "job.sbatch", render(submission, folder))
        record = {**submission.origin, "commit": code.commit, "dirty": code.dirty}
        write_whole(folder / "submission.json", json.dumps(record, indent=1))
        job = _slurm("sbatch", "--parsable", str(script)).strip().partition(";")[0]
    except FileExistsError:
        raise LaunchError("somebody else submits this run right now", where=str(folder), do="wait for it") from None
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        reason = error.strerror or str(error)
        raise StorageError(f"the submission cannot be written: {reason}", where=str(folder), do="free space") from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    write_whole(folder / "submission.json", json.dumps({**record, "job": job}, indent=1))
    return job, folder


def _slurm(*command: str) -> str:
    """What a Slurm command prints. Raises LaunchError with what it says instead."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        raise LaunchError(
            f"there is no {command[0]} here", where="PATH", do="submit from a login node, or use --dry-run"
        ) from None
    if done.returncode:
        raise LaunchError(f"{command[0]} refused: {done.stderr.strip()}", where=shlex.join(command), do="see above")
    return done.stdout
