"""A run that stands still names the process that all others wait for; a damaged file is said to be possible."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation.inspecting.standing import Stood, standstill, verdict
from foundation.training import standstill as standing
from foundation.training.standstill import FOLDER, Patience, collectives

STACK = ["/usr/lib/python/threading.py:1 run", "/x/shards/reader.py:212 read", "/usr/lib/python/io.py:7 readinto"]


def facts(rank: int, begun: Mapping[str, int], **changes: Any) -> dict[str, Any]:
    groups = {name: {"begun": n, "what": "gloo:all_reduce", "sizes": [[3, n]]} for name, n in begun.items()}
    given = {"rank": rank, "host": "n", "process": 1, "position": 64, "seconds": 9.0, "time": 1e9, "stack": STACK}
    return {**given, "collectives": groups, **changes}


def write(run: Path, *found: Mapping[str, Any]) -> None:
    (run / FOLDER).mkdir()
    for each in found:
        (run / FOLDER / f"rank-{each['rank']}.json").write_text(json.dumps(each))


def test_the_process_that_is_behind_in_a_group_is_named_with_what_the_others_wait_in(tmp_path: Path) -> None:
    write(tmp_path, facts(0, {"0/pg": 7, "1/a": 2}), facts(1, {"0/pg": 7, "1/a": 1}), facts(2, {"0/pg": 7, "1/a": 2}))
    found = standstill(tmp_path, 3)
    assert found
    assert found.processes[1].where == "shards/reader.py:212 read > io.py:7 readinto"
    assert found.verdict == (
        "all wait for rank 1: not in gloo:all_reduce of [3, 2], number 2 of group 1/a, "
        "but at shards/reader.py:212 read > io.py:7 readinto"
    )


def test_a_process_without_a_word_is_named_first(tmp_path: Path) -> None:
    write(tmp_path, facts(0, {"0/pg": 7}), facts(2, {"0/pg": 6}), facts(1, {}, time=1e9 - 3600))
    (tmp_path / FOLDER / "rank-3.json").write_text("{")
    found = standstill(tmp_path, 4)
    assert found
    assert found.verdict == "no word from rank 1, 3: dead, stopped, cut off, or its file is damaged"


def test_processes_in_the_same_collective_point_at_the_network(tmp_path: Path) -> None:
    write(tmp_path, facts(0, {"0/pg": 7}), facts(1, {"0/pg": 7}, stack=[]))
    found = standstill(tmp_path, None)
    assert found
    assert found.processes[1].where == "unknown"
    assert found.verdict == "all processes are in the same collective: look at the network"


@given(st.dictionaries(st.integers(0, 9), st.integers(0, 5), min_size=1))
def test_only_those_behind_are_accused(begun: dict[int, int]) -> None:
    stood = [Stood(r, "n", 0, 1.0, 0.0, "x", facts(r, {"0/pg": n})["collectives"]) for r, n in sorted(begun.items())]
    late = [str(rank) for rank, n in sorted(begun.items()) if n < max(begun.values())]
    said = verdict(stood, None)
    assert said.startswith(f"all wait for rank {', '.join(late)}: ") if late else "wait for" not in said


def test_a_run_that_never_stood_still_has_nothing_to_say(tmp_path: Path) -> None:
    assert standstill(tmp_path, 2) is None


def test_the_last_collective_of_each_group_counts_and_messages_do_not() -> None:
    entries = [
        {"process_group": ["0", "pg"], "collective_seq_id": 1, "profiling_name": "a", "input_sizes": [[1]]},
        {"process_group": ["0", "pg"], "collective_seq_id": 2, "profiling_name": "b", "input_sizes": [[2]]},
        {"process_group": ["0", "pg"], "collective_seq_id": 2, "profiling_name": "send", "is_p2p": True},
    ]
    assert collectives({"entries": entries}) == {"0/pg": {"begun": 2, "what": "b", "sizes": [[2]]}}
    assert collectives({}) == {}


def watched(folder: Path, beats: int) -> list[tuple[int, float, Path]]:
    """What is told while a main thread stands still after so many updates."""
    told: list[tuple[int, float, Path]] = []
    there = threading.Event()

    def tell(*what: Any) -> None:
        told.append(what)
        there.set()

    with Patience(folder, 0, 0.05, tell) as patience:
        for number in range(beats):
            patience.beat(8 * number)
        there.wait(60.0 if beats else 0.3)
        time.sleep(0.2)  # it is not told twice
    return told


def test_a_standstill_is_told_once_with_the_stack_of_the_thread_that_stands(tmp_path: Path) -> None:
    ((position, seconds, path),) = watched(tmp_path, 3)
    assert (position, path) == (16, tmp_path / FOLDER / "rank-0.json")
    assert seconds >= 0.05
    assert any("test_standstill.py" in call for call in json.loads(path.read_text())["stack"])


def test_before_the_first_update_nothing_is_told(tmp_path: Path) -> None:
    assert watched(tmp_path, 0) == []


def test_a_folder_that_cannot_be_written_costs_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / FOLDER).write_text("a file")
    with Patience(tmp_path, 0, 0.02, lambda *_: None) as patience:
        patience.beat(8)
        told, end = "", time.monotonic() + 60
        while not told and time.monotonic() < end:
            time.sleep(0.1)
            told = capsys.readouterr().err
    assert (told + capsys.readouterr().err).count("rank-0.json cannot be written: File exists") == 1


def test_without_patience_there_is_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    with Patience(tmp_path, 0, None, lambda *_: None) as patience:
        patience.beat(8)
        assert threading.active_count() == before


def test_a_torch_without_a_recorder_costs_only_the_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._C._distributed_c10d as c10d

    monkeypatch.delattr(c10d, "_dump_fr_trace_json")
    assert standing.recorded() == {}
    assert standing.whereabouts(threading.get_ident())["collectives"] == {}
