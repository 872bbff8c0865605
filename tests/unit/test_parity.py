"""Parity is a verdict: published values pass, any value that differs or cannot be compared fails, nothing is silent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published import Shape, write_reference

from foundation.errors import DataError
from foundation.objectives.histograms import HOG, SARHOG
from foundation.objectives.targets import GaussianRatio, patchify
from foundation.parity import ATTENTION, CHECKS, RADII, Line, compare
from kernels.gradient_ratio.reference import reference
from kernels.rpe_attention.buckets import num_buckets, product_buckets

GOLDEN = Path(__file__).parents[1] / "golden"
HISTOGRAMS, VARIANTS = "hog_targets.npz", "target_variants.npz"
LOMAR, MAE = "lomar_pretrain_step.npz", "mae_pretrain_step.npz"
STEP, CLASSIFIER, TARGETS = "sarjepa_pretrain_step.npz", "classifier.npz", "gradient_targets.npz"
STEPS = (STEP, LOMAR, MAE)
Command = Callable[..., Any]
Values = dict[str, Any]


def failures(folder: Path) -> list[Line]:
    return [line for line in compare(folder) if line.status == "FAILED"]


def change(path: Path, edit: Callable[[Values], object]) -> None:
    """Rewrite a reference file after `edit` of its values."""
    if path.suffix == ".json":
        values = json.loads(path.read_text())
        edit(values)
        path.write_text(json.dumps(values))
    else:
        with np.load(path, allow_pickle=False) as file:
            values = dict(file.items())
        edit(values)
        np.savez(path, **values)


def add(name: str, value: float) -> Callable[[Values], object]:
    """An edit of the last number of an array or list."""

    def edit(values: Values) -> None:
        if isinstance(values[name], list):
            values[name][-1] += value
        else:
            values[name] = values[name].copy()
            values[name][(-1,) * values[name].ndim] += value

    return edit


def scale_norm(factor: float) -> Callable[[Values], object]:
    """An edit of the last gradient norm."""

    def edit(values: Values) -> None:
        norms = json.loads(str(values["grad_norms"]))
        norms[list(norms)[-1]] *= factor
        values["grad_norms"] = np.array(json.dumps(norms))

    return edit


def write_histograms(folder: Path) -> None:
    """The files of the histogram targets and the Gaussian one, of smaller images by our own classes."""
    images = np.random.default_rng(1).integers(0, 256, (2, 1, 32, 48), dtype=np.uint8)
    pixels = torch.from_numpy(images).float() / 255
    found: Values = {"images": images}
    for name, window in (("gaussian_window_16", 16), ("no_gaussian_window", None)):
        cells = HOG(8, 9, window).maps(pixels)
        found |= {f"{name}_cells": cells.numpy(), f"{name}_patches": patchify(cells, 2).numpy()}
    np.savez(folder / HISTOGRAMS, **found)
    bins = patchify(SARHOG(RADII, 0.01, "include", 8, 9, exact=False).maps(pixels), 2)
    by_radius = bins.unflatten(-1, (len(RADII), -1)).transpose(1, 2).numpy()
    gaussian = GaussianRatio(RADII, 0.01, "exclude").maps(pixels).numpy()
    np.savez(folder / VARIANTS, images=images, gaussian=gaussian, sar_hog_patches=by_radius)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """All reference files: those of the step from a small model, so that comparing takes no time."""
    for path in GOLDEN.glob("*.json"):
        shutil.copy(path, tmp_path)
    for name in ("rpe_buckets.npz", *STEPS[1:]):
        shutil.copy(GOLDEN / name, tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (3, 1, 30, 44), dtype=np.uint8)
    maps = reference(torch.from_numpy(images).float() / 255, (5, 9, 13, 17), 0.01, "include").numpy()
    np.savez(tmp_path / TARGETS, images=images, targets=maps)
    write_histograms(tmp_path)
    return write_reference(tmp_path, Shape())


def test_the_published_values_pass_and_every_file_is_accounted_for() -> None:
    lines = list(compare(GOLDEN))
    assert {line.file for line in lines} == {path.name for path in GOLDEN.glob("*") if path.suffix in (".npz", ".json")}
    assert set(CHECKS) <= {line.file for line in lines}
    assert [line for line in lines if line.status != "ok"] == []


def test_one_entry_in_a_thousand_of_a_histogram_may_fall_on_the_other_side_of_an_edge_and_no_more(folder: Path) -> None:
    def turn(share: float) -> Callable[[Values], object]:
        def edit(values: Values) -> None:
            cells = values["no_gaussian_window_cells"].copy()
            cells.reshape(-1)[: int(share * cells.size)] += 0.1
            values["no_gaussian_window_cells"] = cells

        return edit

    with np.load(GOLDEN / HISTOGRAMS) as file:  # more entries than the small file has
        np.savez(folder / HISTOGRAMS, **file)
    change(folder / HISTOGRAMS, turn(9e-4))
    assert failures(folder) == []
    change(folder / HISTOGRAMS, turn(2e-3))
    assert {line.file for line in failures(folder)} == {HISTOGRAMS}


def test_every_backend_is_compared_with_every_value() -> None:
    items = {(line.file, line.item) for line in compare(GOLDEN)}
    for backend in ATTENTION:
        files = (*STEPS, CLASSIFIER)
        named = {file: {i for f, i in items if f == file and i.endswith(f", {backend}")} for file in files}
        assert all(len(named[step]) == 3 for step in STEPS), named
        assert len(named[CLASSIFIER]) == 2, named


def test_the_fused_kernels_make_the_published_step(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    for name in (STEP, CLASSIFIER):
        shutil.copy(GOLDEN / name, tmp_path)
    lines = list(compare(tmp_path, ["triton"]))
    assert len([line for line in lines if line.item.endswith(", triton")]) == 5
    assert [line for line in lines if line.status != "ok"] == []


def test_the_command_says_ok_line_by_line_and_exits_with_zero(folder: Path, command: Command) -> None:
    outcome = command("parity", folder)
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert len(lines) == len(list(compare(folder)))
    assert all(line.startswith("ok ") for line in lines)
    assert f"{STEP}: prediction, dense  error " in outcome.out


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        (TARGETS, add("targets", 1e-4)),
        (TARGETS, add("targets", np.nan)),
        (TARGETS, add("images", 1)),
        (HISTOGRAMS, lambda v: v.update(gaussian_window_16_cells=v["gaussian_window_16_cells"] + 2e-4)),
        (HISTOGRAMS, add("no_gaussian_window_patches", np.nan)),
        (HISTOGRAMS, lambda v: v.update(no_gaussian_window_cells=v["no_gaussian_window_cells"][:1])),
        (VARIANTS, add("gaussian", 1e-4)),
        (VARIANTS, add("sar_hog_patches", np.nan)),
        (VARIANTS, lambda v: v.update(sar_hog_patches=v["sar_hog_patches"] + 2e-4)),
        (VARIANTS, lambda v: v.update(sar_hog_patches=v["sar_hog_patches"][:, 1:])),
        ("rpe_buckets.npz", add("product_7x7", -1)),
        ("rpe_buckets.npz", add("num_buckets", 1)),
        (STEP, add("pred", 3e-4)),
        (STEP, add("pred", np.nan)),
        (STEP, add("loss", 1e-3)),
        (STEP, add("loss", np.nan)),
        (STEP, add("patch_ids", -1)),
        (STEP, add("state/mask_token", 0.1)),
        (STEP, scale_norm(1.01)),
        (STEP, scale_norm(np.nan)),
        (LOMAR, add("pred", 3e-4)),
        (LOMAR, add("loss", 1e-3)),
        (LOMAR, add("state/encoder_pred.bias", 0.1)),
        (LOMAR, scale_norm(1.01)),
        (MAE, add("pred", 3e-4)),
        (MAE, add("loss", np.nan)),
        (MAE, add("state/mask_token", 0.1)),
        (MAE, add("state/pos_embed", 1e-4)),
        (MAE, add("state/decoder_pos_embed", np.nan)),
        (MAE, scale_norm(1.01)),
        (CLASSIFIER, add("logits", 3e-4)),
        (CLASSIFIER, add("cls_features", np.nan)),
        (CLASSIFIER, add("mean_attention_distance", 0.1)),
        ("lr_schedule.json", add("lr", 1e-8)),
        ("lr_schedule.json", lambda v: v["lr"].__setitem__(3, float("nan"))),
        ("lr_schedule.json", lambda v: v["lr"].pop()),
        ("vit_base_state_shapes.json", lambda v: v.update({"decoder_norm.bias": [511]})),
        ("vit_base_state_shapes.json", lambda v: v.pop("blocks.11.norm1.bias")),
        ("vit_base_state_shapes.json", lambda v: v.update(head=[10, 768])),
    ],
)
def test_one_changed_value_fails_with_its_file_and_exit_code_1(
    folder: Path, command: Command, name: str, edit: Callable[[Values], object]
) -> None:
    change(folder / name, edit)
    outcome = command("parity", folder)
    assert outcome.code == 1
    failed = [line for line in outcome.out.splitlines() if line.startswith("FAILED ")]
    assert failed
    # The classifier's comparison takes weights and images from the file of the step.
    assert all(line.split()[1] in (f"{name}:", f"{CLASSIFIER}:" if name == STEP else "") for line in failed), failed


@pytest.mark.parametrize(
    "shape",
    [
        Shape(img_size=42, patch=14, dim=32, depth=2, heads=4, ddim=24, ddepth=1, dheads=3, n=5, nw=1, ws=3, mr=0.75),
        Shape(img_size=64, patch=16, dim=20, depth=3, heads=1, ddim=40, ddepth=2, dheads=5, n=4, nw=4, ws=4, mr=0.5),
        Shape(img_size=36, patch=4, dim=16, depth=1, heads=2, ddim=16, ddepth=3, dheads=1, n=1, nw=3, ws=5, mr=0.9),
    ],
    ids=lambda s: f"{s.img_size}px-patch{s.patch}-{s.dim}x{s.depth}-n{s.n}",
)
def test_reference_values_of_any_configuration_can_be_compared(tmp_path: Path, shape: Shape) -> None:
    lines = list(compare(write_reference(tmp_path, shape, seed=3)))
    assert len(lines) == len(ATTENTION) * 5 + 1
    assert [line for line in lines if line.status != "ok"] == []


def test_buckets_of_any_grid_and_schedules_of_any_length_can_be_compared(tmp_path: Path) -> None:
    grids = [(2, 9), (16, 5), (1, 1)]
    arrays: Values = {f"product_{h}x{w}": product_buckets((h, w)).numpy().astype(np.int16) for h, w in grids}
    np.savez(tmp_path / "rpe_buckets.npz", num_buckets=num_buckets(), **arrays)
    rates = {"base_lr": 2e-3, "batch": 128, "warmup_epochs": 0, "epochs": 8, "epoch": [0, 4, 8], "lr": [1e-3, 5e-4, 0]}
    (tmp_path / "lr_schedule.json").write_text(json.dumps(rates))
    lines = list(compare(tmp_path))
    assert {line.item for line in lines} >= {"iRPE buckets 2x9", "iRPE buckets 16x5", "learning rate at 3 epochs"}
    assert [line for line in lines if line.status != "ok"] == []


def test_unknown_files_are_listed_as_not_covered(tmp_path: Path, command: Command) -> None:
    (tmp_path / "surprise.json").write_text("{}")
    (tmp_path / "README.md").write_text("not a reference file")
    assert [(line.file, line.status) for line in compare(tmp_path)] == [("surprise.json", "not covered yet")]
    outcome = command("parity", tmp_path)
    assert outcome.code == 0
    assert "not covered yet surprise.json: unknown file" in outcome.out


def test_a_missing_companion_file_is_a_failure_that_names_it(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / CLASSIFIER, tmp_path)
    (line,) = compare(tmp_path)
    assert (line.file, line.status) == (CLASSIFIER, "FAILED")
    assert f"{STEP} is missing" in line.note


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        (TARGETS, lambda b: b[:1000], "File is not a zip file"),
        (TARGETS, lambda b: b[:700] + bytes(50) + b[750:], "Bad CRC-32"),
        (STEP, lambda _: b"", "No data left in file"),
        (STEP, lambda _: b"hello", ""),
        ("lr_schedule.json", lambda b: b[:40], ""),
        ("lr_schedule.json", lambda _: b"[1, 2]", "it holds a list, not names and values"),
    ],
)
def test_a_damaged_file_is_a_failure_and_the_others_are_still_compared(
    folder: Path, name: str, damage: Callable[[bytes], bytes], reason: str
) -> None:
    (folder / CLASSIFIER).unlink()
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    (line,) = failures(folder)
    assert (line.file, line.item, line.error) == (name, "cannot be compared", None)
    assert f"{name} cannot be read: " in line.note
    assert reason in line.note
    assert "\n" not in line.note
    others = {path.name for path in folder.iterdir()} - {name}
    assert {other.file for other in compare(folder) if other.status == "ok"} == others & set(CHECKS)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda v: v.pop("grad_norms"), "KeyError: 'grad_norms'"),
        (
            lambda v: v.pop("state/blocks.0.attn.rpe_k.lookup_table_weight"),
            "'encoder.blocks.0.attn.rpe.table' is missing",
        ),
        (lambda v: v.pop("state/decoder_norm.weight"), "Missing key(s) in state_dict"),
        (lambda v: v.update(config=np.array(json.dumps(Shape(heads=4)._asdict()))), "the file's configuration 4, 2"),
        (lambda v: v.update(mask=v["mask"][:-1]), "RuntimeError"),
        (lambda v: v.update(grad_norms=np.array('{"cls_token": 1.0}')), "names differ"),
    ],
)
def test_a_file_that_describes_no_model_is_a_failure_with_the_reason(
    folder: Path, edit: Callable[[Values], object], reason: str
) -> None:
    (folder / CLASSIFIER).unlink()
    change(folder / STEP, edit)
    found = failures(folder)
    assert found
    assert all(line.file == STEP and reason in line.note for line in found), found


@pytest.mark.parametrize("name", ["empty", "absent"])
def test_a_folder_without_reference_values_is_an_error(tmp_path: Path, name: str, command: Command) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("nothing to compare")
    with pytest.raises(DataError, match="no reference values here"):
        list(compare(tmp_path / name))
    outcome = command("parity", tmp_path / name)
    assert outcome.code == 2
    assert "DataError: no reference values here" in outcome.err
    assert "name a folder with *.npz and *.json" in outcome.err
