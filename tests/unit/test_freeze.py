"""What a job runs is a copy of the code as it was sent."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import ROOT

from launch import freeze


@pytest.mark.parametrize("checkout", [True, False])
def test_the_frozen_code_is_that_of_the_packages_without_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkout: bool
) -> None:
    if not checkout:
        monkeypatch.setattr(freeze, "_git", lambda *_: None)
    code = freeze.freeze(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(freeze.PACKAGES)
    for name in ("launch/chain.py", "launch/slurm/train.sbatch.j2", "foundation/cli.py"):
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()
    assert list(tmp_path.rglob("__pycache__")) == []
    if not checkout:
        assert code == (None, False)
