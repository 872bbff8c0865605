"""Several processes give the bytes of one, and a packing that was killed goes on where it stopped."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from processes import ROOT

from shards import catalog as catalogs
from shards import spool, tarfiles
from shards.errors import DataError
from shards.pack import Options, Record, SourceSpec, pack
from shards.workers import Workers, locked

OPTIONS = {"shard_bytes": 40_000, "on_error": "skip"}
# A packing that waits for ever after so many of its files have got their names, and says so.
STOPPING = """
import os, sys, time
from shards import spool
from shards.pack import SourceSpec, pack
spool.CHUNK_ITEMS = 40
folder, out, suffix, left, workers = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
replace = os.replace
def stopping(source, target):
    global left
    if str(target).endswith(suffix):
        left -= 1
        if left < 0:
            print("here", flush=True)
            time.sleep(600)
    replace(source, target)
os.replace = stopping
if __name__ == "__main__":
    pack(out, [SourceSpec("chips", folder)], shard_bytes=40_000, on_error="skip", workers=workers)
"""


@pytest.fixture(scope="module")
def chips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 chips in two classes, of which one is damaged, one of another dtype."""
    root = tmp_path_factory.mktemp("chips")
    rng = np.random.default_rng(0)
    for label in "ab":
        (root / label).mkdir()
        for i in range(200):
            np.save(root / label / f"{i:03}.npy", rng.integers(1, 200, (16, 20 + i % 4), np.uint8))
    np.save(root / "a" / "007.npy", np.ones((16, 16), np.uint16))
    (root / "b" / "100.npy").write_bytes(b"broken")
    return root


