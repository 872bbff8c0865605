"""What a run folder says is read whole, damaged lines are counted, and nothing is invented where nothing is known."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from inspected_runs import BEGAN, event, lines, metric, run_of_three_attempts
from processes import record

from foundation.errors import DataError, StorageError
from foundation.evaluation.figures.operations import speed_figure, time_figure
from foundation.inspecting import inspection, text, words
from foundation.inspecting.attempts import alive
from foundation.inspecting.coverage import spans
from foundation.inspecting.inspection import inspect
from foundation.inspecting.lines import read_lines
from foundation.inspecting.timing import Spent, utilisation, windows
from foundation.planning.cluster import GPUS

Command = Callable[..., Any]


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    return run_of_three_attempts(tmp_path / "broken")


def section(found: inspection.Inspection, anchor: str) -> text.Section:
    return next(each for each in text.sections(found) if each.anchor == anchor)


def test_every_attempt_has_its_beginning_its_end_and_what_was_done_again(broken: Path) -> None:
    found = inspect(broken, data=False)
    facts = [(a.kind, a.position, a.reached, a.status, a.redone, a.world_size) for a in found.attempts]
    assert facts == [
        ("start", 0, 300, "killed", 0, 2),
        ("restart", 200, 400, "stopped", 100, 4),
        ("restart", 400, 500, "failed", 0, 4),
    ]
    assert [attempt.idle_s for attempt in found.attempts] == [None, 79.0, 78.0]
    assert found.state == "failed"
    table = section(found, "restarts")
    assert table.rows[1] == ("2 (restart)", "2023-11-14 22:15:00", "200", "400", "100", "stopped: SIGTERM", "4", "ddp",
                             "node1", "0123456789ab")  # fmt: skip
    assert table.notes == ("100 samples were seen again after 2 restart(s).",)
    assert ("why", "NumericsError: the gradient norm is nan") in section(found, "state").rows


def test_the_time_is_divided_and_adds_up(broken: Path) -> None:
    found = inspect(broken, data=False)
    assert found.spent == Spent(50.0, 10.0, 3.0, 1.0, 36.0)
    rows = {row[0]: row[2] for row in section(found, "time").rows}
    assert rows["waiting for data"] == "20.0%"
    assert rows["standing still for checkpoints"] == "6.0%"
    assert "0:02:37" in section(found, "time").notes[1]


def test_lines_of_older_programs_have_their_time_from_their_positions() -> None:
    rows = [metric(100, 1), metric(150, 2), metric(300, 3, images_per_s=None)]
    for row in rows:
        del row["window_s"]
    assert [window.seconds for window in windows(rows)] == [10.0, 5.0]


def test_guard_events_of_any_kind_are_shown_with_their_facts(broken: Path) -> None:
    rows = section(inspect(broken, data=False), "events").rows
    assert [row[1:] for row in rows] == [("300", "damaged", "samples 2"), ("500", "spike", "score 9.5, loss None")]


def test_many_events_are_counted_and_the_newest_shown(broken: Path) -> None:
    lines(broken / "events.jsonl", [event("skipped", n, n) for n in range(50)])
    table = section(inspect(broken, data=False), "events")
    assert len(table.rows) == text.NEWEST
    assert table.rows[-1][1] == "49"
    assert table.notes == ("50 x skipped",)


def test_the_slowest_processes_are_named(broken: Path) -> None:
    lines(broken / "metrics.jsonl", [
        metric(n, n, slowest_rank=rank, slowest_ratio=ratio, slowest_wait=0.5)
        for n, rank, ratio in ((1, 5.0, 1.0), (2, 3.0, 2.0), (3, 3.0, 4.0))
    ])  # fmt: skip
    found = inspect(broken, data=False)
    assert found.stragglers == [(3, 2, 3.0, 4.0, 0.5), (5, 1, 1.0, 1.0, 0.5)]
    assert section(found, "stragglers").rows[0] == ("3", "67% of 3", "3.00", "4.00", "50.0%")


def test_damaged_lines_are_counted_and_the_others_read(broken: Path, command: Command) -> None:
    with (broken / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n[1]\n{"position": "x", "time": 1}\n{"position": -5, "time": 1}\n{"position": 600, "ti')
    with (broken / "events.jsonl").open("a") as file:
        file.write('{"position": 1, "time": 1}\n' + "[" * 100_000 + "\n")
    found = inspect(broken, data=False)
    assert found.damaged == {"metrics.jsonl": 5, "events.jsonl": 2}
    assert (found.position, len(found.rows), len(found.events)) == (500, 5, 9)
    code, out, _ = command("inspect", broken)
    assert code == 0
    assert "5 damaged line(s) of metrics.jsonl were left out" in out


def test_a_run_without_metrics_says_so(tmp_path: Path, command: Command) -> None:
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    code, out, _ = command("inspect", tmp_path / "new")
    assert code == 0
    for said in ("not started", "holds no lines yet", "no time was logged yet", "there is no events.jsonl",
                  "holds no checkpoint", "there is no config.yaml", "there is no environment.json"):  # fmt: skip
        assert said in out


@pytest.mark.parametrize(
    ("name", "what"), [("none", "there is no such run folder"), ("empty", "this folder holds no run")]
)
def test_what_is_no_run_is_named(tmp_path: Path, command: Command, name: str, what: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=what):
        inspect(tmp_path / name)
    code, _, err = command("inspect", tmp_path / name)
    assert code == 2
    assert f"{what}\n" in err
    assert "name a run folder" in err


def test_a_record_that_cannot_be_read_is_named(broken: Path) -> None:
    (broken / "metrics.jsonl").unlink()
    (broken / "metrics.jsonl").mkdir()
    with pytest.raises(StorageError, match=r"metrics.jsonl cannot be read: Is a directory"):
        read_lines(broken / "metrics.jsonl")


def test_a_process_that_lives_is_told_from_one_that_does_not(tmp_path: Path) -> None:
    assert not alive(tmp_path)
    for owner, there in ((f"process {os.getpid()} on {socket.gethostname()}", True), ("process 1 on elsewhere", False),
                         (f"process {2**22 + 1} on {socket.gethostname()}", False), ("?", False)):  # fmt: skip
        (tmp_path / ".lock").write_text(f"{owner}\n")
        assert alive(tmp_path) == there


def test_a_run_that_goes_on_is_running_and_one_of_another_machine_unheard_of(broken: Path) -> None:
    lines(broken / "events.jsonl", [event("start", 0, 0)])
    assert inspect(broken, data=False).state == "no word"
    (broken / ".lock").write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    assert inspect(broken, data=False).state == "running"


def test_a_run_that_has_seen_all_is_complete_while_it_writes_its_report(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    lines(run / "events.jsonl", [event("start", 0, 0)])
    found = inspect(run, data=False)
    assert (found.state, found.attempts[0].status) == ("complete", "complete")


def test_utilisation_is_known_for_known_devices_only(finished: Path) -> None:
    from foundation.config import load

    config = load(finished / "config.yaml")
    record = {"device": "NVIDIA H100 80GB HBM3", "world_size": 2}
    one = utilisation(1000.0, config, record)
    assert one is not None
    assert utilisation(2000.0, config, record) == pytest.approx(2 * one)
    assert utilisation(1000.0, config, {**record, "world_size": 4}) == pytest.approx(one / 2)
    half = config.model_copy(update={"train": config.train.model_copy(update={"precision": "bf16"})})
    assert utilisation(1000.0, half, record) == pytest.approx(one * GPUS["h100"].fp32 / GPUS["h100"].bf16)
    for other in ({}, {"device": "x86_64", "world_size": 1}, {"device": "Some CPU", "world_size": 1}):
        assert utilisation(1000.0, config, other) is None


def test_a_real_run_is_told_whole(finished: Path, command: Command) -> None:
    code, out, err = command("inspect", finished)
    assert code == 0, err
    for said in ("complete", "96 (100.0% of 96)", "1 (start)", "finished", "samples-000000000096", "newest", "single",
                  "known", "free", "no collapse"):  # fmt: skip
        assert said in out
    code, out, _ = command("inspect", finished, "--json")
    found = json.loads(out)
    assert [row["loss"] for row in found["rows"]] == [row["loss"] for row in record(finished)]
    seen = {row["source"]: row["seen"] for row in found["coverage"]["sources"]}
    assert sum(seen.values()) == found["position"] == 96
    assert seen["known"] == pytest.approx(96 * 48 / 88, abs=8)
    newest = found["checkpoints"]["kept"][0]
    files = [file for file in (finished / "checkpoints" / newest["name"]).rglob("*") if file.is_file()]
    total = sum(file.stat().st_size for file in files if file.name not in ("manifest.json", "COMMIT"))
    assert (newest["position"], newest["newest"], newest["bytes"]) == (96, True, total)
    assert [event["position"] for event in found["events"] if event["kind"] == "checkpoint"] == [16, 32, 48, 64, 80, 96]


def test_pins_removed_and_damaged_checkpoints_are_told_apart(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    kept = run / "checkpoints"
    shutil.rmtree(kept / "samples-000000000016")
    (kept / "samples-000000000032" / "PIN").write_text('{"score": 0.75, "name": "probe"}')
    manifest = kept / "samples-000000000032" / "manifest.json"  # of a version that left the score to the PIN
    manifest.write_text(json.dumps({k: v for k, v in json.loads(manifest.read_text()).items() if k != "score"}))
    (kept / "samples-000000000048" / "PIN").write_text("mine")
    (kept / "samples-000000000096" / "COMMIT").unlink()
    found = inspect(run, data=False).checkpoints
    by = {each.position: each for each in found.kept}
    assert (by[32].pin, by[32].best, by[48].pin, found.gone) == ("probe 0.75", True, "by hand", 1)
    assert by[96].flaw.startswith("has no COMMIT marker")
    assert [each.position for each in found.kept if each.newest] == [80]


def test_damaged_samples_count_for_their_source_once_for_each_position(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    # Ids go through the sources by name: 40 of `free`, then 48 of `known`.
    rows = [{"position": p, "corrupt": c, "used": 0} for p, c in ((1, 3), (1, 3), (2, 39), (3, 40), (4, 9999))]
    lines(run / "replaced.jsonl", rows)
    found = inspect(run).coverage
    assert found is not None
    assert {source.source: source.damaged for source in found.sources} == {"free": 2, "known": 1}


def test_what_the_run_passed_over_was_not_seen(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "jumps.json").write_text('{"jumps": [[48, 64], [8, 24], [16, 32], [80, 200]]}')
    assert spans(run, 96) == [(8, 24), (24, 32), (48, 64), (80, 96)]
    found = inspect(run).coverage
    assert found is not None
    assert sum(source.seen for source in found.sources) == 96 - 24 - 16 - 16
    assert sum(source.share for source in found.sources) == pytest.approx(1.0)


def test_a_catalog_that_is_gone_or_changed_is_said_to_be(finished: Path, tmp_path: Path, catalog: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    environment = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps({**environment, "data": "x, fingerprint 0"}))
    found = inspect(run)
    assert section(found, "coverage").notes[0].startswith("the catalog is not the one of the run any more")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(catalog), f"{tmp_path}/gone"))
    assert section(inspect(run), "coverage").notes == ("the catalog cannot be opened: no catalog here",)


def test_figures_of_speed_and_time_are_drawn(broken: Path, tmp_path: Path) -> None:
    found = inspect(broken, data=False)
    for draw in (
        lambda: speed_figure(found.windows, found.attempts, tmp_path / "s.png"),
        lambda: speed_figure(found.windows, [], tmp_path / "alone.png"),
        lambda: time_figure(found.windows, tmp_path / "t.png"),
    ):
        assert draw().read_bytes().startswith(b"\x89PNG")
    assert windows([metric(1, BEGAN)])[0].rest == 8.0


def test_a_curve_is_a_line_of_bars() -> None:
    assert words.bars([0.0, 1.0, 2.0]) == "▁▅█"
    assert words.bars([1.0]) == "▁"
    assert len(words.bars([float(n) for n in range(1000)])) == words.COLUMNS


def test_sections_of_an_unfinished_record_need_no_attempt(broken: Path) -> None:
    found = replace(inspect(broken, data=False), attempts=[], position=0)
    assert section(found, "restarts").notes[0].startswith("there is no events.jsonl")
