"""A checkpoint is whole or it is none: no failure of disk, process or file leaves a run with less than it had."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import load as dcp_load
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from foundation.errors import CheckpointError
from foundation.training import pieces
from foundation.training.checkpoint import check_tensors, latest, load, read, restore, save, shapes
from foundation.training.places import Folder

PIECE = "tensors/00000-of-00001.safetensors"
STATE: dict[str, Any] = {"position": 7, "config": {"lr": 1e-3, "radii": [5, 9]}, "run_id": None}


def tensors(width: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(width)
    return {
        "model.w": torch.randn(width, width, generator=generator),
        "model.b": torch.arange(width).to(torch.bfloat16),
        "exp_avg.w": torch.randn(width, width, generator=generator),
        "step": torch.tensor(3.0),
    }


def empty(like: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, -1) for name, tensor in like.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that another user could reach, unlike pytest's own."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path / "checkpoints"
    shutil.rmtree(path)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes of a file really fail, with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_was_saved_is_loaded_bit_for_bit(folder: Path) -> None:
    path = save(folder, tensors(), STATE, 12_800)
    assert path == folder / "samples-000000012800"
    assert names(folder / path.name) == ["COMMIT", "manifest.json", "state.json", "tensors"]
    for where in (folder.parent, folder, path, str(folder), f"file://{folder}"):
        found = load(where)
        assert found["config"] == STATE["config"]
        assert found["run_id"] is None
        assert same(found["tensors"], tensors())
    assert restore(folder) == (path, STATE, [])
    filled = empty(tensors())
    read(path, filled)
    assert same(filled, tensors())
    assert (folder / "latest").read_text() == "samples-000000012800\n"
    assert not list(folder.glob(".tmp*"))


def filled(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Other values at neighbouring places, which every dtype holds."""
    return (torch.arange(float(np.prod(shape))) * 7 % 5).reshape(shape).to(dtype)


SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # torch's own reader, in one process
@given(st.dictionaries(st.sampled_from("abcdef"), st.tuples(SHAPES, st.sampled_from(list(pieces.NAMES))), min_size=1))
@settings(max_examples=25, deadline=None)
def test_tensors_of_any_shape_and_dtype_come_back_and_other_programs_can_read_them(
    kinds: dict[str, tuple[tuple[int, ...], torch.dtype]],
) -> None:
    given = {name: filled(shape, dtype) for name, (shape, dtype) in kinds.items()}
    with tempfile.TemporaryDirectory() as place:
        path = Path(str(save(Path(place), given, {}, 1)))
        assert same_bits(load(path)["tensors"], given)
        assert same_bits(load_file(path / PIECE), given)  # safetensors' own reader
        copy = {name: torch.zeros_like(tensor) for name, tensor in given.items()}
        dcp_load(copy, storage_reader=HuggingFaceStorageReader(str(path / "tensors")), no_dist=True)  # torch's own
        assert same_bits(copy, given)


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Also for dtypes that cannot be compared."""
    facts = [{n: (t.dtype, t.shape, t.reshape(-1).view(torch.uint8).tolist()) for n, t in x.items()} for x in (a, b)]
    return facts[0] == facts[1]


def test_a_dtype_that_checkpoints_do_not_hold_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"z is of torch\.complex64, which checkpoints do not hold"):
        save(folder, {"z": torch.zeros(2, dtype=torch.complex64)}, {}, 10)
    assert names(folder) == []


def test_only_the_tensors_that_are_asked_for_are_loaded(folder: Path) -> None:
    save(folder, tensors(), STATE, 10)
    found = load(folder, "model.")["tensors"]
    assert same(found, {"w": tensors()["model.w"], "b": tensors()["model.b"]})
    assert "tensors" not in load(folder, None)
    assert load(folder, "other.")["tensors"] == {}


@given(
    st.lists(st.integers(1, 12).map(lambda n: 100 * n), min_size=1, max_size=8, unique=True),
    st.integers(1, 3),
    st.sampled_from([None, 300, 500]),
    st.sets(st.integers(1, 12).map(lambda n: 100 * n)),
)
@settings(max_examples=25, deadline=None)
def test_retention_keeps_the_newest_the_milestones_the_pinned_and_the_one_just_saved(
    saves: list[int], keep: int, keep_every: int | None, pins: set[int]
) -> None:
    alive: set[int] = set()
    with tempfile.TemporaryDirectory() as place:
        for position in saves:
            path = Path(str(save(Path(place), {"x": torch.zeros(1)}, {}, position, keep, keep_every)))
            if position in pins:
                (path / "PIN").touch()
            alive.add(position)
            kept = set(sorted(alive)[-keep:]) | {position} | (alive & pins - {position})
            buckets = {p // keep_every for p in alive} - {0} if keep_every else set()
            kept |= {min(p for p in alive if keep_every and p // keep_every == bucket) for bucket in buckets}
            alive &= kept
            assert {int(p.name[8:]) for p in Path(place).glob("samples-*")} == alive
            assert latest(Path(place)) == (Path(place) / f"samples-{max(alive):012d}", [])
            assert (Path(place) / "latest").read_text() == f"samples-{position:012d}\n"


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=12),
    st.integers(1, 3),
    st.sampled_from([1000, 1500]),
)
@settings(max_examples=25, deadline=None)
def test_the_first_checkpoint_after_every_multiple_stays_wherever_saves_land_and_after_going_back(
    steps: list[tuple[int, int]], keep: int, keep_every: int
) -> None:
    position, milestones = 0, dict[int, int]()
    with tempfile.TemporaryDirectory() as place:
        for step, back in steps:
            position += 210 * step
            save(Path(place), {"x": torch.zeros(1)}, {}, position, keep, keep_every)
            if position >= keep_every:
                milestones.setdefault(position // keep_every, position)
            alive = sorted(int(p.name[8:]) for p in Path(place).glob("samples-*"))
            assert set(milestones.values()) <= set(alive)
            assert len(alive) <= len(milestones) + keep
            if back and back < len(alive):  # as a rewind: those beyond go
                position = alive[-1 - back]
                for gone in alive[-back:]:
                    shutil.rmtree(Path(place) / f"samples-{gone:012d}")
                milestones = {bucket: p for bucket, p in milestones.items() if p <= position}


def test_an_old_checkpoint_that_cannot_be_removed_costs_a_line_and_not_the_save(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stuck(self: Folder) -> None:
        raise OSError(16, "Device or resource busy")

    save(folder, tensors(), STATE, 10)
    monkeypatch.setattr(Folder, "remove", stuck)
    assert save(folder, tensors(), STATE, 20, keep=1) == folder / "samples-000000000020"
    assert f"old checkpoints in {folder} could not be removed: Device or resource busy" in caplog.text
    monkeypatch.undo()
    save(folder, tensors(), STATE, 30, keep=1)
    assert names(folder) == ["latest", "samples-000000000030"]


def test_going_back_keeps_the_checkpoint_just_saved(folder: Path) -> None:
    for position in (10, 20, 5):
        save(folder, tensors(), STATE, position, keep=1)
    assert names(folder) == ["latest", "samples-000000000005", "samples-000000000020"]


def test_saving_a_position_again_replaces_it(folder: Path) -> None:
    save(folder, tensors(4), STATE, 10)
    save(folder, tensors(5), STATE, 10)
    assert load(folder)["tensors"]["model.w"].shape == (5, 5)
    assert names(folder) == ["latest", "samples-000000000010"]


def test_a_replacement_that_was_cut_between_its_two_renames_is_finished_at_the_next_start(folder: Path) -> None:
    save(folder, tensors(5), STATE, 10)
    path = folder / "samples-000000000010"
    path.rename(folder / ".tmp-samples-000000000010")  # committed, only its name is missing
    save(folder.with_name("old"), tensors(4), STATE, 10)
    (folder.with_name("old") / path.name).rename(folder / ".tmp-replaced-samples-000000000010")
    assert restore(folder)[0] == path
    assert same(load(folder)["tensors"], tensors(5))
    save(folder, tensors(), STATE, 20)
    assert names(folder) == ["latest", "samples-000000000010", "samples-000000000020"]


def test_a_save_after_a_cut_replacement_does_not_throw_the_committed_one_away(folder: Path) -> None:
    save(folder, tensors(5), STATE, 10)
    (folder / "samples-000000000010").rename(folder / ".tmp-samples-000000000010")
    save(folder, tensors(), STATE, 20)
    assert names(folder) == ["latest", "samples-000000000010", "samples-000000000020"]


def test_a_full_disk_midway_costs_only_the_new_checkpoint(folder: Path) -> None:
    save(folder, tensors(), STATE, 10)
    before = names(folder)
    with largest_file(100_000), pytest.raises(CheckpointError, match="at 20 samples could not be written: ") as caught:
        save(folder, tensors(400), STATE, 20)
    assert "File too large" in str(caught.value)
    assert f"where: {folder / 'samples-000000000020'}" in str(caught.value)
    assert "free space or correct the permissions, then resume; earlier checkpoints are untouched" in str(caught.value)
    assert names(folder) == before
    assert same(load(folder)["tensors"], tensors())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_without_permission_is_named_as_root(folder: Path) -> None:
    save(folder, tensors(), STATE, 10)
    os.seteuid(65534)
    try:
        with pytest.raises(CheckpointError, match="could not be written: Permission denied"):
            save(folder, tensors(), STATE, 20)
        assert same(load(folder)["tensors"], tensors())
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(folder: Path) -> None:
    save(folder, tensors(), STATE, 10)
    folder.chmod(0o555)
    try:
        with pytest.raises(CheckpointError, match="could not be written: Permission denied"):
            save(folder, tensors(), STATE, 20)
        assert same(load(folder)["tensors"], tensors())
    finally:
        folder.chmod(0o755)


def test_an_interruption_during_the_write_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(folder, tensors(), STATE, 10)
    before = names(folder)

    def interrupted(self: Folder, parts: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Folder, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(folder, tensors(), STATE, 20)
    assert names(folder) == before


def test_every_file_and_every_name_is_on_the_disk_before_the_checkpoint_appears(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def recorded(descriptor: int) -> None:
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        events.append(("rename", str(self)))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(Path, "rename", renamed)
    path = Path(str(save(folder, tensors(), STATE, 10)))
    draft = folder / ".tmp-samples-000000000010"
    at = events.index(("rename", str(draft)))
    flushed = [Path(name) for kind, name in events[:at] if kind == "fsync"]
    files = [draft / file.relative_to(path) for file in path.rglob("*") if file.is_file()]
    assert set(flushed) == {*files, draft / "tensors", draft}
    assert ("fsync", str(folder)) in events[at:]
    order = [flushed.index(draft / name) for name in (PIECE, "manifest.json", "COMMIT")]
    assert order == sorted(order)


@pytest.mark.parametrize("value", [np.int64(1), float("nan"), Path("x"), {1, 2}, torch.zeros(1)])
def test_a_value_that_could_not_be_read_back_is_refused_before_anything_is_written(folder: Path, value: object) -> None:
    with pytest.raises(CheckpointError, match=r"the state could not be read back: [\s\S]*put only JSON values into it"):
        save(folder, tensors(), {"a": {"b": [value]}}, 10)
    assert not folder.exists()


def test_another_model_is_refused_before_any_tensor_is_changed(folder: Path) -> None:
    path = save(folder, tensors(), STATE, 10)
    filled = {**empty(tensors()), "more": torch.full((2,), -1.0)}
    with pytest.raises(CheckpointError, match="the checkpoint is of another model; 1 missing: more"):
        read(path, filled)
    assert all((tensor == -1).all() for tensor in filled.values())
    with pytest.raises(CheckpointError, match=r"1 of another shape: model\.w \[4, 4\], not \[5, 4\]"):
        read(path, {**empty(tensors()), "model.w": torch.zeros(5, 4)})


def test_an_index_that_is_not_one_is_named(folder: Path) -> None:
    path = Path(str(save(folder, tensors(), STATE, 10)))
    for text in (
        *("{", "[]", "{}", '{"files": [], "tensors": {"a": ["F99", [1], []]}}'),
        *('{"files": ["/etc/passwd"], "tensors": {}}', '{"files": ["../../secret.safetensors"], "tensors": {}}'),
        *('{"files": [], "tensors": {"a": ["F32", [4], []]}}',),  # would keep what is in memory
    ):
        (path / "tensors" / "index.json").write_text(text)
        with pytest.raises(CheckpointError, match="the tensors cannot be read"):
            read(path, empty(tensors()))


def test_a_tensor_larger_than_any_memory_is_an_error_and_no_traceback(folder: Path) -> None:
    path = Path(str(save(folder, tensors(), STATE, 10)))
    size = 1 << 50
    index = {"files": ["00000-of-00001.safetensors"], "tensors": {"a": ["F32", [size], [[0, [0], [size], 0]]]}}
    text = json.dumps(index)
    (path / "tensors" / "index.json").write_text(text)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["tensors/index.json"] = {
        "bytes": len(text),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="the checkpoint cannot be read"):
        load(path)


def test_what_is_not_ours_stays_where_it_is(folder: Path) -> None:
    for name in (".tmp-notes", "samples-raw"):
        (folder / name).mkdir(parents=True)
    (folder / "samples-list.csv").write_text("x")
    save(folder, tensors(), STATE, 10)
    assert {".tmp-notes", "samples-raw", "samples-list.csv"} <= set(names(folder))


def test_another_model_is_described_by_the_names_that_differ() -> None:
    small, large = torch.nn.Linear(2, 2).state_dict(), torch.nn.Linear(2, 3).state_dict()
    check_tensors(shapes(small), shapes(small))
    extra = {f"extra{i}": torch.zeros(1) for i in range(5)}
    with pytest.raises(CheckpointError) as caught:
        check_tensors(shapes({"weight": small["weight"], **extra}), shapes(large), where="here")
    message = str(caught.value)
    assert "the checkpoint is of another model; 1 missing: bias; 5 unexpected: extra0, extra1, extra2, ...;" in message
    assert "1 of another shape: weight [2, 2], not [3, 2]" in message
    assert "where: here" in message


def test_a_run_folder_whose_configuration_puts_its_checkpoints_elsewhere_is_read_from_there(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    (run / "config.yaml").write_text(f"train: {{checkpoints: {elsewhere}}}\n")
    path = save(elsewhere, tensors(), STATE, 10)
    assert latest(run)[0] == path
    assert same(load(run)["tensors"], tensors())
    (run / "config.yaml").write_text("train: {checkpoints: null}\n")
    assert latest(run)[0] is None
