"""A plan says in seconds what a queue says in hours: what does not fit, what does not divide, what it will take."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shards_samples import small

from foundation.config import Config, from_dict, load
from foundation.errors import ConfigError, DataError
from foundation.models.families import FAMILY, flops, parameters
from foundation.planning.cluster import GPUS, Cluster, communication, step_seconds, young
from foundation.planning.engines import candidate, compute_seconds, recommend, startable
from foundation.planning.memory import shard_degree
from foundation.planning.plan import division_advice, division_problems, plan
from foundation.planning.validation import scaling_checks, table_checks
from foundation.training.data import micro_batch
from foundation.training.step import Learner
from shards.order import check_division

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
RECIPE = next(str(path) for path in CONFIGS if path.stem == "sar-jepa")
BRIEF = settings(max_examples=40, deadline=None)
ENGINES = ("ddp", "zero1", "zero2", "hsdp", "fsdp2", "zero3")


def recipe(size: str = "base", lanes: int = 512, batch: int = 2048, precision: str = "bf16", **train: Any) -> Config:
    """The published recipe in another size, with a batch that many processes can share."""
    tree = {"model": {"size": size}, "data": {"lanes": lanes}}
    return from_dict({**tree, "train": {"global_batch": batch, "precision": precision, **train}})


# --- communication and speed


@pytest.mark.parametrize("check", table_checks(), ids=lambda check: check.name)
def test_the_table_of_strategies_on_512_gpus_is_reproduced(check: Any) -> None:
    assert check.predicted == pytest.approx(check.published, rel=0.05)


def test_the_table_has_every_size_and_strategy() -> None:
    names = [check.name for check in table_checks()]
    assert len(set(names)) == len(names) == 44
    assert {name.split()[1].rstrip(",") for name in names} == {"compute", "fsdp2", "hsdp", "ddp"}


def test_published_scaling_is_predicted_within_eight_percent_and_always_from_above() -> None:
    """Formulas know no stragglers: they may promise too much, by up to 8 % here, and never too little by 1 %."""
    found = {check.name: check.deviation for check in scaling_checks()}
    assert len(found) == 8
    assert all(-0.01 < deviation < 0.08 for deviation in found.values()), found


def test_the_published_points_are_those_that_were_published() -> None:
    published = {check.name: check.published for check in scaling_checks()}
    assert {round(value, 2) for name, value in published.items() if "NeMo" in name} == {0.94, 0.96}
    assert [round(value, 2) for name, value in published.items() if "7B, 1 to" in name] == [0.93, 0.53, 0.5, 0.47]


@BRIEF
@given(engine=st.sampled_from(ENGINES), nodes=st.integers(2, 64), count=st.floats(1e8, 2e10), units=st.integers(1, 60))
def test_communication_grows_with_what_is_sent_and_shrinks_with_bandwidth(
    engine: str, nodes: int, count: float, units: int
) -> None:
    cluster = Cluster(8 * nodes)
    seconds = communication(engine, count, units, cluster)
    assert communication(engine, count, units, cluster._replace(world=1)) == 0
    assert communication(engine, count, units, cluster._replace(nic=50e9)) > seconds
    assert communication(engine, 2 * count, units, cluster) > seconds
    assert communication(engine, count, units, cluster, reduce=4) > seconds
    more = communication(engine, count, units, cluster, accumulation=2)
    assert more == seconds if engine in ("ddp", "zero1") else more > seconds


def test_shards_inside_a_node_beat_shards_across_nodes_where_the_network_is_slow() -> None:
    cluster = Cluster(512, nic=50e9)
    inside, across = (communication(engine, 8e9, 40, cluster) for engine in ("hsdp", "fsdp2"))
    assert inside < across
    # Groups as large as the world are fsdp2.
    assert communication("hsdp", 8e9, 40, cluster, shard_size=512) == communication("fsdp2", 8e9, 40, cluster)
    assert [shard_degree("hsdp", w, 8, None) for w in (4, 8, 64)] == [4, 8, 8]


@given(compute=st.floats(1e-3, 10), sent=st.floats(0, 10), overlap=st.floats(0, 1))
def test_an_update_takes_no_less_than_either_part_and_no_more_than_both(
    compute: float, sent: float, overlap: float
) -> None:
    assert max(compute, sent) <= step_seconds(compute, sent, overlap) <= compute + sent + 1e-9
    assert step_seconds(compute, sent, 1) == max(compute, sent)


def test_computing_follows_from_operations_peak_and_mfu() -> None:
    run, cluster = recipe(), Cluster(64, mfu=0.5)
    expected = 2048 / 64 * 3 * flops(run).forward / (0.5 * 989e12)
    assert compute_seconds(run, cluster) == pytest.approx(expected)
    assert compute_seconds(recipe(activation_checkpointing="full"), cluster) == pytest.approx(expected * 4 / 3)
    assert compute_seconds(recipe(precision="fp32"), cluster) == pytest.approx(expected * 989 / 67)


@given(stall=st.floats(0.1, 100), hours=st.floats(1, 1000), factor=st.floats(0.2, 5))
def test_youngs_interval_loses_least(stall: float, hours: float, factor: float) -> None:
    def lost(every: float) -> float:
        return stall / every + every / (2 * hours * 3600)

    best = young(stall, hours * 3600)
    assert lost(best) <= lost(best * factor) * (1 + 1e-9)


# --- which engine


@pytest.mark.parametrize(
    ("size", "world", "gpu", "engine"),
    [
        ("base", 1, "h100", "single"),
        ("base", 512, "h100", "ddp"),
        ("gigantic", 64, "h100", "ddp"),
        ("3b", 64, "h100", "hsdp"),
        ("7b", 512, "h100", "hsdp"),
        ("22b", 64, "h100", "hsdp"),
        ("7b", 8, "h100", "fsdp2"),  # one node: shards inside it are shards over all
    ],
)
def test_the_rule_prefers_replicas_then_shards_in_a_node_then_shards_everywhere(
    size: str, world: int, gpu: str, engine: str
) -> None:
    found = recommend(recipe(size), Cluster(world, gpu=gpu), 2048 // world)
    assert found.engine == engine
    assert found.micro_batch > 0


def test_shards_go_over_all_nodes_only_when_those_of_a_node_do_not_fit() -> None:
    run = recipe("22b", activation_checkpointing="full")
    pairs = Cluster(64, gpus_per_node=2)
    found = recommend(run, pairs, 32)
    assert not candidate(run, pairs, "hsdp", 32).fits
    assert found.engine == "fsdp2"
    assert "hsdp would not fit" in found.reason


@BRIEF
@given(
    size=st.sampled_from(sorted(FAMILY)), world=st.sampled_from([1, 2, 8, 64, 512]), gpu=st.sampled_from(sorted(GPUS))
)
def test_what_is_recommended_fits_and_what_a_problem_advises_helps(size: str, world: int, gpu: str) -> None:
    run, cluster = recipe(size), Cluster(world, gpu=gpu)
    found = plan(run, cluster, data=False)
    assert found.engine in startable(run, cluster)
    if not found.problems:
        assert next(c for c in found.candidates if c.engine == found.engine).fits
        return
    (problem,) = found.problems
    pattern = rf"{found.engine} needs [\d.]+ GB per process, {gpu} has \d+; (.*)"
    (advice,) = re.fullmatch(pattern, problem).groups()  # type: ignore[union-attr]
    if advice == "use more processes or a larger GPU":
        assert recommend(run, cluster, 2048 // world).micro_batch == 0
        return
    changes = dict(re.findall(r"train\.(\w+)=(\w+)", advice))
    changed: dict[str, Any] = {**changes, "micro_batch": int(changes.get("micro_batch", 2048 // world))}
    assert plan(recipe(size, **changed), cluster, data=False).problems == []


# --- what would fail


def advised(text: str) -> tuple[int | None, dict[str, int]]:
    """The number of processes and the settings that a problem names."""
    count = re.search(r"; start (\d+) processes", text)
    return int(count[1]) if count else None, {key: int(value) for key, value in re.findall(r"([\w.]+)=(\d+)", text)}


@pytest.mark.parametrize("world", [1, 8, 64, 512])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_passes_or_names_the_numbers_with_which_it_does(path: Path, world: int) -> None:
    run = load(path)
    found = plan(run, Cluster(world, gpu="h200"), data=False)
    if run.data.lanes % world == 0:
        assert found.problems == []
        assert found.figure("images per second") > 0
        return
    (problem,) = found.problems
    assert problem.startswith(f"{run.data.lanes} lanes cannot be shared evenly by {world} processes; ")
    count, changes = advised(problem)
    assert count is not None
    assert plan(run, Cluster(count, gpu="h200"), data=False).problems == []
    changed = load(path, [f"{key}={value}" for key, value in changes.items()])
    assert plan(changed, Cluster(world, gpu="h200"), data=False).problems == []


@settings(max_examples=200, deadline=None)
@given(
    world=st.integers(1, 600),
    lanes=st.integers(1, 130),
    many=st.integers(1, 20),
    micro=st.none() | st.integers(1, 50),
)
def test_the_numbers_that_are_advised_divide(world: int, lanes: int, many: int, micro: int | None) -> None:
    run = dividing(lanes * many, lanes, micro)
    count, changes = advised("; " + division_advice(run, world))
    changed = dividing(
        changes.get("train.global_batch", lanes * many),
        changes.get("data.lanes", lanes),
        changes.get("train.micro_batch", micro) if micro else None,
    )
    assert division_problems(changed, world) == []
    assert count is None or division_problems(run, count) == []
    # Near: never further than half a step of what has to divide.
    assert abs(changed.data.lanes - lanes) <= max(world / 2, world - lanes)


def dividing(batch: int, lanes: int, micro: int | None) -> Config:
    """A configuration with these numbers, whether they divide or not."""
    base = Config()
    train = base.train.model_copy(update={"global_batch": batch, "micro_batch": micro})
    return base.model_copy(update={"train": train, "data": base.data.model_copy(update={"lanes": lanes})})


@settings(max_examples=300, deadline=None)
@given(
    world=st.integers(1, 70), batch=st.integers(1, 400), micro=st.none() | st.integers(1, 50), lanes=st.integers(1, 70)
)
def test_the_planner_refuses_exactly_the_divisions_that_training_refuses(
    world: int, batch: int, micro: int | None, lanes: int
) -> None:
    run = dividing(batch, lanes, micro)

    def training() -> None:
        check_division(batch, lanes, 0, world, micro_batch(run, world))

    found = division_problems(run, world)
    try:
        training()
    except (ConfigError, DataError):
        assert found
    else:
        assert found == []


def test_problems_come_all_at_once() -> None:
    run = recipe("22b", batch=600, lanes=60, engine="single")
    found = plan(run, Cluster(64)).problems
    assert len(found) == 4
    assert found[0] == (
        "60 lanes cannot be shared evenly by 64 processes; start 60 processes, or set data.lanes=64 "
        "train.global_batch=576, which changes the order of the data"
    )
    assert found[1].startswith("engine single, but 64 processes would train 64 separate models")
    assert found[2].startswith("single needs")
    assert found[3].startswith("no data: data.catalog is not set")


@pytest.mark.parametrize(
    ("train", "cluster", "problem"),
    [
        ({"engine": "hsdp", "shard_size": 3}, Cluster(8), "8 processes do not form groups of 3"),
        ({"engine": "ddp", "offload": True}, Cluster(8), "keeps its state on the device (train.offload); use"),
        ({"engine": "ddp", "float8": True}, Cluster(8, gpu="a100"), "train.float8 needs a GPU that has it; a100"),
    ],
)
def test_what_an_engine_refuses_is_a_problem(train: dict[str, Any], cluster: Cluster, problem: str) -> None:
    run = recipe()
    changed = run.model_copy(update={"train": run.train.model_copy(update=train)})
    assert [p for p in plan(changed, cluster, data=False).problems if problem in p]


def test_a_faster_engine_that_fits_is_named() -> None:
    found = plan(recipe("7b"), Cluster(512), data=False)
    speed = {c.engine: c.images_per_s for c in found.candidates if c.fits}
    (line,) = (line for line in found.warnings if "faster" in line)
    name = re.search(r"train\.engine=(\w+) fits too", line)[1]  # type: ignore[index]
    assert found.engine != name == max(speed, key=lambda engine: speed[engine])
    assert not any("faster" in line for line in plan(recipe(), Cluster(8), data=False).warnings)


def test_a_checkpoint_stalls_for_the_copy_and_without_the_thread_for_the_writing_too() -> None:
    beside, before = (
        plan(recipe("7b", engine="hsdp", async_checkpoint=mode), Cluster(64), data=False) for mode in (True, False)
    )
    assert beside.figure("stall") == pytest.approx(12 * parameters(recipe("7b")).total / 8 / 5e9)  # 8 share a copy
    assert before.figure("stall") == pytest.approx(beside.figure("stall") + beside.figure("writing"))
    slow = plan(recipe("7b", engine="hsdp"), Cluster(64), data=False, disk=1e6)
    assert slow.figure("Young interval") == pytest.approx(slow.figure("writing") / 60)


def test_what_the_user_gives_is_not_called_assumed() -> None:
    found = plan(recipe(), Cluster.of(8, 8, "h100", {"mfu": 0.55, "nic": 5e10}), data=False).figures
    known = {f.name: (f.value, f.tag) for f in found if f.section == "speed"}
    assert known["MFU while computing"] == (0.55, "given")
    assert known["network"] == (40, "given")
    assert known["NVLink"] == (350, "assumed")


def test_warnings_name_the_key_to_change() -> None:
    found = plan(recipe("7b", checkpoint_every=40_960), Cluster(512), data=False, mtbf_hours=10).warnings
    assert any("set train.engine=hsdp" in line for line in found)
    assert any("a larger train.global_batch" in line for line in found)
    (line,) = (line for line in found if "Young's interval" in line)
    better = recipe("7b", checkpoint_every=int(re.search(r"checkpoint_every=(\d+)", line)[1]))  # type: ignore[index]
    assert not any("Young" in w for w in plan(better, Cluster(512), data=False, mtbf_hours=10).warnings)
    assert any("unevenly" in w for w in plan(recipe(lanes=60, batch=300), Cluster(12), data=False).warnings)


# --- schedule and data


def test_the_learning_rates_are_those_of_training() -> None:
    run = recipe()
    found = {f.name: f for f in plan(run, Cluster(64), data=False).figures if f.section == "schedule"}
    learner: Any = SimpleNamespace(config=run)
    points = {"lr, start": 0, "lr, end of warm-up": run.optim.warmup_samples, "lr, end": run.train.samples}
    points |= {f"lr, {q} of 4": run.train.samples * q // 4 for q in (1, 2, 3)}
    bars = found.pop("lr, curve").note
    assert {name: f.value for name, f in found.items()} == {
        name: pytest.approx(Learner.lr(learner, at)) for name, at in points.items()
    }
    # Up to the end of the warm-up, a fifteenth of the run, then down.
    top = bars.index("█")
    assert list(bars[: top + 1]) == sorted(bars[: top + 1])
    assert list(bars[top:]) == sorted(bars[top:], reverse=True)
    assert abs(top / len(bars) - run.optim.warmup_samples / run.train.samples) < 0.05
    assert bars[-1] == "▁"


def test_coverage_names_every_source_and_adds_up_to_the_run(tmp_path: Path) -> None:
    catalog = small(tmp_path)
    run = from_dict({"data": {"catalog": (str(tmp_path),), "weights": {"one": 3, "two": 1}}})
    found = {f.name: f for f in plan(run, Cluster(60)).figures if f.section == "data"}
    assert found["samples"].value == catalog.samples
    assert found["samples"].tag == "measured"
    sizes = {source.name: source.samples for source in catalog.sources}
    seen = sum(float(found[name].value) * sizes[name] for name in sizes)
    assert seen == pytest.approx(run.train.samples)
    assert "75.0% of the stream" in found["one"].note
    assert float(found["read per node"].value) > 0


@pytest.mark.parametrize(
    ("data", "problem"),
    [({}, "data.catalog is not set"), ({"catalog": "nowhere"}, "no catalog here")],
)
def test_a_catalog_that_cannot_be_opened_is_a_problem_and_said(data: dict[str, Any], problem: str) -> None:
    found = plan(from_dict({"data": data}), Cluster(1, gpu="h200"))
    assert [p for p in found.problems if problem in p]
    assert found.figure("catalog") == "not opened"


def test_weights_that_the_order_refuses_are_a_problem(tmp_path: Path) -> None:
    small(tmp_path)
    found = plan(from_dict({"data": {"catalog": str(tmp_path), "weights": {"one": 1}}}), Cluster(60))
    assert len(found.problems) == 1
    assert "two" in found.problems[0]
