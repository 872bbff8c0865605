"""The engine follows how the processes were started, and refuses what would be several separate trainings."""

from __future__ import annotations

import socket

import pytest
import torch
from torch import nn

from foundation.errors import ConfigError, LaunchError
from foundation.training import engine as engines

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("name", ["auto", "single"])
def test_one_process_trains_alone(name: str) -> None:
    engine = engines.start(name)
    assert (engine.name, engine.rank, engine.world_size) == ("single", 0, 1)
    assert engine.sum_int((1 << 48) - 1) == (1 << 48) - 1
    assert engine.mean(torch.tensor(3.0)) == 3
    model = nn.Linear(2, 2)
    assert engines.unwrap(engine.wrap(model)) is model


def test_auto_is_ddp_when_a_launcher_declared_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="engine ddp needs RANK, MASTER_ADDR, MASTER_PORT"):
        engines.start("auto")


def test_single_with_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="would train 2 separate models") as caught:
        engines.start("single")
    assert "use train.engine=auto, or start one process" in str(caught.value)


def test_ddp_without_a_launcher_says_how_to_start_it() -> None:
    with pytest.raises(LaunchError, match="needs RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT") as caught:
        engines.start("ddp")
    assert "torchrun --nproc-per-node N -m foundation train CONFIG" in str(caught.value)


def test_an_unknown_engine_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown engine 'dpp'") as caught:
        engines.start("dpp")
    assert "choose auto, single, ddp" in str(caught.value)


@pytest.mark.usefixtures("group_of_one")
def test_a_group_of_one_is_the_plain_model_with_the_same_gradient() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    model(x).square().mean().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    engine = engines.start("ddp")
    try:
        model, x = model.to(engine.device), x.to(engine.device)
        wrapped = engine.wrap(model)
        assert engines.unwrap(wrapped) is model
        for last in (False, True):  # two halves of the mean
            with engine.accumulate(wrapped, last):
                (wrapped(x).square().mean() / 2).backward()
        for p, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, gradient.to(engine.device))
        assert engine.sum_int((1 << 48) - 1) == (1 << 48) - 1
        assert engine.mean(torch.tensor(2.0, device=engine.device)) == 2
    finally:
        engine.close()
    assert not torch.distributed.is_initialized()
