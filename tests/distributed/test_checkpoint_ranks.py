"""Two processes save, fail and restore together: what one of them meets, both learn, and nobody waits for the other."""

from __future__ import annotations

import json
import multiprocessing
import resource
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from foundation.errors import CheckpointError
from foundation.training.checkpoint import latest, load, read, restore, save
from foundation.training.places import Folder
from foundation.training.ranks import OtherRankError, Ranks, everywhere, together
from foundation.training.saving import Saver

SIZE = 2
SHAPES = {"cls": (1, 1, 6), "odd": (5, 3), "square": (4, 4), "scalar": ()}


def whole(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def spread(tensors: dict[str, Tensor], mesh: Any) -> dict[str, Tensor]:
    """Rows over both ranks; `cls` leaves the second one nothing, the scalar is whole on each."""
    place = {name: [Shard(0)] if tensor.ndim else [Replicate()] for name, tensor in tensors.items()}
    return {name: distribute_tensor(tensor, mesh, place[name]) for name, tensor in tensors.items()}


@contextmanager
def small_disk(here: bool) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if here:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def raised(action: Callable[[], object]) -> str:
    """The message of the error, empty without one."""
    try:
        action()
    except (CheckpointError, OtherRankError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    values = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in found.items()}
    return all(torch.equal(values[name], expected[name]) for name in expected)


def scenario(rank: int, folder: Path, ranks: Ranks, mesh: Any) -> dict[str, Any]:
    """Everything that the two do; what they saw."""
    seen: dict[str, Any] = {}
    save(folder, spread(whole(10), mesh), {"position": 10}, 10, ranks=ranks)
    copy = spread({name: torch.zeros(shape) for name, shape in SHAPES.items()}, mesh)
    read(folder / "samples-000000000010", copy, ranks)
    seen["spread tensors come back"] = same(copy, whole(10))
    plain = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    read(folder / "samples-000000000010", plain, ranks)
    seen["into whole ones too"] = same(plain, whole(10))
    save(folder.with_name("whole"), whole(11), {}, 10, ranks=ranks)
    copy = spread({name: torch.zeros(shape) for name, shape in SHAPES.items()}, mesh)
    read(folder.with_name("whole") / "samples-000000000010", copy, ranks)
    seen["whole tensors into spread ones"] = same(copy, whole(11))
    for poor in (1, 0):
        with small_disk(here=rank == poor):
            seen[f"disk of {poor} is full"] = raised(
                lambda: save(folder, spread(whole(20), mesh), {"position": 20}, 20, ranks=ranks)
            )
        ranks.gather(None)
        seen[f"after that of {poor}"] = sorted(path.name for path in folder.iterdir())
    saver = Saver(folder, ranks, keep=3, keep_every=None, background=True)
    with small_disk(here=rank == 1):
        saver.save(spread(whole(30), mesh), {"position": 30}, 30)  # begins, and returns
        seen["in the background"] = raised(saver.wait)
    saver.save(spread(whole(40), mesh), {"position": 40}, 40)
    saver.wait()
    ranks.gather(None)
    if rank == 0:
        file = next((folder / "samples-000000000040" / "tensors").glob("00001-*"))
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    ranks.gather(None)
    path, state, skipped = restore(folder, ranks)
    seen["restored"] = [str(path), state, skipped]
    spans = Folder.read
    if rank == 1:

        def unreadable(self: Folder) -> bytes:
            raise OSError(5, "Input/output error")

        Folder.read = unreadable  # type: ignore[method-assign]
    seen["one cannot read"] = raised(lambda: read(folder / "samples-000000000010", plain, ranks))
    seen["restore then"] = raised(lambda: restore(folder, ranks))
    Folder.read = spans  # type: ignore[method-assign]

    def fails() -> int:
        if rank == 1:
            raise ValueError("no")
        return 7

    seen["everywhere"] = raised(lambda: everywhere(ranks, fails))
    seen["together"] = together(ranks, lambda: rank * 2)
    return seen


def run(rank: int, root: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(root / "store"), SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE, timeout=timedelta(seconds=60))
    group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=60))

    def gather(value: Any) -> list[Any]:
        every: list[Any] = [None] * SIZE
        dist.all_gather_object(every, value, group)
        return every

    try:
        mesh = init_device_mesh("cpu", (SIZE,))
        seen = scenario(rank, root / "checkpoints", Ranks(rank, SIZE, gather, group), mesh)
    except BaseException:
        seen = {"failed": traceback.format_exc()}
    (root / f"{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    fork = multiprocessing.get_context("fork")  # torch is imported already
    processes = [fork.Process(target=run, args=(rank, root)) for rank in range(SIZE)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()
    return root


@pytest.fixture(scope="module")
def seen(root: Path) -> list[dict[str, Any]]:
    both = [json.loads((root / f"{rank}.json").read_text()) for rank in range(SIZE)]
    for each in both:
        assert "failed" not in each, each["failed"]
    return both


def test_each_writes_its_pieces_and_anybody_reads_them(root: Path, seen: list[dict[str, Any]]) -> None:
    path = root / "checkpoints" / "samples-000000000010"
    assert sorted(file.name for file in (path / "tensors").glob("*.safetensors")) == [
        "00000-of-00002.safetensors",
        "00001-of-00002.safetensors",
    ]
    assert same(load(path)["tensors"], whole(10))
    kinds = ("spread tensors come back", "into whole ones too", "whole tensors into spread ones")
    assert [[each[kind] for kind in kinds] for each in seen] == [[True] * 3] * 2


@pytest.mark.parametrize("poor", [0, 1])
def test_when_the_disk_of_one_is_full_all_raise_and_nothing_is_committed(seen: list[dict[str, Any]], poor: int) -> None:
    for each in seen:
        text = each[f"disk of {poor} is full"]
        assert text.startswith(
            f"CheckpointError: the checkpoint at 20 samples could not be written: rank {poor}: File too large"
        ), text
        assert "earlier checkpoints are untouched" in text
        assert each[f"after that of {poor}"] == ["latest", "samples-000000000010"]


def test_a_failure_in_the_background_reaches_all_and_the_next_save_goes_on(
    root: Path, seen: list[dict[str, Any]]
) -> None:
    for each in seen:
        assert each["in the background"].startswith(
            "CheckpointError: the checkpoint at 30 samples could not be written: rank 1: File too large"
        )
    assert latest(root / "checkpoints")[0] == root / "checkpoints" / "samples-000000000040"


def test_damage_that_one_finds_is_skipped_by_all(root: Path, seen: list[dict[str, Any]]) -> None:
    path = str(root / "checkpoints" / "samples-000000000010")
    name = "tensors/00001-of-00002.safetensors"
    reason = f"samples-000000000040: the checkpoint is damaged: the sha256 of {name} differs from the manifest"
    assert [each["restored"] for each in seen] == [[path, {"position": 10}, [reason]]] * 2


def test_when_one_cannot_read_nobody_waits_for_it(seen: list[dict[str, Any]]) -> None:
    assert seen[1]["one cannot read"].startswith("CheckpointError: the tensors cannot be read: Input/output error")
    assert seen[0]["one cannot read"].startswith("OtherRankError: rank 1: the tensors cannot be read: Input/output")
    for each in seen:
        assert each["restore then"].startswith("CheckpointError: none of the 2 checkpoints can be used: ")
        assert "cannot be read: Input/output error" in each["restore then"]


def test_an_error_of_one_is_named_to_the_others(seen: list[dict[str, Any]]) -> None:
    assert seen[1]["everywhere"] == "ValueError: no"
    assert seen[0]["everywhere"].startswith("OtherRankError: rank 1: no\n  do:    see the messages of that rank")
    assert [each["together"] for each in seen] == [[0, 2], [0, 2]]
