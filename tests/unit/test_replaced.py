"""Damaged samples are listed in the run folder by the process that met them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from foundation.config import Config, from_dict
from foundation.errors import StorageError
from foundation.training.data import REPLACED, report_replaced
from shards.stream import Batch, Replaced


def config(root: Path) -> Config:
    return from_dict({"name": "run", "run_root": str(root / "runs")})


def batch() -> Batch:
    one = torch.zeros(1)
    damaged = Replaced(7, 3, 4, "the sha256 differs")
    return Batch([torch.zeros(1, 4, 4)], one, one, one.long(), one.long() + 7, one.long() + 4, (damaged,))


def test_a_process_whose_node_has_no_run_folder_makes_one(tmp_path: Path) -> None:
    for _ in range(2):
        assert report_replaced(config(tmp_path), [batch()], rank=5) == 1
    rows = [json.loads(line) for line in (tmp_path / "runs" / "run" / REPLACED).read_text().splitlines()]
    assert rows == [{"rank": 5, "position": 7, "corrupt": 3, "used": 4, "reason": "the sha256 differs"}] * 2


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(StorageError, match=r"cannot be written: (Not a directory|File exists)[\s\S]*replaced\.jsonl"):
        report_replaced(config(tmp_path), [batch()], rank=5)
