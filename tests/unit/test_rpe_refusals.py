"""A call that does not fit, or that a backend does not take, is refused with the argument and what is allowed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.rpe_attention import BACKENDS, fused, libraries, rpe_attention, rpe_attention_packed
from kernels.rpe_attention.layout import Layout, Problem

CALL: dict[str, Any] = {
    **{name: torch.zeros(2, 2, 16, 4, dtype=torch.float64) for name in "qkv"},
    "table": torch.zeros(1, 4, 50, dtype=torch.float64),
    "grid": (3, 5),
}
WINDOW = Problem("cuda", torch.bfloat16, 12, 64, Layout((7, 7)), trains=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": (3, 4)}, "16 tokens do not fit a 3x4 grid with 1 class tokens"),
        ({"cls_tokens": 0}, "16 tokens do not fit a 3x5 grid with 0 class tokens"),
        ({"table": torch.zeros(3, 4, 50)}, r"table \(3, 4, 50\) must be \[1 or 2, 4, 50\] or \[1 or 2, 50\]"),
        ({"table": torch.zeros(1, 8, 50)}, r"table \(1, 8, 50\) must be \[1 or 2, 4, 50\] or \[1 or 2, 50\]"),
        ({"table": torch.zeros(1, 49)}, r"table \(1, 49\) must be \[1 or 2, 4, 50\] or \[1 or 2, 50\]"),
        ({"table": torch.zeros(1, 4, 50, device="meta")}, "table is on meta, q, k, v on cpu: one device is allowed"),
        ({"q": torch.zeros(2, 2, 16, 8)}, r"q, k, v must have one shape \[B, H, L, d\], not \(2, 2, 16, 8\), "),
        ({"q": torch.zeros(2, 2, 16, 4)}, "q, k, v must have one dtype and one device"),
        (
            {name: torch.zeros(2, 2, 16, 4, dtype=torch.int) for name in "qkv"},
            "must be floating point, not torch.int32",
        ),
        ({"grid": (0, 15), "cls_tokens": 16}, "grid 0x15 with 16 class tokens: at least 1x1 with 0 is allowed"),
        ({"method": "qint"}, "unknown method 'qint': choose product, cross, euclidean, quantised"),
        ({"backend": "flush"}, "unknown attention backend 'flush': choose auto, reference, sdpa, dense"),
        ({"backend": "xformers"}, "attention backend xformers does not take this call: "),
        ({"backend": "flash"}, "flash does not take this call: FlashAttention has no bias; it serves models without"),
        (
            {"backend": "flash", "table": None},
            "flash does not take this call: flash-attn is not installed|runs on cuda",
        ),
        ({"backend": "cuda"}, "attention backend cuda does not take this call: it runs on cuda, not cpu"),
        ({"backend": "triton"}, r"dtype torch.float64: float16, bfloat16 and float32 are allowed"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rpe_attention(**{**CALL, **changes})


def test_a_packed_projection_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"qkv must be \[B, L, 3, H, d\], not \(2, 16, 2, 4\)"):
        rpe_attention_packed(torch.zeros(2, 16, 2, 4), None, (3, 5))


def test_flex_says_what_it_cannot_do_on_a_cpu() -> None:
    with pytest.raises(ValueError, match="flex does not take this call: FlexAttention has no backward on a cpu"):
        rpe_attention(**{**CALL, "q": CALL["q"].clone().requires_grad_()}, backend="flex")
    with pytest.raises(ValueError, match="head size 12: powers of two are allowed"):
        rpe_attention(*torch.zeros(3, 1, 1, 16, 12), torch.zeros(1, 12, 50), (3, 5), backend="flex")


@pytest.mark.parametrize(
    ("dtype", "dim", "reason"),
    [
        (torch.bfloat16, 64, ""),
        (torch.bfloat16, 20, "head size 20: multiples of 8 are allowed in torch.bfloat16"),
        (torch.float32, 20, ""),
        (torch.float32, 6, "head size 6: multiples of 4 are allowed in torch.float32"),
        (torch.float64, 3, ""),
    ],
)
def test_the_kernel_that_is_pinned_on_a_gpu_says_which_heads_it_takes(
    dtype: torch.dtype, dim: int, reason: str
) -> None:
    assert BACKENDS["sdpa"].refuses(Problem("cuda", dtype, 2, dim, Layout((7, 7)))) == reason
    assert BACKENDS["sdpa"].refuses(Problem("cpu", dtype, 2, dim, Layout((7, 7)))) == ""


@pytest.mark.parametrize(
    ("files", "version"),
    [
        ((), 0),
        (("flash_attn/left_behind.txt",), 0),
        (("flash_attn/__init__.py", "flash_attn/flash_attn_interface.py"), 2),
        (("flash_attn/cute/__init__.py",), 4),
        (("flash_attn/__init__.py", "flash_attn/flash_attn_interface.py", "flash_attn/cute/__init__.py"), 2),
    ],
)
def test_which_flash_attention_is_installed_is_seen_without_importing_it(
    files: tuple[str, ...], version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("raise SystemExit('imported')" if file.endswith(".py") else "")
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    importlib.invalidate_caches()
    assert libraries._flash_version() == version


@pytest.mark.parametrize(
    ("installed", "changes", "reason"),
    [
        ({"XFORMERS": False}, {}, "xformers is not installed: pip install 'sar-foundation[xformers]'"),
        ({"FLASH": 4}, {}, "FlashAttention 4 stands beside xformers, which cannot be imported then; keep one"),
        ({}, {"device": "cpu"}, "it runs on cuda, not cpu"),
        ({}, {"dtype": torch.float64}, "dtype torch.float64: float16, bfloat16 and float32 are allowed"),
        ({}, {"layout": Layout((64, 65))}, "4161 tokens: a whole map is made of at most 4097"),
        ({}, {}, ""),
    ],
)
def test_xformers_says_what_it_does_not_take(
    installed: dict[str, Any], changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ({"XFORMERS": True, "FLASH": 0} | installed).items():
        monkeypatch.setattr(libraries, name, value)
    problem = Problem("cuda", torch.bfloat16, 12, 64, Layout((7, 7)), trains=True)
    assert libraries.xformers_refuses(problem._replace(**changes)).startswith(reason)
    assert bool(libraries.xformers_refuses(problem._replace(**changes))) == bool(reason)


@pytest.mark.parametrize(
    ("installed", "interpreted", "device", "reason"),
    [
        (False, False, "cuda", "triton is not installed: pip install 'sar-foundation[gpu]'"),
        (True, False, "cpu", "it runs on cuda; TRITON_INTERPRET=1 lets it run on a cpu, slowly"),
        (True, True, "cpu", ""),
        (True, False, "mps", "it runs on cuda, not mps"),
        (True, False, "cuda", ""),
    ],
)
def test_triton_says_where_it_runs(
    installed: bool, interpreted: bool, device: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "INSTALLED", installed)
    monkeypatch.setattr(fused, "INTERPRETED", interpreted)
    assert BACKENDS["triton"].refuses(WINDOW._replace(device=device)) == reason


@pytest.mark.parametrize(
    ("version", "changes", "reason"),
    [
        (0, {}, "flash-attn is not installed: pip install --no-build-isolation flash-attn, or flash-attn-4"),
        (2, {"device": "cpu"}, "it runs on cuda, not cpu"),
        (2, {"dtype": torch.float32}, "dtype torch.float32: float16 and bfloat16 are allowed"),
        (4, {"bias": "plain"}, "FlashAttention has no bias; it serves models without relative positions"),
        (4, {}, ""),
    ],
)
def test_flash_attention_says_what_it_does_not_take(
    version: int, changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "FLASH", version)
    assert libraries.flash_refuses(WINDOW._replace(bias="none")._replace(**changes)) == reason
