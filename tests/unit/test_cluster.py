"""A cluster file is checked whole, and every delivered one gives a job script."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from processes import ROOT

from foundation.errors import ConfigError
from launch.cluster import load_cluster
from launch.submit import Submission, prepare, render

CLUSTERS = ROOT / "launch" / "slurm"
CONFIG = ROOT / "configs" / "sar-jepa.yaml"


@pytest.mark.parametrize("path", sorted(CLUSTERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_delivered_cluster_gives_a_script_that_bash_accepts(path: Path, tmp_path: Path) -> None:
    run = Submission(prepare(CONFIG, CLUSTERS / "cpu.yaml", ["data.catalog=x"]).config, load_cluster(path), {})
    for each in (run, replace(run, data="s3://x", tasks=(("a b", "knn"),))):
        subprocess.run(["bash", "-n"], input=render(each, tmp_path), text=True, check=True)


def test_all_mistakes_of_a_cluster_file_are_named_at_once(tmp_path: Path) -> None:
    text = 'partiton: x\nnodes: 0\ntime: 24:00:00\nmem: lots\nenv: {A B: c}\nlauncher: mpirun\nsetup: ["a\\nb"]\n'
    path = tmp_path / "cluster.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_cluster(path)
    error = str(caught.value)
    assert "Found 7 errors" in error
    assert "partiton = 'x': no such key; did you mean partition?" in error
    assert "nodes = 0: whole number >= 1" in error
    assert 'HH:MM:SS in quotes, e.g. "24:00:00": without them YAML makes it a number' in error
    assert "launcher = 'mpirun': one of torchrun, accelerate" in error
    assert "a name of an environment variable, such as NCCL_DEBUG" in error
    assert "setup.0 = 'a\\nb': text in one line" in error
    assert "launch/cluster.py lists every key" in error
