"""How the processes of `foundation doctor` meet: who came, who is missing, and what each has said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from doctor_threads import together

from foundation.errors import LaunchError
from foundation.training.declared import declared
from launch.doctor import facts
from launch.doctor.meeting import Several, Stage, meet
from launch.doctor.rows import Frozen, Row, Status


class Said(Frozen):
    """What a process of these tests says."""

    text: str


def test_all_who_come_are_known_to_rank_0_alone_and_its_verdict_to_all() -> None:
    def action(meeting: Several) -> tuple[bool, bool, list[str], str]:
        came = sorted(meeting.arrive(f"rank {meeting.rank}"))
        verdict = meeting.share("verdict", str(meeting.rank))
        meeting.leave()
        return meeting.reporter, meeting.complete, came, verdict

    found = together([0, 1, 2], 3, action)
    assert found == [(True, True, ["rank 0", "rank 1", "rank 2"], "0"), *[(False, True, [], "0")] * 2]


@pytest.mark.parametrize(("ranks", "size"), [([0, 1, 1], 3), ([0, 0, 1], 3), ([1, 1], 2), ([0, 1], 3), ([1, 2], 3)])
def test_a_meeting_of_wrong_ranks_is_incomplete_for_all_and_one_process_knows_who_came(
    ranks: list[int], size: int
) -> None:
    patience = 20 if len(ranks) == size else 1

    def outcome(meeting: Several) -> tuple[bool, bool, list[str]]:
        came = sorted(meeting.arrive(str(meeting.rank)))
        meeting.leave()
        return meeting.reporter, meeting.complete, came

    found = together(ranks, size, outcome, patience)
    assert [complete for _, complete, _ in found] == [False] * len(ranks)
    (came,) = (came for reporter, _, came in found if reporter)
    assert came == [str(rank) for rank in sorted(ranks)]


def test_a_process_too_many_is_refused() -> None:
    found = together([0, 1, 1], 2, lambda meeting: meeting.arrive(""))
    (error,) = (each for each in found if isinstance(each, Exception))
    assert isinstance(error, LaunchError)
    assert "process 3 of a world of 2 has come, as rank" in str(error)
    assert "give each run a MASTER_PORT of its own" in str(error)


def test_what_fails_on_one_rank_or_is_not_answered_is_known_by_rank_and_stops_all() -> None:
    def action(meeting: Several) -> Stage[Said] | None:
        meeting.arrive("")

        def work() -> Said:
            if meeting.rank == 1:
                raise LaunchError("it is broken", where="here", do="repair it")
            if meeting.rank == 2:
                raise ValueError("no number")
            return Said(text=f"from {meeting.rank}")

        return None if meeting.rank == 3 else meeting.stage("work", Said, work)

    first, *others = together([0, 1, 2, 3], 4, action, patience=1)
    assert first.values == [Said(text="from 0"), None, None, None]
    assert first.errors == {1: "it is broken", 2: "ValueError: no number", 3: "no answer within 1 s"}
    assert [stage.go for stage in (first, *others[:2])] == [False] * 3


def test_alone_everything_is_said_by_the_process_itself() -> None:
    alone = meet(declared({}), 1)
    assert (alone.size, alone.arrive("me"), alone.share("topic", "word")) == (1, ["me"], "word")
    assert alone.stage("work", Said, lambda: Said(text="done")) == Stage([Said(text="done")], {}, True)


def test_a_launch_that_cannot_meet_says_why(monkeypatch: pytest.MonkeyPatch, command: Callable[..., Any]) -> None:
    with pytest.raises(LaunchError, match="2 processes need RANK, MASTER_ADDR, MASTER_PORT in the environment"):
        meet(declared({"WORLD_SIZE": "2"}), 1)
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "29500"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    outcome = command("doctor")
    assert outcome.code == 2
    assert "LaunchError: the process group cannot be formed: " in outcome.err
    assert "where: nowhere.invalid:29500" in outcome.err
    assert "do:    see that this address resolves" in outcome.err


# --- who is there


@pytest.fixture(scope="module")
def mine() -> facts.Facts:
    return facts.look(0, declared({}), {"SLURMD_NODENAME": "a"})


def process(mine: facts.Facts, rank: int, node: str, local: int, world: int = 4, **update: int) -> facts.Facts:
    new = {"rank": rank, "node": node, "local_rank": local, "world_size": world, "pid": 100 + rank, **update}
    return mine.model_copy(update=new)


def test_ranks_that_are_missing_or_exist_twice_are_named(mine: facts.Facts) -> None:
    came = [process(mine, 0, "a", 0), process(mine, 1, "a", 1), process(mine, 1, "b", 0, pid=7)]
    missing, twice, launcher = facts.rows(came, 4, 30)
    assert missing.status is twice.status is Status.failed
    assert launcher == Row("launcher", Status.ok, "world size 4, engine auto")
    assert missing.found == "missing after 30 s: rank 2, 3 of 4; here: a (2), b (1)"
    assert twice.found == "rank 1 exists 2 times: process 101 on a, process 7 on b"
    assert "--node-rank" in twice.do


def test_other_numbers_in_the_environment_and_uneven_nodes_are_named(mine: facts.Facts) -> None:
    came = [process(mine, 0, "a", 0, 3), process(mine, 1, "a", 0, 3), process(mine, 2, "b", 0, 2)]
    sizes, local, spread = facts.rows(came, 3, 30)
    assert (sizes.status, sizes.found) == (
        Status.failed,
        "differs: world size 3, engine auto on node a; world size 2, engine auto on node b",
    )
    assert local.found == "the same LOCAL_RANK for several processes of a node (a: 0)"
    assert (spread.status, spread.found) == (Status.warning, "3 on 2 nodes; b has 1")
    even = [process(mine, rank, "ab"[rank // 2], rank % 2) for rank in range(4)]
    _, spread = facts.rows(even, 4, 30)
    assert spread == Row("processes", Status.ok, "4 on 2 nodes, 2 each: a, b")
    mixed = [each.model_copy(update={"engine": "fsdp2" if each.rank else "zero3"}) for each in even]
    (row,) = (row for row in facts.rows(mixed, 4, 30) if row.status is Status.failed)
    assert "world size 4, engine zero3 on rank 0 (a)" in row.found


def test_tasks_of_srun_that_do_not_know_of_each_other_have_failed() -> None:
    lonely = facts.look(0, declared({}), {"SLURM_STEP_NUM_TASKS": "8", "SLURMD_NODENAME": "n3"})
    row, *_ = facts.rows([lonely], 1, 30)
    assert (row.status, row.found) == (Status.failed, "one of 8 tasks of srun that do not know of each other")
    assert "torchrun" in row.do
    assert lonely.node == "n3"
