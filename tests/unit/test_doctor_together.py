"""What the processes of `foundation doctor` find out together: kernels, clocks, links, the shared disk; the command."""

from __future__ import annotations

import fcntl
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from doctor_threads import places, together
from hypothesis import given
from hypothesis import strategies as st

from foundation import cli_text
from launch.doctor import disk, network, operators, report
from launch.doctor.examine import Examination
from launch.doctor.meeting import Meeting, Several, Stage
from launch.doctor.rows import Row, Status

# --- kernels


def test_every_backend_that_is_ready_here_is_right_on_this_device() -> None:
    from kernels import gradient_ratio, rpe_attention

    found = operators.look(torch.device("cpu"))
    ready = {
        (operator, name)
        for operator, module in (("rpe_attention", rpe_attention), ("gradient_ratio", gradient_ratio))
        for name, row in module.BACKENDS.items()
        if not row.unavailable
    }
    assert {(r.operator, r.backend) for r in found.results if r.error is not None and r.error < 1e-5} == ready
    (row, *_) = operators.rows(places("a"), [found])
    assert row.status is Status.ok
    assert "rpe_attention: reference, sdpa, dense" in row.found


def test_a_backend_that_is_wrong_absent_or_breaks_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels import rpe_attention

    def wrong(*arguments: Any) -> torch.Tensor:
        return rpe_attention.reference(*arguments) * 1.5

    def breaks(*arguments: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image is available\nmore")

    for name, run, unavailable in (("wrong", wrong, ""), ("breaks", breaks, ""), ("absent", breaks, "needs a GPU")):
        monkeypatch.setitem(
            rpe_attention.BACKENDS, name, rpe_attention.Backend(run, "", lambda _, why=unavailable: why)
        )
    found = operators.look(torch.device("cpu"))
    failed, absent = operators.rows(places("a"), [found])
    assert (failed.status, absent.status) == (Status.failed, Status.note)
    assert "rpe_attention wrong: differs from the definition by " in failed.found
    assert "rpe_attention breaks: RuntimeError: no kernel image is available" in failed.found
    assert "foundation list attention" in failed.do
    assert "rpe_attention absent: needs a GPU" in absent.found


def test_a_foreign_package_is_an_answer_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kernels.rpe_attention", None)
    found = operators.look(torch.device("cpu"))
    ours = operators.Outcomes(results=(operators.Outcome(operator="o", backend="b", error=0.0),))
    rows = list(operators.rows(places("a", "b"), [ours, found]))
    assert [row.status for row in rows] == [Status.ok, Status.failed]
    assert "kernels.rpe_attention" in rows[1].found
    assert rows[1].found.endswith(" on node b")


# --- network


@given(st.integers(2, 70))
def test_every_link_of_the_ring_is_measured_once_and_no_rank_is_in_two_at_a_time(size: int) -> None:
    rounds = network.ring(size)
    links = {frozenset(link) for links in rounds for link in links}
    assert links == {frozenset((rank, (rank + 1) % size)) for rank in range(size)}
    assert sum(map(len, rounds)) == len(links)
    assert len(rounds) <= 3
    for one in rounds:
        busy = [rank for link in one for rank in link]
        assert len(busy) == len(set(busy))


@given(st.floats(0, 1e3), st.floats(0, 1e3))
def test_a_measurement_is_done_three_to_fifty_times_and_keeps_its_budget(once: float, budget: float) -> None:
    times = network.repetitions(once, budget)
    assert 3 <= times <= 50
    assert times == 3 or times * once <= budget + 1e-3


def measured(*rates: float, clocks: Sequence[network.Clock] = (), links: Sequence[network.Link] = ()) -> list[Any]:
    """Facts of as many ranks as rates of the all-reduce, in GB/s of the bus; rank 0 knows clocks and links."""
    share, size = 2 * (len(rates) - 1) / len(rates), 64 * 2**20
    return [
        network.Network(
            all_reduce=(
                network.Timing(size=2**20, seconds=1e-3),
                network.Timing(size=size, seconds=share * size / rate / 1e9),
            ),
            clocks=tuple(clocks) * (rank == 0),
            links=tuple(links) * (rank == 0),
        )
        for rank, rate in enumerate(rates)
    ]


def test_a_clock_that_is_off_by_more_than_a_second_is_named_with_its_direction() -> None:
    def row(*ahead: float) -> Row:
        clocks = [network.Clock(node=f"n{i + 1}", ahead=value, uncertain=0.01) for i, value in enumerate(ahead)]
        return next(iter(network.rows(places("n0", "n1", "n2"), measured(1, 1, 1, clocks=clocks))))

    assert row(0.5, -0.9) == Row("clock skew", Status.ok, "at most 900.0 ms over 3 nodes (± 10.0 ms)")
    found = row(2.0, -3.0)
    assert (found.status, "chrony" in found.do) == (Status.warning, True)
    assert found.found == "against the node of rank 0: n1 is 2.0 s ahead, n2 is 3.0 s behind"
    assert row(1.005, 0.0).status is Status.ok  # not more than is known


def test_a_rank_of_half_the_bandwidth_and_a_slow_link_are_named() -> None:
    every = places("a", "a", "b", "b")
    fast = [network.Link(one=one, other=(one + 1) % 4, rate=rate * 1e9) for one, rate in enumerate((9, 4, 1, 1.5))]
    _, reduced, inside, between = network.rows(every, measured(8, 8, 8, 3, links=fast))
    assert reduced.status is Status.warning
    assert reduced.found.startswith("8 GB/s of bus bandwidth at 64 MiB, 1 ms for 1 MiB")
    assert reduced.found.endswith("ranks differ: 3 GB/s to 8 GB/s, least on rank 3 (b)")
    assert inside.status is Status.warning
    assert inside.found == "median 5 GB/s over 2, slowest 1 GB/s between ranks 2 (b) and 3 (b)"
    assert "NCCL_SOCKET_IFNAME" in inside.do
    assert between.status is Status.ok  # 4 and 1.5 against their median: nothing to do with the links inside
    assert all(row.status is Status.ok for row in network.rows(every, measured(8, 8, 8, 5)))


# --- shared disk


def test_one_process_sees_its_own_file_and_lock_and_leaves_nothing(tmp_path: Path) -> None:
    found = disk.look(Meeting(0, 1), tmp_path, writes=True)
    (seen,) = found.values
    assert seen is not None
    assert (seen.same, seen.locked) == (True, "yes")
    assert {row.check for row in disk.rows(tmp_path, places("a"), found) if row.status is Status.ok} >= {
        "shared disk",
        "disk locks",
        "disk write",
    }
    assert list(tmp_path.iterdir()) == []


def test_all_processes_look_at_the_file_of_rank_0(tmp_path: Path) -> None:
    def action(meeting: Several) -> Stage[disk.Disk]:
        meeting.arrive("")
        return disk.look(meeting, tmp_path, writes=meeting.rank == 0)

    found = together([0, 1], 2, action)[0]
    assert found.errors == {}
    assert [(seen.same, seen.locked, seen.rate is None) for seen in found.values] == [
        (True, "yes", False),
        (True, "yes", True),
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_said_once_for_all(tmp_path: Path) -> None:
    def action(meeting: Several) -> Stage[disk.Disk]:
        meeting.arrive("")
        return disk.look(meeting, tmp_path / "absent", writes=False)

    stage, other = together([0, 1], 2, action)
    assert other.go is False
    (row,) = disk.rows(tmp_path / "absent", places("a", "b"), stage)
    assert row.status is Status.failed
    assert row.found.startswith(f"{tmp_path}/absent cannot be used: FileNotFoundError: ")
    assert row.found.endswith(" on node a")
    assert "mount it on every node" in row.do


def test_a_node_with_another_file_system_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "PATIENCE", 0.1)
    assert disk.examine(disk.Probe(folder=str(tmp_path), sha256=""), 1, writes=False) == disk.Disk()
    good = disk.Disk(seen=0.0, same=True, locked="yes", free=1 << 40, rate=1e9)
    values = [good, disk.Disk(), good.model_copy(update={"same": False}), good.model_copy(update={"free": 1 << 30})]
    every = places("a", "b", "c", "d")
    rows = [row for row in disk.rows(tmp_path, every, Stage(list(values), {}, True)) if row.status is not Status.ok]
    assert [(row.check, row.status) for row in rows] == [
        ("shared disk", Status.failed),
        ("shared disk", Status.failed),
        ("disk space", Status.warning),
    ]
    assert rows[0].found == f"a file of rank 0 in {tmp_path} was not seen within 0.1 s on node b"
    assert rows[1].found == f"a file of rank 0 in {tmp_path} has another content on node c"
    assert rows[2].found == "only 1.0 GiB on node d"
    assert all(row.do for row in rows)


def test_a_slow_node_and_locks_that_are_not_felt_are_named(tmp_path: Path) -> None:
    good = disk.Disk(seen=0.0, same=True, locked="yes", free=1 << 40, rate=2e9)
    other = good.model_copy(update={"rate": 2e8, "locked": "the lock of another process is not felt"})
    rows = list(disk.rows(tmp_path, places("a", "b", "c"), Stage([good, good, other], {}, True)))
    locks, write = (row for row in rows if row.status is Status.warning)
    assert locks.found == "the lock of another process is not felt on node c"
    assert "-o flock" in locks.do
    assert write.found == "0.2 GB/s to 2 GB/s from each node, 64 MiB with fsync; slow: c: 0.2 GB/s"


def test_a_file_system_without_locks_is_told_from_one_that_forgets_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuses)
        (seen,) = disk.look(Meeting(0, 1), tmp_path, writes=False).values
    assert seen is not None
    assert seen.locked == "locks are refused: Function not implemented"
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    (seen,) = disk.look(Meeting(0, 1), tmp_path, writes=False).values
    assert seen is not None
    assert seen.locked == "the lock of another process is not felt"


