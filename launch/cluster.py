"""The typed cluster file: which nodes a job asks for, and what is peculiar to them."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, field_validator

from foundation.config import Section
from foundation.config_text import Problem, field_problems, known_paths, read_tree, summary
from foundation.errors import ConfigError
from launch import accelerated


def _line(text: str) -> str:
    """A line break in a value would begin a line of its own in the job script."""
    if not text or any(unicodedata.category(character) == "Cc" for character in text):
        raise ValueError("text in one line")
    return text


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text):
        raise ValueError("a name of an environment variable, such as NCCL_DEBUG")
    return text


Line = Annotated[str, AfterValidator(_line)]
Name = Annotated[str, AfterValidator(_name)]
Value = Annotated[
    str, BeforeValidator(lambda value: str(value) if type(value) is int else value), AfterValidator(_line)
]
OURS = (
    "job-name",
    "output",
    "error",
    "open-mode",
    "chdir",
    "signal",
    "requeue",
    "no-requeue",
    "array",
    "dependency",
    "nodes",
    "time",
)
OURS_SHORT = ("-J", "-o", "-e", "-D", "-a", "-d", "-N", "-t")
EARLY = 60
"""Slurm may send the signal so many seconds before its time (sbatch manual, `--signal`)."""


class Cluster(Section):
    """What a Slurm cluster gives a run; every key has a default."""

    partition: Line | None = Field(default=None, description="Slurm partition; null: the default one")
    account: Line | None = Field(default=None, description="account that pays")
    nodes: int = Field(default=1, ge=1, description="nodes of the job")
    gpus_per_node: int = Field(default=0, ge=0, description="GPUs of a node; one process each")
    processes_per_node: int | None = Field(default=None, ge=1, description="null: one per GPU, or one without GPUs")
    cpus_per_task: int = Field(default=1, ge=1, description="CPU cores of a node's task, for all its processes")
    mem: str | None = Field(
        default=None, pattern=r"^\d+[KMGT]?$", description="memory of a node, e.g. 64G; 0: all of it"
    )
    time: str = Field(
        default="24:00:00", pattern=r"^\d+:[0-5]\d:[0-5]\d$", description="time limit of one attempt, HH:MM:SS"
    )
    signal_seconds: int = Field(
        default=120, ge=1, le=3600, description="seconds before the limit at which a run is asked to save and stop"
    )
    launcher: Literal["torchrun", "accelerate"] = Field(default="torchrun", description="what starts the processes")
    accelerate_config: Line | None = Field(
        default=None, description="YAML of `accelerate launch`, relative to this file; needed by launcher: accelerate"
    )
    python: Line | None = Field(default=None, description="interpreter on the nodes; null: the one that submits")
    host_python: Line | None = Field(
        default=None,
        description="interpreter outside the container: Python 3.6 or later, without packages; null: python",
    )
    container: tuple[Line, ...] = Field(
        default=(), description="words before every command of a node, e.g. [apptainer, run, --nv, image.sif]"
    )
    setup: tuple[Line, ...] = Field(default=(), description="shell lines of the job, e.g. module load cuda/12.8")
    env: dict[Name, Value] = Field(default={}, description="environment of the run")
    srun_args: tuple[Line, ...] = Field(default=(), description="more arguments of srun")
    extra: tuple[Line, ...] = Field(default=(), description="more options of sbatch, e.g. --constraint=h100")

    @field_validator("time", mode="before")
    @classmethod
    def _quoted(cls, value: object) -> object:
        """YAML 1.1 reads 24:00:00 as the number 86400, and cannot tell it from one."""
        if isinstance(value, int):
            raise ValueError('HH:MM:SS in quotes, e.g. "24:00:00": without them YAML makes it a number')
        return value

    @field_validator("extra")
    @classmethod
    def _not_ours(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """What decides how a job is named, logged, stopped and requeued is not a matter of the cluster."""
        for line in value:
            option = line.split("=")[0].split()[0] if line.split() else ""
            if not option.startswith("-"):
                raise ValueError(f"options that begin with -, not {line!r}")
            # sbatch takes the beginning of a name for the name: --depend=afterok:7
            long = option.startswith("--") and any(name.startswith(option[2:]) for name in OURS)
            if long or (option[:2] in OURS_SHORT and option[1] != "-"):
                raise ValueError(f"no {option}: `foundation submit` sets it")
        return value

    @property
    def processes(self) -> int:
        """Processes on each node."""
        return self.processes_per_node or max(self.gpus_per_node, 1)

    @property
    def interpreter(self) -> str:
        """The Python of the run."""
        return self.python or sys.executable

    @property
    def engine(self) -> str | None:
        """The engine that the configuration of accelerate declares; None: the run chooses."""
        if self.accelerate_config is None:
            return None
        return accelerated.engine(Path(self.accelerate_config), self.nodes, self.processes)

    @property
    def seconds(self) -> int:
        """The time limit in seconds."""
        hours, minutes, seconds = map(int, self.time.split(":"))
        return hours * 3600 + minutes * 60 + seconds


def load_cluster(path: Path) -> Cluster:
    """Read a cluster file (and its `base:` chain). Raises ConfigError with every error, each with the nearest key."""
    tree, problems = read_tree(path, ())
    try:
        cluster = Cluster.model_validate(tree)
        problems += _conflicts(cluster, path.parent)
        if cluster.accelerate_config:
            absolute = str((path.parent / cluster.accelerate_config).absolute())
            cluster = cluster.model_copy(update={"accelerate_config": absolute})
    except ValidationError as error:
        problems += field_problems(error, known_paths(Cluster))
    if problems:
        what = summary(problems, str(path)).what
        raise ConfigError(what, do="correct these keys; launch/cluster.py lists every key with its range and default")
    return cluster


def _conflicts(cluster: Cluster, folder: Path) -> Iterator[Problem]:
    """Keys that do not go together."""
    least = cluster.signal_seconds + EARLY
    if cluster.seconds <= least:
        yield Problem("time", cluster.time, f"more than signal_seconds + {EARLY} s = {least} s, or every attempt stops")
    if cluster.launcher == "accelerate" and cluster.accelerate_config is None:
        yield Problem("accelerate_config", None, "needed by launcher = accelerate")
    if cluster.launcher == "torchrun" and cluster.accelerate_config is not None:
        yield Problem("accelerate_config", cluster.accelerate_config, "only read with launcher = accelerate")
    elif cluster.accelerate_config and not (file := folder / cluster.accelerate_config).is_file():
        yield Problem("accelerate_config", cluster.accelerate_config, f"an existing file, relative to {folder}")
    elif cluster.accelerate_config:
        try:
            accelerated.engine(file, cluster.nodes, cluster.processes)
        except ValueError as error:
            yield Problem("accelerate_config", cluster.accelerate_config, f"a file with {error}")
