"""The Triton backend computes what the definition says for every shape and tiling, and compiles for every GPU.

On a GPU the tests run the compiled kernels; without one, Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.gradient_ratio import BACKENDS, backends, gradient_ratio, resolve
from kernels.gradient_ratio.scales import FULL_SCALE, Scales

RUNS = not BACKENDS["triton"].unavailable
NEEDS_TRITON = pytest.mark.skipif(not RUNS, reason=BACKENDS["triton"].unavailable)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 3e-6 if DEVICE == "cuda" else 1e-6  # a GPU's fast logarithm: three units in the last place of 5
V1, V2 = Scales((5, 9, 13, 17), 0.01, "include"), Scales((3, 5, 9, 13, 17), 1e-6, "exclude", True, True)


def noise(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """Pixels of all values, with a dark and a saturated corner."""
    values = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values[..., : shape[-2] // 3, : shape[-1] // 3] = 0
    values[..., -shape[-2] // 4 :, -shape[-1] // 4 :] = 1
    return (values * FULL_SCALE[dtype]).to(dtype)


@NEEDS_TRITON
@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from([torch.uint8, torch.uint16, torch.float32, torch.float64]),
    batch=st.integers(0, 3),
    sides=st.tuples(st.integers(4, 45), st.integers(4, 45)),
    radii=st.lists(st.integers(1, 44), min_size=1, max_size=4),
    tile=st.tuples(st.integers(7, 50), st.integers(7, 50)),
    offset=st.sampled_from([1e-3, 0.01, 0.3]),
    centre=st.sampled_from(["include", "exclude"]),
    blind_spot=st.booleans(),
    sigmoid=st.booleans(),
)
def test_maps_do_not_depend_on_how_an_image_is_tiled(
    dtype: torch.dtype, batch: int, sides: tuple[int, int], radii: list[int], tile: tuple[int, int], offset: float,
    centre: str, blind_spot: bool, sigmoid: bool,
) -> None:  # fmt: skip
    from kernels.gradient_ratio import tiles

    radii = [min(radius, min(sides) - 1) for radius in radii]
    scales = Scales(tuple(radii), offset, centre, blind_spot, sigmoid)
    images = noise(dtype, (batch, 1, *sides), seed=sum(sides))
    walk = tiles.plan(*tile, scales.reach, tiles.MAPS)
    pieces = walk._replace(step=min(walk.step, 16), block=min(walk.block, 256))
    one, many = (tiles.tiles(images.to(DEVICE), scales, way).cpu() for way in (None, pieces))
    exact = BACKENDS["reference"].run(images.double() / FULL_SCALE[dtype], scales) if batch else one
    assert one.dtype == torch.float32
    assert one.shape == (batch, scales.maps, *sides)
    for maps in (one, many):
        assert torch.allclose(maps, exact, rtol=0, atol=TOLERANCE)
    if not dtype.is_floating_point and not sigmoid:
        assert torch.equal(one, many)  # integer sums do not depend on the order


@NEEDS_TRITON
def test_a_view_of_a_larger_tensor_is_read_as_its_values() -> None:
    images = noise(torch.uint8, (2, 3, 20, 24), 0).to(DEVICE)
    view = images[:, 1:2].transpose(-1, -2)
    assert torch.equal(
        gradient_ratio(view, (3, 5), backend="triton"), gradient_ratio(view.clone(), (3, 5), backend="triton")
    )


def test_auto_is_the_integral_image_on_a_cpu_and_triton_on_a_gpu_that_it_runs_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = BACKENDS["triton"]
    for unavailable, on_gpu in (("", "triton"), ("triton is not installed", "integral")):
        monkeypatch.setitem(BACKENDS, "triton", row._replace(unavailable=unavailable))
        assert resolve("auto", "cpu") == "integral"
        assert resolve("auto", "cuda") == on_gpu
    with pytest.raises(ValueError, match="target backend 'triton' cannot run here: triton is not installed"):
        resolve("triton", "cuda")


def test_the_reason_why_triton_cannot_run_is_the_true_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.why_not_triton() == ""
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert backends.why_not_triton() == ""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert backends.why_not_triton() == "no CUDA device; TRITON_INTERPRET=1 runs it on a CPU, slowly"
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed: pip install" in backends.why_not_triton()


@NEEDS_TRITON
def test_compiled_kernels_refuse_images_that_are_not_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.gradient_ratio import tiles

    monkeypatch.setattr(tiles, "INTERPRETED", False)
    with pytest.raises(ValueError, match="'triton' takes CUDA images, not cpu; TRITON_INTERPRET=1 takes both"):
        gradient_ratio(torch.rand(1, 1, 24, 24), (3,), backend="triton")


WITHOUT = """
import sys
sys.modules["triton"] = None
import torch
from kernels.gradient_ratio import BACKENDS, gradient_ratio
assert gradient_ratio(torch.rand(1, 1, 24, 24), (3,)).shape == (1, 1, 24, 24)
assert not torch.cuda.is_initialized()
print(BACKENDS["triton"].unavailable)
"""


def test_the_package_works_without_triton_and_without_starting_cuda() -> None:
    assert "triton is not installed" in _python(WITHOUT)


COMPILED = """
import json
from kernels.ahead import ARCHITECTURES, needs
from kernels.gradient_ratio import tiles
from kernels.gradient_ratio.scales import Scales

NAMES = {"offset": "fp32", "unit": "fp32", "scale": "fp32", "maps": "*fp32", "partials": "*fp32", "patch_ids": "*i64",
         "prediction": "*bf16", "gradient": "*bf16"}
def compiled(kernel, architecture, pixels, sums, scales, walk, launch, **more):
    constants = tiles.constants(scales, walk) | more
    names = {**NAMES, "images": "*" + pixels, "tables": "*" + sums}
    types = {n: names.get(n, "i32") for n in kernel.arg_names if n not in constants}
    return needs(kernel, types, constants, architecture, num_warps=launch.warps, num_stages=1)._asdict()

v1, v2 = Scales((5, 9, 13, 17), 0.01, "include"), Scales((3, 5, 9, 13, 17), 1e-6, "exclude", True, True)
found = {}
for architecture in ARCHITECTURES:
    for pixels, sums, scales in (("u8", "u32", v1), ("u16", "u32", v1), ("fp32", "fp64", v1), ("fp32", "fp64", v2)):
        walk = tiles.tiling(224, 224, scales.reach)
        where = f"{architecture} {pixels} {scales.maps} maps"
        found[where] = compiled(tiles.maps_kernel, architecture, pixels, sums, scales, walk, tiles.MAPS,
                                TILE_H=walk.high, TILE_W=walk.wide)
        if pixels == "fp32":
            walk = tiles.patch_plan(16, scales.reach)
            found[where + " loss"] = compiled(tiles.loss_kernel, architecture, pixels, sums, scales, walk, tiles.LOSS,
                                              PATCH=16, KEEP=True)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_the_kernels_compile_for_every_gpu_within_its_registers() -> None:
    pytest.importorskip("triton")
    found = json.loads(_python(COMPILED))
    assert len(found) == 18
    for name, needs in found.items():
        print(name, needs)  # pytest -s shows the table
        assert needs["registers"] <= (104 if "loss" in name else 85), name  # 20 and 24 warps at once
        assert needs["spilled"] <= 16, name  # bytes per thread
        assert needs["shared"] <= 16384, name


def _python(program: str) -> str:
    """What a process prints in which Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