# --- the command


def test_one_process_alone_is_examined_and_strict_makes_warnings_fail(
    command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = command("doctor", "--folder", tmp_path)
    assert outcome.code == 0, outcome.out
    assert "not looked at: one process" in outcome.out
    assert outcome.out.rstrip().endswith("exit code 0")
    monkeypatch.setattr(disk, "SPACE", 1 << 80)
    outcome = command("doctor", "--json", "--folder", tmp_path)
    found = json.loads(outcome.out)
    assert (outcome.code, found["code"]) == (0, 0)
    (row,) = (row for row in found["rows"] if row["check"] == "disk space")
    assert row["status"] == "warning"
    assert row["do"].startswith("make room")
    assert found["processes"][0]["kernels"]["results"][0]["operator"] == "rpe_attention"
    assert command("doctor", "--strict", "--folder", tmp_path).code == 1


def test_a_failure_is_exit_code_1(command: Callable[..., Any], tmp_path: Path) -> None:
    outcome = command("doctor", "--folder", tmp_path / "absent")
    assert outcome.code == 1
    assert "1 FAILED; exit code 1" in outcome.out


def test_the_table_reads_at_a_hundred_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    console = cli_text.Console(width=100)
    monkeypatch.setattr(cli_text, "console", console)
    monkeypatch.setattr(report, "console", console)
    row = Row(
        "version of torch", Status.failed, "differs: 2.14.0 on node n[1]; 2.11.0 on " + "node n2, " * 20, "do this"
    )
    report.show_table(Examination([row], [], 1))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) == 100
    assert lines[3].startswith("│ version of torch │ FAILED │ differs: 2.14.0 on node n[1]; 2.11.0 on")
    assert lines[-3].startswith("│                  │        │ → do this ")
    assert lines[-1] == "doctor: 1 FAILED; exit code 1"
