"""The fault campaign: real runs are disturbed as they are on clusters, and have to end as if they were not.

    python tests/faults/campaign.py --kills 200 --out docs/results/faults.md

After each fault the same command is started again; the record (every loss, bit for bit), the weights and the optimiser
must be those of a run that nobody disturbed. Exit code 1 when one is not. A disk that is full needs root.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (0, 1, 2)]
import torch
import torch._dynamo  # the optimiser imports it, which takes longer than a run
from mlflow_server import Server
from object_store import ObjectServer
from processes import ROOT, TINY, record, same_state
from runs import Bench, Trial, lost

from foundation.config import Config, load
from foundation.training import run as training
from shards import synthetic
from shards.pack import SourceSpec, pack

SAMPLES, GOAL = 160, 56
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Campaign:
    """The faults, each a method that yields its trials."""

    def __init__(self, root: Path, kills: int) -> None:
        self.root, self.kills, self.rng, self.number = root, kills, random.Random(0), 0
        self.catalog = root / "catalog"
        kinds = (*synthetic.CLASSES, "background", "clutter")
        chips = synthetic.generate("pretrain", kinds, 8, 40, 0, labelled=False)
        pack(self.catalog, [SourceSpec("chips", records=chips)], shard_bytes=16_000)
        self.yaml = root / "tiny.yaml"
        self.yaml.write_text(TINY.format(root=root, catalog=self.catalog))
        self.bench = Bench(self.config("whole"))

    def config(self, name: str, *more: str) -> Config:
        overrides = [f"train.samples={SAMPLES}", f"name={name}", "monitor.images=0", "train.checkpoint_every=32", *more]
        return load(self.yaml, overrides)

    def next(self, *more: str) -> Config:
        self.number += 1
        return self.config(f"fault-{self.number}", *more)

    def goal(self) -> int:
        """Some update in the middle of a run."""
        return 8 * self.rng.randrange(1, SAMPLES // 8 - 2)

    def trial(self, fault: str, inject: Callable[[int], object], *more: str, **options: Any) -> Trial:
        return self.bench.trial(fault, self.next(*more), inject, options.pop("goal", GOAL), **options)

    def killed(self) -> Iterator[Trial]:
        """SIGKILL at random moments: inside an update, a line, a save."""
        for _ in range(self.kills):
            wait = self.rng.uniform(0, 0.05)
            yield self.trial(
                "SIGKILL", lambda pid, w=wait: (time.sleep(w), os.kill(pid, signal.SIGKILL)), goal=self.goal()
            )

    def storm(self) -> Iterator[Trial]:
        """A scheduler that asks many times: SIGTERM and SIGUSR2, until the run has ended."""

        def inject(pid: int) -> None:
            for number in range(200):
                os.kill(pid, signal.SIGUSR2 if number % 2 else signal.SIGTERM)
                time.sleep(0.001)

        for _ in range(5):
            yield self.trial("SIGTERM storm", inject, goal=self.goal())

    def disk(self) -> Iterator[Trial]:
        """A disk of its own that becomes full."""
        place = self.root / "disk"
        place.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128m", "none", str(place)], check=False).returncode:
            print("NOT RUN  disk full: a disk of its own needs root", flush=True)
            return
        try:
            filler = place / "filler"

            def fill(_: int) -> None:
                with filler.open("wb", buffering=0) as file:
                    try:
                        while file.write(bytes(1 << 16)):
                            pass
                    except OSError:
                        pass

            for _ in range(3):
                yield self.trial("disk full", fill, f"run_root={place}", heal=filler.unlink)
                shutil.rmtree(place / f"fault-{self.number}")
        finally:
            subprocess.run(["umount", "-l", str(place)], check=False)

    def read_only(self) -> Iterator[Trial]:
        """A disk where nothing can be opened or renamed from a moment on."""
        flag = self.root / "read-only"

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
            if event == "open" and isinstance(arguments[0], str):
                changes = bool(set(arguments[1] or "") & set("wxa+") or (arguments[2] or 0) & WRITING)
            if changes and str(self.root / "runs") in str(arguments[0]) and os.path.exists(flag):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), arguments[0])

        for _ in range(3):
            yield self.trial(
                "disk read-only", lambda _: flag.touch(), prepare=lambda: sys.addaudithook(hook), heal=flag.unlink
            )

    def clock(self) -> Iterator[Trial]:
        """The clock jumps by days, forwards and backwards, while the run goes on."""
        real, flag = time.time, self.root / "jump"
        for days in (-30, -1, 1, 30):

            def jumping(days: int = days) -> None:
                time.time = lambda: real() + 86_400 * days * flag.exists()

            yield self.trial("clock jump", lambda _: flag.touch(), prepare=jumping)
            flag.unlink()

    def tracking(self) -> Iterator[Trial]:
        """An MLflow server that is not there, and one that dies under the run."""
        for _ in range(2):
            yield self.trial("MLflow absent", lambda _: None, "tracking.mlflow=true", "tracking.uri=http://127.0.0.1:9")
        folder = self.root / "mlflow"
        folder.mkdir()
        server = Server(folder)
        try:
            for _ in range(2):
                server.start()
                where = "tracking.mlflow=true", f"tracking.uri={server.uri}"
                yield self.trial("MLflow killed", lambda _: server.kill(), *where)
        finally:
            server.kill()

    def shard(self) -> Iterator[Trial]:
        """Bytes of every shard change under the run, and are restored when it has said so and stopped."""
        good = {file: file.read_bytes() for file in self.catalog.glob("*.tar")}

        def damage(_: int) -> None:
            for file in good:
                with file.open("r+b") as opened:
                    for at in range(512 * 3, file.stat().st_size, 997):
                        opened.seek(at)
                        opened.write(b"\xff")

        def heal() -> None:
            for file, content in good.items():
                file.write_bytes(content)

        for _ in range(3):
            yield self.trial("corrupt shard", damage, "data.corrupt=stop", heal=heal, goal=self.goal() // 2)
            heal()

    def cache(self) -> Iterator[Trial]:
        """The node's cache of a remote catalog is deleted under the run."""
        files = {f"/small/{file.name}": file.read_bytes() for file in self.catalog.iterdir()}
        with ObjectServer(files) as server:
            for number in range(3):
                cache = self.root / f"cache-{number}"
                where = f"data.catalog={server.url}/small", f"data.cache={cache}"
                yield self.trial("cache deleted", lambda _, c=cache: shutil.rmtree(c), *where)

    def ranks(self) -> Iterator[Trial]:
        """One of two processes is slow, or has a loss that is not finite: no rank may go on alone."""
        script = ROOT / "tests" / "distributed" / "several_runs.py"
        common = (f"train.samples={SAMPLES}", "monitor.images=0", "train.checkpoint_every=32")
        names = ("pair", "pair-slow", "pair-spoilt")
        runs = [item for name in names for item in ("--", *common, f"name={name}")][1:]
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), str(self.yaml))
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *launcher, *runs], env=environment, check=False, capture_output=True)
        whole, slow, spoilt = (self.root / "runs" / name for name in names)
        if done.returncode:
            yield Trial("slow or spoilt rank", False, 0, 0, 0.0, done.stdout.decode()[-300:])
            return
        same = record(slow) == record(whole) and same_state(slow, whole)
        yield Trial("slow rank", same, *lost(slow, whole, 8), 0.0, "went on")
        skipped = [row["position"] for row in record(spoilt) if row["grad_norm"] is None]
        fine = skipped == [40, 112, 120] and record(spoilt)[-1]["position"] == SAMPLES
        note = f"{len(skipped)} updates were not made, on no rank"
        yield Trial("NaN on one rank", fine, *lost(spoilt, whole, 8), 0.0, note)

    def all(self) -> Iterator[Trial]:
        for fault in (
            self.ranks, self.disk, self.read_only, self.storm, self.clock, self.shard, self.cache, self.tracking,
            self.killed,
        ):  # fmt: skip
            yield from fault()


