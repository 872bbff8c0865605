"""The bench measures what it says: formulas by hand, errors small, every backend a time or a reason, never an abort."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from foundation import cli
from foundation.bench import compact, markdown, sheet_peak
from foundation.bench_loader import Table
from foundation.bench_step import PARTS
from kernels import gradient_ratio as target_package
from kernels.bench import Budget, Clock, Roof, Row, Stage, Trial, Work, first_line, measure_roof, run
from kernels.bench_attention import BOTH, FORWARD, SHAPES, Inputs, Shape, published, works
from kernels.bench_target import published_target, speckle
from kernels.bench_target import works as target_work
from kernels.bench_tune import STAGES, WARPS
from kernels.bench_tune import rows as tuned
from kernels.rpe_attention import BACKENDS, Backend
from kernels.rpe_attention.reference import reference

CPU = torch.device("cpu")
ROOF = Roof(1e9, {"float32": 1e10, "bfloat16": 2e10})


@pytest.mark.parametrize(
    ("shape", "gflop", "megabytes"),
    [
        (SHAPES[0], (47, 126), (1268, 2536)),
        (SHAPES[1], (31, 84), (852, 1704)),
        (SHAPES[2], (34, 88), (312, 625)),
        (SHAPES[3], (68, 172), (229, 457)),
        (SHAPES[4], (106, 266), (203, 406)),
        (SHAPES[5], (415, 1039), (203, 406)),
    ],
    ids=lambda value: value.name if isinstance(value, Shape) else "",
)
def test_attention_work_is_what_one_counts_by_hand(
    shape: Shape, gflop: tuple[int, int], megabytes: tuple[int, int]
) -> None:
    forward, both = works(shape, itemsize=2)
    assert (round(forward.flops / 1e9), round((both.flops - forward.flops) / 1e9)) == gflop
    assert (round(forward.nbytes / 1e6), round((both.nbytes - forward.nbytes) / 1e6)) == megabytes


def test_target_work_is_pixels_in_and_maps_out() -> None:
    work = target_work(speckle(CPU, batch=1))
    assert work == Work(70 * 224**2, 17 * 224**2)


def test_the_roof_is_memory_or_arithmetic_whichever_takes_longer() -> None:
    assert ROOF.seconds(Work(1e10, 1e9), "bfloat16") == 1.0
    assert ROOF.seconds(Work(3e10, 1e9), "float32") == 3.0
    row = Row("attention", "s", "b", FORWARD, "float32", Work(3e10, 1e9))
    row.fill(6.0, 1, ROOF)
    assert (row.ms, row.gb_s, row.tflop_s, row.share) == (6000.0, 1 / 6, 0.005, 0.5)


def test_the_measured_roof_is_positive() -> None:
    roof = measure_roof(Clock(CPU), quick=True)
    assert roof.copy > 1e8
    assert min(roof.gemm.values()) > 1e8


def test_the_published_attention_is_the_definition() -> None:
    inputs = Inputs(Shape("small", (3, 4), 2, 2, 8), torch.float64, CPU)
    q, k, v = inputs.qkv.permute(2, 0, 3, 1, 4).unbind(0)
    table = inputs.table.double()
    found = published(inputs.qkv, table, inputs.layout, 8**-0.5, 1.0)
    expected = reference(q, k, v, table, inputs.layout, 8**-0.5, 1.0).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_the_published_target_is_the_definition() -> None:
    images = speckle(CPU, batch=1, side=48).double() / 255
    expected = target_package.gradient_ratio(images, backend="reference")
    torch.testing.assert_close(published_target(images).float(), expected, rtol=0, atol=1e-6)


class Fails(RuntimeError):
    pass


def fails(*_: object) -> Tensor:
    raise Fails("no such kernel\nand a long trace")


def row(backend: str) -> Row:
    return Row("attention", "L=1, B=1", backend, FORWARD, "float32", Work(1, 1))


def test_a_trial_that_fails_at_its_start_or_on_the_clock_is_a_row_and_the_others_go_on() -> None:
    trials = [
        Trial(fails, [row("start")]),
        Trial(lambda: [lambda _: None, fails], [row("lap")]),
        Trial(lambda: [lambda _: 1, lambda one: one + 1], [row("good"), row("both")]),
    ]
    run(trials, Clock(CPU), 3, Budget(60), ROOF)
    reasons = [one.reason for trial in trials for one in trial.rows]
    assert reasons == ["Fails: no such kernel", "Fails: no such kernel", "", ""]
    good, both = trials[2].rows
    assert good.ms is not None
    assert both.ms is not None
    assert 0 < good.ms <= both.ms
    assert good.repeats == 3


def test_an_error_without_words_has_its_name() -> None:
    assert first_line(AssertionError()) == "AssertionError"


def test_what_the_budget_does_not_reach_is_listed_and_not_begun() -> None:
    begun = []

    def start() -> Sequence[Stage]:
        begun.append(1)
        return [lambda _: None]

    trials = [Trial(start, [row("late")])]
    run(trials, Clock(CPU), 3, Budget(0), ROOF)
    assert not begun
    assert trials[0].rows[0].reason == "not reached: the budget of 0 s was spent"


def test_a_slow_trial_is_repeated_three_times_and_no_more_than_its_limit_allows() -> None:
    slow = Trial(lambda: [lambda _: torch.rand(100, 100) @ torch.rand(100, 100)], [row("slow")], limit=1e-9)
    run([slow], Clock(CPU), 50, Budget(60), ROOF)
    assert slow.rows[0].repeats == 3


def test_stages_pass_on_what_they_made_and_are_timed_apart() -> None:
    seen = []
    lap = Clock(CPU).lap([lambda _: 2, lambda two: seen.append(two)])
    assert seen == [2]
    assert len(lap) == 2


class Rehearsal(NamedTuple):
    folder: Path
    kernels: dict[str, Any]
    step: dict[str, Any]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rehearsal]:
    """`foundation bench --quick`, with a backend that raises."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKENDS, "broken", Backend(fails, "raises"))
        patch.setattr("sys.argv", ["foundation", "bench", "--quick", "--out", str(folder)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        both = (json.loads((folder / f"{name}.json").read_text()) for name in ("kernels", "step"))
        yield Rehearsal(folder, *both)


def rows_of(rehearsal: Rehearsal, what: str) -> list[dict[str, Any]]:
    found = [one for one in rehearsal.kernels["rows"] if one["what"] == what]
    assert found
    return found


def test_every_backend_has_a_time_or_a_reason_for_every_shape(rehearsal: Rehearsal) -> None:
    names = {"attention": {"published", *BACKENDS}, "loss": {"published", *target_package.BACKENDS}}
    for what, backends in names.items():
        rows = [one for one in rows_of(rehearsal, what) if one["backend"] != "all"]
        for shape in {one["shape"] for one in rows}:
            mine = [one for one in rows if one["shape"] == shape]
            assert backends <= {one["backend"] for one in mine}
            assert {one["direction"] for one in mine} == {FORWARD, BOTH}
            assert all(bool(one["ms"]) != bool(one["reason"]) for one in mine)


def test_every_pixel_type_is_timed_by_the_exact_backend(rehearsal: Rehearsal) -> None:
    rows = rows_of(rehearsal, "target")
    timed = {one["dtype"] for one in rows if one["backend"] == "integral" and one["ms"]}
    assert timed == {"uint8", "uint16", "float32"}
    assert [one["dtype"] for one in rows if one["backend"] == "published"] == ["float32"]


def test_errors_are_those_of_the_arithmetic(rehearsal: Rehearsal) -> None:
    largest = {"attention": {"float32": 2e-6, "bfloat16": 3e-2}, "loss": {}, "target": {}}
    for one in rehearsal.kernels["rows"]:
        if one["ms"]:
            assert one["error"] < largest[one["what"]].get(one["dtype"], 1e-4), one


def test_gradients_have_the_same_bits_twice(rehearsal: Rehearsal) -> None:
    both = [one for one in rehearsal.kernels["rows"] if one["ms"] and one["direction"] == BOTH]
    assert {one["same_bits"] for one in both} == {True}


def test_a_backend_that_raises_is_a_row_in_every_table(rehearsal: Rehearsal) -> None:
    broken = [one for one in rows_of(rehearsal, "attention") if one["backend"] == "broken"]
    assert {one["reason"] for one in broken} == {"Fails: no such kernel"}
    [step] = [one for one in rehearsal.step["rows"] if one["variant"].startswith("broken")]
    assert step["reason"] == "Fails: no such kernel"
    assert "| broken | Fails: no such kernel |" in (rehearsal.folder / "kernels.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there Triton is compiled")
def test_interpreted_triton_is_not_timed(rehearsal: Rehearsal) -> None:
    rows = [one for one in rehearsal.kernels["rows"] if one["backend"] == "triton"]
    assert {one["what"] for one in rows} == {"attention", "target", "loss"}
    assert all("interpreted" in one["reason"] for one in rows)


def test_the_report_names_device_versions_and_the_measured_roofline(rehearsal: Rehearsal) -> None:
    found = rehearsal.kernels
    assert found["environment"]["torch"] == torch.__version__
    assert found["environment"]["device"]
    assert found["roofline"]["copy_bytes_per_s"] > 0
    assert set(found["roofline"]["gemm_flop_per_s"]) == {"float32", "bfloat16"}
    page = (rehearsal.folder / "kernels.md").read_text()
    assert page.startswith("# Kernels\n\n`foundation bench --quick")
    assert "## Masked loss" in page
    assert "## Attention, windows" in page
    assert (rehearsal.folder / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_the_step_is_divided_into_parts_and_computes_the_same_loss(rehearsal: Rehearsal) -> None:
    rows = rehearsal.step["rows"]
    timed = [one for one in rows if one["seconds"]]
    assert {"published", "reference", "sdpa"} <= {one["variant"].split(",")[0] for one in timed}
    for one in timed:
        assert tuple(one["parts"]) == PARTS
        assert one["of_products"] > 0
        tolerance = 2e-2 if one["precision"] == "bf16" else 1e-4
        assert one["loss"] == pytest.approx(rows[0]["loss"], rel=tolerance)
    waiting = {one["variant"].split(",")[0]: one["reason"] for one in rows if not one["seconds"]}
    assert all(waiting.values())
    assert {name.split()[0] for name in (*waiting, "dense", "published")} > {"flash", "xformers", "triton", "cuda"}


def test_an_unknown_size_is_answered_with_the_known_ones(command: Callable[..., Any]) -> None:
    code, _, err = command("bench", "step", "--sizes", "tinny")
    assert code == 2
    assert "'tinny' is no model size" in err


def test_options_before_a_name_are_refused_and_not_dropped(command: Callable[..., Any], tmp_path: Path) -> None:
    code, _, err = command("bench", "--out", tmp_path, "step")
    assert code == 2
    assert "after the name" in err


def test_options_of_the_window_kernels_are_listed_with_the_chosen_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(tuned(repeats=1, shapes=[Shape("tiny", (2, 2), 1, 1, 16)], device=CPU))
    assert [(line[1], line[2]) for line in found] == [(str(w), str(s)) for w in WARPS for s in STAGES] * 2
    assert all(float(line[3]) > 0 for line in found)
    assert len([line for line in found if line[4]]) == 2


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", None),
        ("AMD EPYC", None),
    ],
)
def test_the_data_sheet_is_known_for_these(name: str, peak: float | None) -> None:
    assert sheet_peak(name) == peak


def test_a_table_loses_columns_without_content_and_cells_never_break_it() -> None:
    table = compact(Table("t", ("a", "b", "c"), [("1", "-", "x|y"), ("2", "-", "z")]))
    assert table.header == ("a", "c")
    assert "| 1 | x/y |" in markdown("page", "words", [table])


def test_on_cuda_events_stand_around_every_stage_after_the_cache_is_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("event")
            self.at = len(order)

        def elapsed_time(self, end: Event) -> float:
            assert order[-1] == "wait"
            return float(end.at - self.at)

    clock = Clock(CPU)
    clock.device = torch.device("cuda")
    monkeypatch.setattr(clock, "_cold", type("Cold", (), {"zero_": lambda _: order.append("cold")})())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    lap = clock.lap([lambda _: order.append("forward"), lambda _: order.append("backward")])
    assert order == [*["cold"] * 4, "event", "forward", "event", "backward", "event", "wait"]
    assert lap == (0.002, 0.002)


def test_one_thread_is_timed_by_the_processor_and_several_by_the_wall(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(CPU)
    for threads, idle in ((1, 0.01), (2, 0.05)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        [took] = clock.lap([lambda _: time.sleep(0.05)])
        assert (took < idle) == (threads == 1)


def test_ratios_are_taken_within_rounds() -> None:
    slow, fast = Trial(list), Trial(list)
    slow.laps, fast.laps = [(2.0,), (20.0,), (200.0,)], [(1.0,), (10.0,), (100.0,)]
    assert fast.faster_than(slow) == 2.0
