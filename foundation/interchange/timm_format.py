"""Exports that timm loads: our encoder under its own architecture, or a stock `vit_*` where one computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from foundation.errors import CheckpointError, ConfigError
from foundation.interchange.source import Source
from foundation.models.position import sincos
from foundation.timm_registry import PATCHES, name
from foundation.training.checkpoint import check_tensors, shapes

WEIGHTS = "model.safetensors"


def need_timm() -> Any:
    """timm, with our family in it. Raises ConfigError where it is not installed."""
    try:
        import timm
    except ImportError as error:
        raise ConfigError(f"this needs timm: {error}", do="pip install 'sar-foundation[timm]'") from error
    import foundation.timm_models  # noqa: F401  # also where timm was imported before foundation

    return timm


def architecture(source: Source) -> tuple[str, dict[str, Any]]:
    """Name of the encoder in timm and the arguments that differ from its defaults.

    Raises CheckpointError for a patch or options that no architecture of the family has.
    """
    model, encoder = source.config.model, source.encoder
    refuse_options(source, "export with --format torch or onnx")
    if model.patch not in PATCHES:
        raise CheckpointError(
            f"timm has no sar_vit of patch {model.patch}: {', '.join(map(str, PATCHES))} are registered",
            where=f"model.patch = {model.patch}",
            do="export with --format torch or onnx",
        )
    arguments: dict[str, Any] = {"in_chans": encoder.channels, "global_pool": source.pool}
    if not encoder.relative:
        arguments["positions"] = "sincos"
    if not encoder.class_tokens:
        arguments["class_token"] = False
    if registers := encoder.prefix - encoder.class_tokens:
        arguments["registers"] = registers
    return name(model.size, model.patch), arguments


def refuse_options(source: Source, do: str) -> None:
    """Raise CheckpointError for what no architecture in timm is registered with, by its keys in the configuration."""
    model = source.config.model
    plain = {"layer_scale": None, "mlp": "gelu", "qk_norm": False}
    other = {key: value for key in plain if (value := getattr(model, key)) != plain[key]}
    other |= {"positions": model.positions} if model.positions == "learned" else {}
    if other:
        keys = ", ".join(f"model.{key} = {value!r}" for key, value in other.items())
        raise CheckpointError("the architectures in timm have no such encoder", where=keys, do=do)


def timm_config(source: Source, architecture: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The `config.json` of a folder in timm's style."""
    channels, side = source.encoder.channels, source.image_size
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": source.encoder.dim,
        "global_pool": source.pool,
        "model_args": {k: v for k, v in arguments.items() if k != "global_pool"} | {"global_pool": source.pool},
        "pretrained_cfg": {
            "input_size": [channels, side, side],
            "fixed_input_size": "img_size" in arguments,
            "mean": [0.0] * channels,
            "std": [1.0] * channels,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "num_classes": 0,
            "pool_size": None,
            "first_conv": None,
            "classifier": "head",
        },
        "foundation": source.facts(),
    }


def encoder_state(source: Source) -> dict[str, Tensor]:
    """The tensors of the encoder, each with memory of its own."""
    return {n: t.detach().contiguous().clone() for n, t in source.encoder.state_dict().items()}


def timm_state(source: Source) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Architecture, arguments and tensors of our encoder for timm; the model must take every tensor."""
    chosen, arguments = architecture(source)
    return fitting(chosen, arguments, encoder_state(source), "export with --format torch or onnx")


def stock_state(source: Source) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """The same for timm's own `vit_*`: fixed positions become a table, so the image size is fixed.

    Raises CheckpointError for what such a model cannot hold: tables of relative positions, a size or patch it lacks,
    blocks of another kind.
    """
    timm, encoder, model = need_timm(), source.encoder, source.config.model
    do = "export with --format timm, and `import foundation` where it is loaded"
    refuse_options(source, "export with --format torch or onnx")
    if encoder.relative:
        what = "a stock vit of timm cannot hold tables of relative positions"
        raise CheckpointError(what, where="model.positions = 'relative'", do=do)
    chosen = f"vit_{model.size}_patch{model.patch}_224"
    if not timm.is_model(chosen):
        raise CheckpointError(f"timm has no {chosen}", where=f"model.size = {model.size!r}", do=do)
    side = source.image_size // encoder.patch
    table = sincos((side, side), encoder.dim, torch.device("cpu"), torch.float32)
    renamed = {"register_token": "reg_token"}
    state = {renamed.get(n, n.replace(".fc", ".mlp.fc")): t for n, t in encoder_state(source).items()}
    state["pos_embed"] = F.pad(table, (0, 0, encoder.prefix, 0))
    arguments: dict[str, Any] = {"in_chans": encoder.channels, "img_size": source.image_size}
    arguments |= {"num_classes": 0, "global_pool": source.pool, "fc_norm": False}
    arguments |= {} if encoder.class_tokens else {"class_token": False}
    arguments |= {"reg_tokens": registers} if (registers := encoder.prefix - encoder.class_tokens) else {}
    return fitting(chosen, arguments, state, do)


def fitting(
    chosen: str, arguments: dict[str, Any], state: dict[str, Tensor], do: str
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """The three again. Raises CheckpointError where the architecture has not exactly these tensors."""
    with torch.device("meta"):
        empty = need_timm().create_model(chosen, **arguments)
    try:
        check_tensors(shapes(state), shapes(empty.state_dict()))
    except CheckpointError as error:
        raise CheckpointError(f"timm's {chosen} has other tensors than this encoder: {error.what}", do=do) from error
    return chosen, arguments, state


@torch.no_grad()
def timm_features(
    source: Source, folder: Path, chosen: str, arguments: dict[str, Any], x: Tensor
) -> tuple[Tensor, ...]:
    """What timm gives for images `x` with the weights in `folder`: pooled features and patch tokens."""
    overlay = {"file": str(folder / WEIGHTS), "num_classes": 0, "input_size": (source.encoder.channels, *x.shape[-2:])}
    overlay["first_conv"] = None  # the channels are those of the weights
    model: Any = need_timm().create_model(chosen, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    tokens = model.eval().forward_features(x)
    return model.forward_head(tokens), tokens[:, model.num_prefix_tokens :]


def loading(chosen: str, arguments: dict[str, Any], stock: bool = False) -> str:
    """The code that loads the folder, for the card."""
    extra = "".join(f", {key}={value!r}" for key, value in arguments.items())
    first = "" if stock else "import foundation  # registers sar_vit_* with timm\n"
    return f"""{first}import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
# on the hub: timm.create_model("hf-hub:USER/NAME", pretrained=True)
# before timm 1.0.16, or with other arguments:
model = timm.create_model("{chosen}", checkpoint_path="FOLDER/{WEIGHTS}"{extra}).eval()
features = model(images)  # [B, {{dim}}]
maps = timm.create_model("local-dir:FOLDER", pretrained=True, features_only=True)(images)  # [B, {{dim}}, h, w] each"""
