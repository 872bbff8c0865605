"""`foundation doctor` by real processes: one table for all, and one exit code."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest
from processes import ROOT, finish, start

SCRIPT = Path(__file__).with_name("doctor_rank.py")


def torchrun(*arguments: object) -> tuple[int, str]:
    """Two processes."""
    return finish(start(*arguments, program=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def rows(output: str) -> dict[str, str]:
    """Check → status and found of each row of the table, in one line."""
    found: dict[str, str] = {}
    name = ""
    for line in output.splitlines():
        if line.startswith("│"):
            check, *rest = (cell.strip() for cell in line.strip("│").split("│"))
            name = check or name
            found[name] = " ".join([found.get(name, ""), *filter(None, rest)]).strip()
    return found


@pytest.mark.slow
def test_two_sound_processes_give_one_record_and_exit_code_0(tmp_path: Path) -> None:
    code, output = torchrun("-m", "foundation", "doctor", "--json", "--seconds", "0.3", "--folder", tmp_path)
    assert code == 0, output
    found = json.loads(output[output.index("{\n") :])  # one object, nothing after it
    assert found["code"] == 0
    statuses = {row["check"]: row["status"] for row in found["rows"]}
    for check in ("packages", "versions", "commit", "source files", "kernels", "clock skew", "all-reduce"):
        assert statuses[check] == "ok", found["rows"]
    for check in ("processes", "links inside nodes", "shared disk", "disk locks", "disk write"):
        assert statuses[check] == "ok", found["rows"]
    assert "failed" not in statuses.values()
    one, two = found["processes"]
    assert (one["rank"], two["rank"]) == (0, 1)
    assert one["pid"] != two["pid"]
    assert one["disk"]["rate"] > 0
    assert two["disk"]["rate"] is None  # the first process of a node has measured it
    assert two["disk"]["locked"] == "yes"
    assert [timing["size"] for timing in two["network"]["all_reduce"]] == [2**20, 2**24, 2**26]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_node_that_deviates_is_named_with_what_to_do_and_every_process_ends_with_1(tmp_path: Path) -> None:
    code, output = torchrun(SCRIPT, "doctor", "--seconds", "0.3", "--folder", tmp_path)
    assert code == 1, output
    assert output.count("┏") == 1  # one table
    found = rows(output)
    assert found["processes"] == "ok 2 on 2 nodes, 1 each: n0, n1"
    assert re.search(r"FAILED differs: 2\.\S+ on node n0; 2\.11\.0 on node n1", found["version of torch"])
    assert found["version of torch"].endswith("→ use one environment, or one image, on all nodes")
    assert found["versions"].startswith("ok python 3.")
    assert found["commit"].startswith("FAILED differs: ")
    assert "0123456789ab with changes on node n1 → start all processes from one checkout" in found["commit"]
    assert "000000000000 on node n1" in found["source files"]
    wrong = f"FAILED `kernels` is /opt/site-packages/kernels, not {ROOT}/kernels on node n1 → pip uninstall kernels, or"
    assert found["packages"].startswith(wrong)
    assert "warning against the node of rank 0: n1 is 5.0 s ahead → start chrony" in found["clock skew"]
    assert "between ranks 0 (n0) and 1 (n1)" in found["links between nodes"]
    assert found["disk locks"] == "ok a lock of rank 0 is felt"
    assert re.search(r"doctor: \d+ ok, \d+ note, \d+ warning, 4 FAILED; exit code 1", output)
    assert set(re.findall(r"exitcode  : (-?\d+)", output)) <= {"1", "-15"}


@pytest.mark.slow
def test_a_rank_that_exists_twice_and_one_that_is_missing_are_named_and_nothing_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for local, rank in enumerate("011"):
        for name, value in (shared | {"RANK": rank, "LOCAL_RANK": str(local)}).items():
            monkeypatch.setenv(name, value)
        processes.append(start("doctor"))
    ended = [finish(process) for process in processes]
    assert [code for code, _ in ended] == [1, 1, 1], ended
    assert [output for _, output in ended[1:]] == ["", ""]
    found = rows(ended[0][1])["processes"]
    assert re.search(r"FAILED missing: rank 2 of 3; here: \S+ \(3\)", found)
    assert re.search(r"FAILED rank 1 exists 2 times: process \d+ on \S+, process \d+ on ", found)
    assert "→ give each process a RANK of its own" in found
