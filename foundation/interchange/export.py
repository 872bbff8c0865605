"""Encoders out: a folder that timm, plain PyTorch, onnxruntime or the Hugging Face hub reads, checked after writing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from foundation.errors import CheckpointError, ConfigError, StorageError
from foundation.files import check_new, write_whole
from foundation.interchange import onnx_format, timm_format
from foundation.interchange.card import card
from foundation.interchange.saratrx import FORMAT
from foundation.interchange.source import Source, features, gap, images, open_source, pooled, rebuilt
from foundation.interchange.timm_format import WEIGHTS
from foundation.models.hivit import HiViT, Shape
from foundation.training.checkpoint import check_tensors, shapes

TOLERANCE = 1e-4
"""Largest difference of a feature that an export may have."""
CONFIG = "config.json"

TORCH = """from foundation import load_export  # the class of the encoder is in sar-foundation; no trainer runs

encoder, facts = load_export("FOLDER")  # config.json says how it is built, model.safetensors holds its tensors
encoder.eval()

with torch.no_grad():
    tokens = encoder.forward_features(images)  # fp32 [B, C, H, W] → [B, prefix + N, dim]
class_token = tokens[:, 0]
patch_tokens = tokens[:, encoder.prefix :]
features = class_token if facts["pool"] == "token" else patch_tokens.mean(1)"""


class Exported(NamedTuple):
    """Where an export lies, and the largest difference of its features from those of the run."""

    path: Path
    gap: float


def export(
    run: Path, out: Path, form: str, *, averaged: bool = False, best: bool = False, pool: str | None = None
) -> Exported:
    """Write the encoder of a run in a format, load it again and compare: nothing remains where it differs by 1e-4.

    Raises ConfigError for an unknown format or a missing package, CheckpointError for an encoder that the format cannot
    represent or gives back otherwise, StorageError for a folder that is not empty.
    """
    if form not in FORMATS:
        raise ConfigError(f"unknown format {form!r}", do=f"choose {', '.join(FORMATS)}")
    out = Path(os.path.abspath(out))  # «.» has no name
    check_new(out, "an export")
    source = open_source(run, averaged, best, pool)
    draft = out.with_name(f".{out.name}.tmp")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        worst = FORMATS[form].write(source, draft)
        if not worst < TOLERANCE:
            what = f"features of the export differ by {worst:.1e}, allowed is {TOLERANCE:.0e}; nothing was written"
            raise CheckpointError(what, where=f"--format {form}", do="report this with the configuration of the run")
        if not out.exists():
            draft.rename(out)
        else:  # it stays: it may be the folder somebody works in
            for file in draft.iterdir():
                file.rename(out / file.name)
    except OSError as error:
        what = f"the export cannot be written: {error.strerror or error}"
        raise StorageError(what, where=str(out), do="free space or correct the permissions") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Exported(out, worst)


def load_export(folder: Path | str) -> tuple[Any, dict[str, Any]]:
    """The encoder of an exported folder (torch, huggingface, timm) in evaluation mode, and the facts of its weights.

    A `ViT` and `Source.facts`, or what `foundation import` made of SARATR-X: a `HiViT`. Raises CheckpointError for a
    folder that is none of these.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    where, do = str(folder), "name a folder that `foundation export` wrote as torch, huggingface or timm"
    try:
        config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
        facts: dict[str, Any] = config["foundation"]
        weights = load_file(Path(folder) / WEIGHTS)
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"this is no exported encoder: {type(error).__name__} {error}", where=where, do=do
        ) from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise CheckpointError(f"this is no export of the format «{FORMAT}»", where=where, do=do)
    try:
        encoder: Any = HiViT(Shape(**facts["hivit"])).eval() if "hivit" in facts else rebuilt(facts["parts"], where)
    except (LookupError, TypeError, ValueError) as error:
        what = f"nothing here says how the encoder is built: {type(error).__name__} {error}"
        raise CheckpointError(what, where=where, do=do) from error
    check_tensors(shapes(weights), shapes(encoder.state_dict()), where=where)
    encoder.load_state_dict(weights)
    return encoder, facts


