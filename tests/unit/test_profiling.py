"""A profile is a trace and a page about a few updates, and changes nothing that is learnt."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from foundation.config import Config
from foundation.errors import StorageError
from foundation.profiling.parts import PARTS, Parts
from foundation.profiling.profile import Updates, profile
from foundation.profiling.summary import page, ranked
from foundation.training import engines

Make = Callable[..., Config]
Command = Callable[..., Any]


def test_the_command_writes_a_trace_and_a_page(tiny_yaml: Path, tmp_path: Path, command: Command) -> None:
    code, out, err = command("profile", tiny_yaml, "--steps", 2, "--warmup", 1, "optim.ema_half_life=40",
                             "train.micro_batch=4")  # fmt: skip
    assert code == 0, err
    folder = tmp_path / "runs" / "tiny" / "profile"
    assert [file.name for file in sorted(folder.iterdir())] == ["summary.md", "trace.json.gz"], "no run was begun"
    trace = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"] if event.get("ph") == "X"]
    for part, calls in zip(PARTS, (4, 4, 4, 6, 4, 6), strict=True):  # two micro-batches, and what an update has once
        assert names.count(f"## {part}") == calls, part
    text = (folder / "summary.md").read_text()
    for words in ("| waiting for data |", "| backward |", "| of these: collectives | - |", "aten::", "peak rss gb",
                  "Means of 2 updates"):  # fmt: skip
        assert words in text
    assert "Operators, the 15 longest" in out
    assert str(folder / "trace.json.gz") in out
    assert not any(operator in text for operator in ("| ## ", "ProfilerStep"))


def test_parts_are_seen_without_a_change_of_what_is_learnt(tiny_config: Make) -> None:
    config = tiny_config()
    plain, watched = (Updates(config, engines.start(config), 4) for _ in range(2))
    plain.run(4)
    parts = Parts(torch.device("cpu"), timed=True)
    with parts.watch(watched.learner) as learner:
        watched.run(2, learner)
    seconds = dict(parts.seconds)
    watched.run(2)
    assert all(value > 0 for value in seconds.values())
    assert parts.seconds == seconds, "nothing is measured any more"
    for one, two in zip(plain.learner.model.parameters(), watched.learner.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_samples_of_a_profile_may_be_more_than_those_of_the_run(tiny_config: Make) -> None:
    found = profile(tiny_config("train.samples=16"), steps=1, warmup=2)
    assert found is not None
    assert found.update > 0
    assert "1 process(es)" in page(found)


def test_a_profile_that_cannot_be_written_is_explained(tiny_config: Make) -> None:
    config = tiny_config()
    config.run_folder.mkdir(parents=True)
    (config.run_folder / "profile").write_text("a file")
    with pytest.raises(StorageError, match="cannot be written"):
        profile(config, steps=1, warmup=1)


def test_operators_are_ranked_by_their_own_time_and_stretches_left_out() -> None:
    rows = {"aten::mm": (4, 3e6), "## backward": (2, 9e6), "ProfilerStep*": (2, 9e6), "c10d::allreduce_": (2, 1e6),
            "aten::view": (4, 0.0)}  # fmt: skip
    averages = [SimpleNamespace(key=k, count=n, self_cpu_time_total=t, self_device_time_total=t / 2)
                for k, (n, t) in rows.items()]  # fmt: skip
    operators, collective = ranked(averages, 2, cuda=False)
    assert operators == [("aten::mm", 2.0, 1.5, 0.75), ("c10d::allreduce_", 1.0, 0.5, 0.25)]
    assert collective == 0.5
    assert ranked(averages, 2, cuda=True)[1] == 0.25