def few() -> list[Record]:
    return [Record(np.full((9, 9), i + 1, np.uint8), str(i)) for i in range(9)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "CHUNK_ITEMS", 40)


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def undisturbed(chips: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every file of the catalog that this process packs alone, in chunks of the usual size."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    pack(out, [SourceSpec("chips", chips)], **OPTIONS)
    return contents(out)


def test_any_number_of_processes_gives_the_same_bytes(chips: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
    seen: list[int] = []
    for workers in (1, 3):
        out = tmp_path / str(workers)
        catalog = pack(
            out, [SourceSpec("chips", chips)], workers=workers, progress=lambda _, n: seen.append(n), **OPTIONS
        )
        assert contents(out) == undisturbed
        catalog.verify()
    assert catalog.samples == 398
    assert len(catalog.sources[0].shards) > 3
    assert seen.count(398) == 2
    assert sorted(seen[: len(seen) // 2]) == seen[: len(seen) // 2]


def stopped(chips: Path, out: Path, suffix: str, count: int, workers: int) -> subprocess.Popen[str]:
    """A packing that has stopped before it renames its `count`-th file of this kind."""
    script = out.parent / "stopping.py"
    script.write_text(STOPPING)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(script), *map(str, (chips, out, suffix, count, workers))],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many chunks are read and shards written from now on, in this process."""
    counts = {"chunks": 0, "shards": 0}

    def count(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            counts[name] += 1
            return function(*arguments)

        return call

    monkeypatch.setattr(spool, "read_chunk", count("chunks", spool.read_chunk))
    monkeypatch.setattr(tarfiles, "write_shard", count("shards", tarfiles.write_shard))
    return counts


@pytest.mark.parametrize(
    ("suffix", "count"),
    [(".json", 2), (".idx", 3), (".tar", 2), ("catalog.json", 0)],
)
def test_a_killed_packing_goes_on_without_reading_or_writing_anything_twice(
    chips: Path, undisturbed: dict[str, str], counted: dict[str, int], tmp_path: Path, suffix: str, count: int
) -> None:
    out = tmp_path / "out"
    kill(stopped(chips, out, suffix, count, workers=0))
    scratch = out / ".pack-chips"
    digests = {p.stem for p in (scratch / "chunks").glob("*.json")}
    read, written = len(digests), len(list((scratch / "shards").glob("*.json")))
    assert not (out / "catalog.json").exists()
    pack(out, [SourceSpec("chips", chips)], **OPTIONS)
    assert contents(out) == undisturbed
    total = len([name for name in undisturbed if name.endswith(".tar")])
    assert counted["shards"] == total - written
    if suffix == ".json":
        assert read == count
        assert counted["chunks"] > 0
    else:
        assert read > 2
        assert counted["chunks"] == 0


def test_workers_of_a_killed_packing_end_and_their_work_is_taken_over(
    chips: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = stopped(chips, out, ".tar", 1, workers=2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    kill(process)
    end = time.monotonic() + 60
    while any(Path(f"/proc/{child}").exists() and "Z" not in state(child) for child in children):
        assert time.monotonic() < end, "a worker outlives its parent"
        time.sleep(0.02)
    pack(out, [SourceSpec("chips", chips)], workers=2, **OPTIONS)
    assert contents(out) == undisturbed


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_stops_a_packing_with_one_line_and_the_same_command_goes_on(
    undisturbed: dict[str, str], chips: Path, tmp_path: Path, workers: int
) -> None:
    script = tmp_path / "slow.py"
    script.write_text(
        "import time\n"
        "from shards import spool\n"
        "from shards.sources.folder import Folder\n"
        "from foundation.cli import main\n"
        "load = Folder.load\n"
        "def slow(self, item):\n    time.sleep(0.05)\n    return load(self, item)\n"
        "Folder.load = slow\n"
        "spool.CHUNK_ITEMS = 40\n"
        "if __name__ == '__main__':\n    main()\n"
    )
    words = ("shards", "pack", tmp_path / "out", chips, "--name", "chips", "--on-error", "skip", "--workers", workers)
    process = subprocess.Popen(
        [sys.executable, str(script), *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a group of its own, as a terminal gives it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells ignore it for what runs behind them
    )
    end = time.monotonic() + 60
    while not list(tmp_path.glob("out/.pack-chips/chunks/*.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "nothing is read"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert output.strip() == "stopped; the same command goes on where it was"
    pack(tmp_path / "out", [SourceSpec("chips", chips)], **OPTIONS)
    assert contents(tmp_path / "out") == undisturbed


def state(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_a_file_that_changed_after_a_kill_is_read_again(chips: Path, counted: dict[str, int], tmp_path: Path) -> None:
    copy = tmp_path / "in"
    for path in chips.glob("*/*"):
        (copy / path.parent.name).mkdir(parents=True, exist_ok=True)
        (copy / path.parent.name / path.name).write_bytes(path.read_bytes())
    out = tmp_path / "out"
    kill(stopped(copy, out, ".tar", 1, workers=0))
    np.save(copy / "b" / "150.npy", np.full((16, 22), 77, np.uint8))  # 150 % 4 == 2: the size stays
    after = pack(out, [SourceSpec("chips", copy)], **OPTIONS)
    assert counted["chunks"] == 1
    pack(tmp_path / "anew", [SourceSpec("chips", copy)], **OPTIONS)
    assert contents(out) == contents(tmp_path / "anew")
    assert after.samples == 398


def test_excluding_a_bad_file_reads_only_its_chunk_again_and_fresh_reads_everything(
    chips: Path, counted: dict[str, int], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"2 of 400 files cannot be used[\s\S]*what was read is not read again"):
        pack(tmp_path, [SourceSpec("chips", chips)], shard_bytes=40_000)
    everything, counted["chunks"] = counted["chunks"], 0
    with pytest.raises(DataError, match="1 of 399 files cannot be used"):
        pack(tmp_path, [SourceSpec("chips", chips, options=Options(exclude=("b/100*",)))], shard_bytes=40_000)
    assert 0 < counted["chunks"] < everything / 2
    counted["chunks"] = 0
    pack(tmp_path, [SourceSpec("chips", chips)], fresh=True, **OPTIONS)
    assert counted["chunks"] == everything


def test_only_one_packing_writes_to_a_folder_at_a_time(
    chips: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = stopped(chips, out, ".tar", 0, workers=0)
    with pytest.raises(DataError, match=r"another packing writes to this folder[\s\S]*wait until it has ended"):
        pack(out, [SourceSpec("other", records=few())])
    kill(process)
    pack(out, [SourceSpec("chips", chips)], **OPTIONS)
    assert contents(out) == undisturbed
    with locked(out), pytest.raises(DataError, match="another packing"), locked(out):
        pass


def test_a_full_disk_stops_the_packing_with_the_old_catalog_whole_and_nothing_lost(
    chips: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    before = pack(out, [SourceSpec("chips", records=few())])
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
        "from shards.pack import SourceSpec, pack\n"
        "pack(sys.argv[1], [SourceSpec('chips', sys.argv[2])], shard_bytes=40_000, on_error='skip')"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(out), str(chips)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "packing stopped: [Errno 27] File too large" in done.stderr
    assert "free space or fix access, and pack again" in done.stderr
    catalogs.load(out).verify()
    assert catalogs.load(out).fingerprint == before.fingerprint
    pack(out, [SourceSpec("chips", chips)], **OPTIONS)
    assert undisturbed.items() <= contents(out).items()
    before.verify()  # what a running job reads


def _die(_: object, task: int) -> int:
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def test_a_worker_that_is_killed_is_an_error_that_says_what_to_do() -> None:
    done = []
    with (
        pytest.raises(DataError, match=r"a process that packs was killed[\s\S]*fewer workers"),
        Workers(1, None) as pool,
    ):
        done.extend(pool.map(_die, range(9)))
