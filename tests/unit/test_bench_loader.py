"""The loader bench compares like with like: every loader delivers the same chips, or is left out with the reason."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from foundation import bench_loader
from foundation.bench_loader import NAMES, Bench, Child, Measured, Table, memory_table, tables, write_markdown
from foundation.bench_loader_peers import BATCH, PEERS
from shards.errors import DataError

CHIPS, SIDE, SIZE = 2 * BATCH, 24, 16
SOME = ("folder", "webdataset", "streaming-png", "ours")
HERE = tuple(name for name in SOME if name == "ours" or find_spec(PEERS[name][0]))

pytestmark = [
    pytest.mark.slow,  # a dozen processes that import torch
    pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from /proc"),
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_loader, "WORKERS", (0, 1))
        root = tmp_path_factory.mktemp("bench")
        yield Bench(root, CHIPS, SIDE, sizes=(SIZE,), repeats=1, names=SOME)


@pytest.fixture(scope="module")
def measured(bench: Bench) -> dict[str, Measured]:
    return {one.name: one for one in bench.run()}


def test_every_installed_loader_delivers_exactly_the_same_chips_and_is_timed(measured: dict[str, Measured]) -> None:
    assert {"folder", "webdataset", "ours"} <= set(HERE)
    assert {name: measured[name].skipped for name in HERE} == dict.fromkeys(HERE, "")
    for name in HERE:
        one = measured[name]
        assert set(one.speed) == {(0, 0), (0, 1), (SIZE, 0), (SIZE, 1)}
        assert all(core > 0 and wall > 0 for [(core, wall)] in one.speed.values())
        assert len(one.first) == len(one.resume) == 1
        assert -20 < one.memory < 1000


def test_a_peer_that_is_not_installed_is_named_with_the_reason(measured: dict[str, Measured]) -> None:
    missing = {name: f"No module named {PEERS[name][0]!r}" for name in SOME if name not in HERE}
    assert all(reason in measured[name].skipped for name, reason in missing.items())
    listed = {row[0] for table in tables(measured.values()) for row in table.rows if table.title == "Not measured"}
    assert listed == {NAMES[name] for name in missing}


def test_ours_resumes_by_a_seek_and_what_has_no_state_by_replaying(measured: dict[str, Measured]) -> None:
    assert {name: measured[name].how for name in ("folder", "webdataset", "ours")} == {
        "folder": "replays",
        "webdataset": "replays",
        "ours": "seeks",
    }


def test_the_tables_have_a_row_for_each_loader_and_kind_of_work(measured: dict[str, Measured]) -> None:
    rate, single = tables(measured.values())[:2]
    labels = [NAMES[name] for name in HERE]
    works = [(work, workers) for work in ("chips only", f"augmented to {SIZE} px") for workers in ("0", "1")]
    assert [row[:3] for row in rate.rows] == [(*work, label) for work in works for label in labels]
    assert [row[-1] for row in rate.rows if row[2] == NAMES["folder"]] == ["1.0"] * 4
    assert [row[0] for row in single.rows] == labels
    assert all(len(row) == len(table.header) for table in (rate, single) for row in table.rows)


class Pretended(Child):
    """A loader that answers whatever it is told to."""

    def __init__(self, **answers: Any) -> None:
        self.name, self.answers = "pretended", answers

    def ask(self, do: str, **task: Any) -> dict[str, Any]:
        return {"samples": CHIPS, "digest": "true", "shape": [BATCH, 1, SIZE, SIZE], "dtype": "torch.float32"} | (
            self.answers if do != "write" else {}
        )


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ({}, ""),
        ({"digest": "another"}, f"0 workers delivered other chips: {CHIPS} of {CHIPS}"),
        ({"samples": CHIPS - 1}, f"0 workers delivered other chips: {CHIPS - 1} of {CHIPS}"),
        ({"dtype": "torch.uint8"}, f"delivered torch.uint8 [{BATCH}, 1, {SIZE}, {SIZE}]"),
        ({"shape": [BATCH, SIZE, SIZE, 1]}, f"delivered torch.float32 [{BATCH}, {SIZE}, {SIZE}, 1]"),
    ],
)
def test_a_loader_that_delivers_something_else_is_not_timed(
    tmp_path: Path, answers: dict[str, Any], reason: str
) -> None:
    assert Bench(tmp_path, CHIPS, SIDE, sizes=(SIZE,)).why_not(Pretended(**answers), "true") == reason


def test_a_python_without_what_a_peer_needs_gives_its_last_words(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    bare = Bench(tmp_path, CHIPS, python=str(tmp_path / "bare" / "bin" / "python"))
    with bare.child("webdataset") as child:
        assert "No module named 'numpy'" in bare.why_not(child, "")


def test_our_own_failure_is_an_error_and_not_a_row(tmp_path: Path) -> None:
    with Child("ours", sys.executable, tmp_path) as child, pytest.raises(DataError, match="no catalog here") as error:
        child.ask("pass")
    assert "loader ours, task pass" in str(error.value)


def test_memory_is_listed_for_every_pass_of_a_large_catalog(tmp_path: Path) -> None:
    table = memory_table(tmp_path, shards=12, per_shard=512, passes=3)
    assert table.title.startswith("A process with one reader over 6,144 samples")
    assert [row[0] for row in table.rows] == ["1", "2", "3"]
    assert all(0 < float(beyond) < float(uss) <= float(rss) for _, uss, rss, beyond in table.rows)


def test_chips_that_do_not_fill_batches_are_refused() -> None:
    with pytest.raises(DataError, match="100 chips do not fill whole batches") as error:
        bench_loader.run(chips=100)
    assert f"multiple of {2 * BATCH}" in str(error.value)


def test_the_markdown_file_holds_every_table(tmp_path: Path) -> None:
    write_markdown(tmp_path / "loader.md", "On two cores.", [Table("Speed", ("a", "b"), [("1", "x|y")])])
    expected = "# The loader beside its peers\n\nOn two cores.\n\n## Speed\n\n| a | b |\n| --- | --- |\n| 1 | x/y |\n"
    assert (tmp_path / "loader.md").read_text() == expected
