"""Fixtures of all tests: a small synthetic catalog, a tiny configuration, and the command line inside this process."""

from __future__ import annotations

import logging
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: one thread gives the same bits in every process

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import settings
from processes import ROWS, TINY

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported: the tests run them on a CPU

from foundation import cli
from foundation.config import Config, load
from foundation.training import run as running
from foundation.training.run import train
from shards import synthetic
from shards.pack import SourceSpec, pack

torch.set_num_threads(1)
settings.register_profile("untimed", deadline=None)  # a busy machine is no error
settings.load_profile("untimed")
PUBLISH = running.publish
running.publish = lambda *_: None  # the report takes four times as long as the runs of the tests; see `reported`


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A test that trains with other threads changes no bit of the next one."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic chips of 40 x 40 pixels: 40 unlabelled, 48 train and 32 test in 8 classes, about 8 to a shard."""
    out = tmp_path_factory.mktemp("catalog")
    kinds = (*synthetic.CLASSES, "background", "clutter")
    specs = [
        SourceSpec("free", records=synthetic.generate("pretrain", kinds, 4, 40, 0, labelled=False)),
        SourceSpec("known", split="train", records=synthetic.generate("train", synthetic.CLASSES, 6, 40, 0)),
        SourceSpec("unseen", split="test", records=synthetic.generate("test", synthetic.CLASSES, 4, 40, 0)),
    ]
    pack(out, specs, shard_bytes=16_000)
    return out


@pytest.fixture
def tiny_yaml(tmp_path: Path, catalog: Path) -> Path:
    """The file of a configuration whose update takes milliseconds; its runs stand in `tmp_path/runs`."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.format(root=tmp_path, catalog=catalog))
    return path


@pytest.fixture
def compared(tmp_path: Path, tiny_yaml: Path) -> Callable[..., Path]:
    """`compared(rows="...", more="...")` → the file of a comparison of two tiny rows and two seeds."""

    def write(rows: str = ROWS, more: str = "") -> Path:
        path = tmp_path / "compared.yaml"
        path.write_text(
            f"name: pair\nconfig: {tiny_yaml.name}\nseeds: [0, 3]\nrows: {rows}\n"
            f"evaluate: {{protocols: [knn, fewshot], shots: [2, 3], draws: 2}}\n{more}"
        )
        return path

    return write


@pytest.fixture
def tiny_config(tiny_yaml: Path) -> Callable[..., Config]:
    """`tiny_config("train.samples=16", ...)` → the configuration with these overrides."""
    return lambda *overrides: load(tiny_yaml, overrides)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, catalog: Path) -> Path:
    """The run folder of the tiny configuration, trained to its end without a break; tests copy it."""
    root = tmp_path_factory.mktemp("finished")
    (root / "tiny.yaml").write_text(TINY.format(root=root, catalog=catalog))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "publish", PUBLISH)
        return train(load(root / "tiny.yaml"))


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end with their report, as those of `foundation train` do."""
    monkeypatch.setattr(running, "publish", PUBLISH)


class Outcome(NamedTuple):
    """Exit status and everything that was printed."""

    code: object
    out: str
    err: str


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`command("train", path)` runs the command line in this process. An unexplained exception fails the test."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr("sys.argv", ["foundation", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "300")
        monkeypatch.setenv("NO_COLOR", "1")
        capsys.readouterr()
        try:
            cli.main()
            code: object = 0
        except SystemExit as stop:
            code = stop.code or 0
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def upstream() -> Iterator[str]:
    """host:port of a real S3 server on loopback; all servers of a process hold the same objects."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield "{}:{}".format(*server.get_host_and_port())
    server.stop()
