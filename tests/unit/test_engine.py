"""The engine follows how the processes were started, and refuses what would be several separate trainings."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from foundation.config import Config, from_dict
from foundation.errors import ConfigError, LaunchError
from foundation.training import engine as engine_module
from foundation.training import engines
from foundation.training.blocks import eight_bits, on_meta, prepare
from foundation.training.declared import declared
from foundation.training.engine import Engine
from foundation.training.setup import build_learner
from foundation.training.step import train_step
from foundation.training.stopping import Stopped

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ACCELERATE = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE", "FSDP_VERSION")
Make = Callable[..., Config]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCHER, *ACCELERATE, "FSDP_SHARDING_STRATEGY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def config(name: str) -> Config:
    made = from_dict({})
    return made.model_copy(update={"train": made.train.model_copy(update={"engine": name})})


@pytest.mark.parametrize("name", ["auto", "single"])
def test_one_process_trains_alone(name: str) -> None:
    engine = engines.start(config(name))
    assert (engine.name, engine.rank, engine.world_size) == ("single", 0, 1)
    assert engine.sum_int((1 << 48) - 1) == (1 << 48) - 1
    assert engine.mean(torch.tensor(3.0)) == 3
    assert (engine.agree(True)(), engine.agree(False)()) == (True, False)
    assert engine.ranks().gather("me") == ["me"]


def test_auto_is_ddp_when_a_launcher_declared_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="engine ddp needs RANK, MASTER_ADDR, MASTER_PORT"):
        engines.start(config("auto"))


@pytest.mark.parametrize(
    ("environment", "engine"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_SHARDING_STRATEGY": "FULL_SHARD"}, "fsdp2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, "hsdp"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "zero1"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero3"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "zero2"),
        ({"ACCELERATE_USE_FSDP": "false", "WORLD_SIZE": "8"}, None),
    ],
)
def test_what_accelerate_launch_declares_is_read_from_the_environment(
    environment: dict[str, str], engine: str | None
) -> None:
    assert declared(environment).engine == engine


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, r"declares FSDP version 1[\s\S]*fsdp_version: 2"),
        ({"ACCELERATE_USE_FSDP": "1", "FSDP_VERSION": "2", "FSDP_SHARDING_STRATEGY": "NO_SHARD"}, "NO_SHARD"),
        ({"ACCELERATE_USE_FSDP": "1", "ACCELERATE_USE_DEEPSPEED": "1"}, "FSDP and DeepSpeed at once"),
        ({"ACCELERATE_USE_DEEPSPEED": "1", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "ZeRO stage 0"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({"ACCELERATE_USE_FSDP": "1", "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "a parallelism_config"),
        (
            {"ACCELERATE_USE_DEEPSPEED": "1", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"},
            r"a DeepSpeed configuration file[\s\S]*zero_stage",
        ),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is no number"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, r"srun started several tasks[\s\S]*foundation submit"),
    ],
)
def test_declarations_that_nothing_here_obeys_are_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        declared(environment)


def test_a_configuration_that_contradicts_the_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=r"says engine fsdp2, accelerate launch declares zero2[\s\S]*engine=auto"):
        engines.start(config("fsdp2"))


def test_single_with_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="would train 2 separate models") as caught:
        engines.start(config("single"))
    assert "use train.engine=auto, or start one process" in str(caught.value)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "hsdp", "zero2"])
def test_an_engine_of_several_processes_without_a_launcher_says_how_to_start_it(name: str) -> None:
    with pytest.raises(LaunchError, match="needs RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT") as caught:
        engines.start(config(name))
    assert "torchrun --nproc-per-node N -m foundation train CONFIG" in str(caught.value)


def test_an_unknown_engine_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown engine 'dpp'") as caught:
        engines.start(config("dpp"))
    assert "choose auto, single, ddp, fsdp2" in str(caught.value)


def test_an_engine_whose_library_is_absent_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    row = engines.ENGINES["zero3"]._replace(unavailable="needs DeepSpeed: pip install 'sar-foundation[deepspeed]'")
    monkeypatch.setitem(engines.ENGINES, "zero3", row)
    with pytest.raises(LaunchError, match=r"engine zero3 cannot run here: needs DeepSpeed: pip install"):
        engines.start(config("zero3"))


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_a_master_that_cannot_be_found_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(engine_module, "JOIN", timedelta(seconds=1))
    with pytest.raises(LaunchError, match=r"the process group cannot be formed[\s\S]*where: no-such-host.invalid:"):
        engines.start(config(name))


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_a_group_of_one_learns_what_a_single_process_learns(tiny_config: Make, name: str) -> None:
    from foundation.training.data import open_data, open_stream

    rows: list[Any] = []
    for each in ("single", name):
        wanted = tiny_config(f"train.engine={each}", "train.micro_batch=4")
        engine = engines.start(wanted) if each != "single" else Engine(wanted)
        try:
            learner = build_learner(wanted, engine)
            batches = list(open_stream(wanted, open_data(wanted), engine, 0))
            steps = [train_step(learner, batches[2 * i : 2 * i + 2], 8 * i) for i in range(3)]
            rows.append([step[name].item() for step in steps for name in ("loss", "grad_norm")])
            assert engine.sum_int((1 << 48) - 1) == (1 << 48) - 1
            assert (engine.agree(True)(), engine.agree(False)()) == (True, False)
        finally:
            engine.close()
    assert rows[0] == pytest.approx(rows[1], rel=1e-6)
    assert not torch.distributed.is_initialized()


@pytest.mark.usefixtures("group_of_one")
def test_products_in_eight_bits_learn_nearly_what_bf16_learns(tiny_config: Make) -> None:
    from foundation.training.data import open_data, open_stream

    losses = []
    for eight in ("false", "true"):
        wanted = tiny_config("train.engine=fsdp2", "train.precision=bf16", f"train.float8={eight}")
        engine = engines.start(wanted)
        try:
            learner = build_learner(wanted, engine)
            batches = iter(open_stream(wanted, open_data(wanted), engine, 0))
            losses.append([train_step(learner, [next(batches)], 8 * i)["loss"].item() for i in range(3)])
        finally:
            engine.close()
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != losses[1]


def test_numbers_of_tokens_that_eight_bits_cannot_multiply_are_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    inner: list[int] = []
    multiply = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda a, *b, **c: inner.append(a.shape[1]) or multiply(a, *b, **c))
    model = nn.Sequential(nn.Linear(64, 192)).bfloat16()
    model.shard_unit = True  # type: ignore[assignment]
    eight_bits(model, emulate=False)
    model(torch.randn(5, 200, 64, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert inner == [64, 192, 1008]  # 5 x 200 tokens: a GPU takes multiples of 16


@pytest.mark.parametrize(("error", "left"), [(None, True), (Stopped(8, "asked"), True), (OSError("disk"), False)])
def test_a_group_is_taken_down_where_all_leave_and_not_by_one_that_failed(
    monkeypatch: pytest.MonkeyPatch, tiny_config: Make, error: Exception | None, left: bool
) -> None:
    closed: list[bool] = []
    monkeypatch.setattr(Engine, "close", lambda self: closed.append(True))
    with pytest.raises(type(error)) if error else nullcontext(), engines.running(tiny_config("train.engine=single")):
        if error:
            raise error
    assert bool(closed) == left


@pytest.mark.slow
@pytest.mark.usefixtures("group_of_one")
def test_a_recomputed_compiled_model_in_pieces_learns_what_the_plain_one_learns(tiny_config: Make) -> None:
    from foundation.training.data import open_data, open_stream

    rows: list[Any] = []
    for keys in ((), ("train.engine=fsdp2", "train.compile=true", "train.activation_checkpointing=full")):
        wanted = tiny_config(*keys)
        engine = engines.start(wanted) if keys else Engine(wanted)
        try:
            learner = build_learner(wanted, engine)
            batches = iter(open_stream(wanted, open_data(wanted), engine, 0))
            steps = [train_step(learner, [next(batches)], 8 * i) for i in range(3)]
            rows.append([step[name].item() for step in steps for name in ("loss", "grad_norm")])
        finally:
            engine.close()
    torch._dynamo.reset()  # lets go of what it keeps for the whole process
    assert rows[0] == pytest.approx(rows[1], rel=1e-5)


def test_processes_that_do_not_fill_the_mesh_are_refused_before_they_meet(tiny_config: Make) -> None:
    with pytest.raises(LaunchError, match=r"1 processes do not form groups of 2[\s\S]*choose a divisor"):
        engines.start(tiny_config("train.engine=hsdp", "train.shard_size=2"))
    assert not torch.distributed.is_initialized()


def test_the_count_of_updates_lies_where_the_fused_optimiser_looks_for_it(tiny_config: Make) -> None:
    engine = Engine(tiny_config())
    model = nn.Linear(2, 2, device="meta")
    optimizer = torch.optim.AdamW(model.parameters())
    engine.tensors(model, optimizer)
    assert all(optimizer.state[p]["step"].device == p.device for p in model.parameters())


def test_zero1_in_bf16_refuses_to_add_up_gradients_in_bf16() -> None:
    train = {"engine": "zero1", "precision": "bf16", "global_batch": 300, "micro_batch": 30}
    with pytest.raises(ConfigError, match=r"zero1 in bf16 would add up[\s\S]*train.engine=zero2"):
        engines.start(from_dict({"train": train}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"engine": "ddp", "offload": True}, r"engine ddp keeps its state on the device[\s\S]*train.offload=false"),
        ({"engine": "fsdp2", "shard_size": 2}, r"engine fsdp2 has no groups of processes[\s\S]*train.engine=hsdp"),
    ],
)
def test_a_key_that_an_engine_would_ignore_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engines.start(from_dict({"train": keys}))


@pytest.mark.parametrize(
    "keys", [{"engine": "single", "precision": "bf16"}, {"engine": "fsdp2"}, {"engine": "zero1", "precision": "bf16"}]
)
def test_eight_bits_are_refused_where_no_engine_gives_them(keys: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="float8 does not go with engine"):
        engines.start(from_dict({"train": {"float8": True, **keys}}))


def test_eight_bits_without_their_library_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(LaunchError, match=r"needs torchao[\s\S]*sar-foundation\[float8\]"):
        eight_bits(nn.Linear(16, 16), emulate=True)


@given(wanted=st.sampled_from(["none", "selective", "full"]), tokens=st.integers(2, 9))
def test_activation_checkpointing_changes_no_gradient_and_no_name(wanted: str, tokens: int) -> None:
    class Unit(nn.Module):
        shard_unit = True

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 7), nn.Linear(7, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.b(torch.tanh(self.a(x)))

    def gradients(kind: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        train = from_dict({"train": {"activation_checkpointing": kind}}).train
        model = prepare(nn.Sequential(Unit(), Unit()), train)
        model(torch.ones(tokens, 5)).square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, other = gradients("none"), gradients(wanted)
    assert plain.keys() == other.keys()
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_a_model_with_a_buffer_is_refused_since_its_value_would_be_lost() -> None:
    with pytest.raises(TypeError, match=r"0\.running_mean is a buffer"):
        on_meta(lambda: nn.Sequential(nn.BatchNorm1d(3)))
