"""A real Slurm cluster of two nodes on this machine: its daemons, its jobs, and a node that can die.

Everything stands in one folder; nothing under /etc is read or written, and no daemon outlives `stop`.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Collection
from pathlib import Path

import psutil

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
NODES = ("n1", "n2")
KILL_WAIT = 5
"""Seconds between SIGTERM and SIGKILL."""
CONF = """\
ClusterName=ci
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
SlurmctldPort={port}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_min_interval=100000
MpiDefault=none
ReturnToService=2
KillWait={kill_wait}
UnkillableStepTimeout=10
SlurmdTimeout=3
TCPTimeout=1
MessageTimeout=3
JobRequeue=1
"""

PATIENCE = 3
"""Times as long as a quiet machine needs: other tests keep the cores busy."""


def missing() -> str:
    """Why there can be no cluster here; empty when there can."""
    absent = [name for name in DAEMONS if shutil.which(name, path=_path()) is None]
    return f"no Slurm here: {', '.join(absent)} not installed" if absent else ""


class Refused(AssertionError):
    """A Slurm command failed; one that only asks may be answered later, by a controller that is busy."""


class SlurmCluster:
    """`start`, then `sbatch`, `wait`, `log`; `kill_node` and `start_node` take a node away and bring it back."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(root / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.restarts: dict[str, int] = {}

    def start(self) -> None:
        """Every daemon in the foreground of a process of ours; returns when both nodes are idle."""
        key = self.root / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        (self.root / "state").mkdir()
        ports = _free_ports(1 + len(NODES))
        host = socket.gethostname().partition(".")[0]
        lines = [CONF.format(kill_wait=KILL_WAIT, host=host, user=getpass.getuser(), root=self.root, port=ports[0])]
        for number, (node, port) in enumerate(zip(NODES, ports[1:], strict=True), start=2):
            (self.root / node).mkdir()
            at = f"NodeHostname={host} NodeAddr=127.0.0.{number} Port={port}"
            lines.append(f"NodeName={node} {at} CPUs=2 RealMemory=1000\n")
        lines.append(f"PartitionName=train Nodes={','.join(NODES)} Default=YES MaxTime=60 State=UP\n")
        (self.root / "slurm.conf").write_text("".join(lines))
        files = {"socket": "socket", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
        options = [f"--{option}={self.root}/munge.{name}" for option, name in files.items()]
        # --force: only its own user ever connects, so that a private folder will do.
        self._daemon("munged", "munged", "--foreground", "--force", f"--key-file={key}", *options)
        self.until("munged listens", (self.root / "munge.socket").exists, 10)
        self._daemon("slurmctld", "slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        self.idle()

    def stop(self) -> None:
        """Cancel every job, end every daemon, and whatever of theirs is left."""
        if "slurmctld" in self.daemons:
            subprocess.run(["scancel", "--user", getpass.getuser()], env=self.environment, timeout=30, check=False)
        _kill([*self._steps(), *self._tasks()])
        for name in reversed(self.daemons):
            self.daemons[name].terminate()
        for process in self.daemons.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        _kill([*self._steps(), *self._tasks()])

    def run(self, *command: str) -> str:
        """What a Slurm command prints."""
        done = self._call(*command)
        if done.returncode:
            raise Refused(f"{command}: {done.stderr}")
        return done.stdout

    def _call(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)

    def sbatch(self, script: Path, *options: str) -> str:
        """Submit a batch script; its job id."""
        return self.run("sbatch", "--parsable", *options, str(script)).strip()

    def show(self, job: str) -> dict[str, str]:
        """What the controller knows of a job; empty when it has forgotten it."""
        words = self.run("scontrol", "-o", "show", "job", job).split()
        return dict(word.partition("=")[::2] for word in words)

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, ..."""
        return self.show(job)["JobState"]

    def wait(self, job: str, states: Collection[str], timeout: float = 60) -> str:
        """The state of a job once it is one of `states`."""
        self.until(f"job {job} is {' or '.join(states)}", lambda: self.state(job) in states, timeout, job)
        return self.state(job)

    def until(self, what: str, holds: Callable[[], bool], timeout: float, job: str = "") -> None:
        """Wait until `holds`; fails with the log of the job, if one is named."""
        end = time.monotonic() + PATIENCE * timeout

        def yet() -> bool:
            try:
                return holds()
            except Refused:
                return False

        while not yet():
            told = f"; the job says\n{self.log(job)}\n{self.show(job)}" if job else ""
            nodes = self._call("sinfo", "-hN", "-o", "%N %T %E").stdout if time.monotonic() > end else ""
            assert time.monotonic() < end, f"in vain for {PATIENCE * timeout} s: {what}; nodes:\n{nodes}{told}"
            time.sleep(0.2)

    def start_now(self, job: str, timeout: float = 60) -> None:
        """Wait until a job is back in the queue, and spare it the two minutes a requeued job waits there."""
        before = self.restarts.get(job, 0)

        def requeued() -> bool:
            shown = self.show(job)
            self.restarts[job] = int(shown["Restarts"])
            return shown["JobState"] != "COMPLETING" and self.restarts[job] > before

        self.until(f"job {job} is requeued", requeued, timeout, job)
        # A node revokes the credential of a requeued job by the second: one that starts in the same second is refused.
        asked = self._call("scontrol", "update", f"JobId={job}", "StartTime=now+2")
        assert asked.returncode == 0 or self.state(job) != "PENDING", asked.stderr  # its two minutes may be over

    def log(self, job: str) -> str:
        """Everything a job printed so far."""
        shown = self.run("scontrol", "-o", "show", "job", job)
        path = Path(shown.partition(" StdOut=")[2].partition(" Power=")[0])
        return path.read_text(errors="replace") if path.is_file() else ""

    def start_node(self, node: str) -> None:
        """The daemon of a node."""
        self._daemon(node, "slurmd", "-D", "-N", node)

    def revive_node(self, node: str) -> None:
        """A node that died comes back, once Slurm has noticed its death; returns when it can run the same job again.

        Slurm tells it, and once more after a minute, to end what it ran before, by the number of the job; this is why
        requeued jobs wait two minutes. A controller that starts anew knows its jobs, but not what it had left to say.
        """
        self.until(f"{node} is down", lambda: "down" in self.run("sinfo", "-hN", "-o", "%T"), 60)
        self.daemons["slurmctld"].terminate()
        self.daemons["slurmctld"].wait(30)
        self._daemon("slurmctld", "slurmctld", "-D")
        self.until("slurmctld answers", lambda: self._call("scontrol", "ping").returncode == 0, 60)
        self.start_node(node)
        self.idle()

    def idle(self, timeout: float = 60) -> None:
        """Wait until both nodes answer and have nothing to do."""
        self.until("both nodes are idle", lambda: self.run("sinfo", "-hN", "-o", "%T").split() == ["idle"] * 2, timeout)

    def kill_node(self, node: str) -> None:
        """What a power cut does: the daemon, the steps and the tasks of a node are gone at once."""
        self.daemons[node].kill()
        self.daemons[node].wait()
        _kill(self._steps(node))
        _kill([process for process in self._tasks() if _environment(process).get("SLURMD_NODENAME") == node])

    def leftovers(self) -> list[str]:
        """Names of all processes of this cluster that still run."""
        running = [name for name, daemon in self.daemons.items() if daemon.poll() is None]
        return running + [process.name() for process in (*self._steps(), *self._tasks())]

    def _daemon(self, name: str, *command: str) -> None:
        with (self.root / f"{name}.out").open("ab") as out:
            process = subprocess.Popen(command, env=self.environment, stdout=out, stderr=out, start_new_session=True)
        self.daemons[name] = process

    def _tasks(self) -> list[psutil.Process]:
        """Batch scripts, srun, and everything that they started."""
        conf, own = self.environment["SLURM_CONF"], {os.getpid(), *(d.pid for d in self.daemons.values())}
        every = (process for process in psutil.process_iter() if process.pid not in own)
        return [process for process in every if _environment(process).get("SLURM_CONF") == conf]

    def _steps(self, *nodes: str) -> list[psutil.Process]:
        """The slurmstepd of these nodes, or of all. Their title overwrites their environment; their log tells."""
        logs = {str(self.root / f"slurmd.{node}.log") for node in nodes or NODES}
        steps = [process for process in psutil.process_iter(["name"]) if process.info["name"] == "slurmstepd"]
        return [process for process in steps if logs & _open_files(process)]


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ() if process.status() != psutil.STATUS_ZOMBIE else {}
    except (psutil.Error, OSError):
        return {}


def _open_files(process: psutil.Process) -> set[str]:
    try:
        return {file.path for file in process.open_files()}
    except (psutil.Error, OSError):
        return set()


def _kill(processes: Collection[psutil.Process]) -> None:
    for process in processes:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"  # where distributions put daemons, and users look seldom


def _free_ports(count: int) -> list[int]:
    found = [socket.socket() for _ in range(count)]
    for each in found:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in found]
    for each in found:
        each.close()
    return ports