def table(trials: list[Trial]) -> str:
    """One row per kind of fault, as Markdown."""
    names = ("fault", "injected", "survived", "samples lost", "checkpoints lost", "s to recover: median, most", "note")
    lines = ["| " + " | ".join(names) + " |", "| --- " * len(names) + "|"]
    for fault in dict.fromkeys(trial.fault for trial in trials):
        rows = [trial for trial in trials if trial.fault == fault]
        again = [row.seconds for row in rows if row.seconds]
        time_text = f"{statistics.median(again):.2f}, {max(again):.2f}" if again else "never stopped"
        notes = {row.note for row in rows}
        counts = (len(rows), sum(r.survived for r in rows), sum(r.lost_samples for r in rows))
        more = (sum(r.lost_checkpoints for r in rows), time_text, sorted(notes)[-1])
        lines.append("| " + " | ".join(map(str, (fault, *counts, *more))) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the campaign and print or write its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--out", type=Path, help="file to write the table to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    training.publish = lambda *_: None  # the report is the same with and without a fault
    trials = []
    with tempfile.TemporaryDirectory() as folder:
        for trial in Campaign(Path(folder), options.kills).all():
            trials.append(trial)
            mark = "ok  " if trial.survived and not trial.lost_samples and not trial.lost_checkpoints else "BAD "
            print(f"{mark}{trial.fault:<18}{trial.seconds:6.2f} s  {trial.note}", flush=True)
    text = table(trials)
    print(text)
    if options.out:
        options.out.write_text(text)
    return int(any(not t.survived or t.lost_samples or t.lost_checkpoints for t in trials))


if __name__ == "__main__":
    sys.exit(main())