def _save(folder: Path, state: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    save_file(state, folder / WEIGHTS, {"format": "pt"})
    write_whole(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors writes for the owner alone


def _again(source: Source, folder: Path) -> float:
    """The difference after `load_export`."""
    encoder, _ = load_export(folder)
    x = images(source, 2)
    with torch.no_grad():
        return gap(features(source, x), pooled(encoder, encoder.forward_features(x), source.pool))


def _with_timm(source: Source, folder: Path, chosen: str, arguments: dict[str, Any]) -> float:
    """The difference after timm has loaded the folder."""
    x = images(source, 2)
    return gap(features(source, x), timm_format.timm_features(source, folder, chosen, arguments, x))


def _title(source: Source) -> str:
    model = source.config.model
    return f"{source.config.name}: SAR ViT {model.size}/{model.patch}"


def write_torch(source: Source, folder: Path) -> float:
    """Tensors of the encoder, what builds it, and a card."""
    _save(folder, timm_format.encoder_state(source), {"foundation": source.facts()})
    write_whole(folder / "README.md", card(source, _title(source), "import torch\n" + TORCH))
    return _again(source, folder)


def write_timm(source: Source, folder: Path, stock: bool = False) -> float:
    """A folder in timm's style, under our architecture or a stock one."""
    chosen, arguments, state = (timm_format.stock_state if stock else timm_format.timm_state)(source)
    config = timm_format.timm_config(source, chosen, arguments)
    if stock:
        del config["foundation"]["parts"]  # the tensors have other names
        config["foundation"]["format"] = "timm"
    _save(folder, state, config)
    code = timm_format.loading(chosen, arguments, stock).replace("{dim}", str(source.encoder.dim))
    write_whole(folder / "README.md", card(source, _title(source), code))
    return _with_timm(source, folder, chosen, arguments)


def write_stock(source: Source, folder: Path) -> float:
    """A folder that timm reads without this package."""
    return write_timm(source, folder, stock=True)


def write_huggingface(source: Source, folder: Path) -> float:
    """A page of the hub that timm and `load_export` both read; nothing is uploaded."""
    chosen, arguments, state = timm_format.timm_state(source)
    _save(folder, state, timm_format.timm_config(source, chosen, arguments))
    front = {
        "library_name": "timm",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["sar", "synthetic-aperture-radar", "self-supervised", source.config.objective.name],
    }
    code = timm_format.loading(chosen, arguments).replace("{dim}", str(source.encoder.dim))
    text = f"{code}\n\n# without timm\nimport torch\n{TORCH}"
    write_whole(folder / "README.md", card(source, _title(source), text, front))
    return max(_again(source, folder), _with_timm(source, folder, chosen, arguments))


def write_onnx(source: Source, folder: Path) -> float:
    """A graph with any batch; compared with batches of one and three."""
    onnx_format.write_onnx(source, folder, images(source, 2))
    config = {"foundation": source.facts() | {"opset": onnx_format.OPSET}}
    write_whole(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    write_whole(folder / "README.md", card(source, _title(source), onnx_format.LOADING))
    batches = (images(source, 1), images(source, 3, first=1))
    return max(gap(features(source, x), onnx_format.onnx_features(folder, x)) for x in batches)


class Format(NamedTuple):
    """A way to write an encoder; `write` returns the difference after loading it again."""

    write: Callable[[Source, Path], float]
    description: str


FORMATS = {
    "timm": Format(write_timm, "a folder for timm.create_model, architecture sar_vit_*"),
    "timm-stock": Format(write_stock, "a folder for timm alone, architecture vit_*; fixed positions only"),
    "torch": Format(write_torch, "tensors and what builds the encoder, for foundation.load_export"),
    "onnx": Format(write_onnx, "a graph for onnxruntime: features and patch tokens, any batch"),
    "huggingface": Format(
        write_huggingface, "a folder for the Hugging Face hub, read by timm and foundation.load_export"
    ),
}
