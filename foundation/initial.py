"""Where an encoder's weights come from at the start of a run (`model.init`), by names of tensors.

A run or checkpoint of this trainer, of which the part that is judged is taken; a published file (SAR-JEPA, LoMaR, MAE,
I-JEPA); a state dict of a timm ViT in a file; or `timm:NAME`. Tensors stay where they are until a process writes its
part of a parameter: files are mapped, checkpoints read one tensor at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from foundation.config import Config, from_dict
from foundation.errors import CheckpointError
from foundation.interchange.published import read_file, rename
from foundation.models.families import FAMILY
from foundation.models.initialise import Given
from foundation.models.position import resized, sincos
from foundation.objectives.reconstruction import build_encoder
from foundation.objectives.registry import build
from foundation.training import checkpoint
from foundation.training.ranks import ALONE, Ranks

TIMM = "timm:"
PATCHES = "patch_embed.proj.weight"
POSITIONS = "pos_embed.embedding"
TOKENS = "cls_token", "register_token"
_FILE = "name a run folder, a checkpoint, a .pth or .safetensors file with a state dict, or timm:NAME"
# What is no part of an encoder: heads of classifiers, decoders and predictors of published models.
_HEADS = re.compile(
    r"(head|head_dist|fc_norm|attn_pool|encoder_pred|decoder\w*|predictor)\.|mask_token$|decoder_pos_emb"
)


class Initial(NamedTuple):
    """Values of parameters by their names in the model, and lines for the log."""

    values: dict[str, Given]
    notes: list[str]


NOTHING = Initial({}, [])


def initial_weights(config: Config, ranks: Ranks = ALONE) -> Initial:
    """The encoder of `model.init`, fitted to the configured one. Parameters it does not name are drawn as always.

    Raises CheckpointError when there is nothing to read, or weights of another model; it names the keys to set.
    """
    where = str(config.model.init)
    found = encoder_names(read(where, ranks), where)
    with torch.device("meta"):
        expected = checkpoint.shapes(dict(build_encoder(config).named_parameters()))
    refuse_others(found, config, where)
    weights, changes = fit(found, config, where)
    wrong = [
        f"{n} {list(weights[n].shape)}, not {list(expected[n])}" for n in expected if _differs(n, weights, expected)
    ]
    if wrong:
        what = f"{len(wrong)} of these tensors have another shape: {', '.join(wrong[:3])}"
        raise CheckpointError(what, where=where, do="choose weights of the configured model, or configure theirs")
    if unknown := [name for name in weights if name not in expected and name not in TOKENS]:
        what = f"this encoder has no place for {len(unknown)} of these tensors: {', '.join(unknown[:3])}"
        raise CheckpointError(what, where=where, do="choose weights of a plain ViT")
    taken = {f"encoder.{name}": weights[name] for name in expected if name in weights}
    new = dict.fromkeys(re.sub(r"^blocks\.\d+", "blocks.*", name) for name in expected if name not in weights)
    changes += [f"left out: {name}" for name in weights if name not in expected]
    changes += [f"new: {', '.join(new)}"] if new else []
    return Initial(taken, ["; ".join([f"initial weights: {len(taken)} tensors from {where}", *changes])])


def _differs(name: str, weights: Mapping[str, Given], expected: Mapping[str, torch.Size]) -> bool:
    return name in weights and weights[name].shape != expected[name]


def read(where: str, ranks: Ranks = ALONE) -> dict[str, Given]:
    """The tensors that `model.init` names, under their own names; of a run, those of the part that is judged.

    Raises CheckpointError.
    """
    if where.startswith(TIMM):
        return _lent(from_timm(where.removeprefix(TIMM)))
    path = Path(where).expanduser()
    if "://" in where or path.is_dir():
        state, found = checkpoint.lend(where if "://" in where else path, "model.", ranks)
        judged = f"{build(from_dict(state['config'])).evaluated}."
        return {n.removeprefix(judged): given for n, given in found.items() if n.startswith(judged)}
    if not path.is_file():
        raise CheckpointError("there is no such file or folder", where=f"model.init = {where}", do=_FILE)
    return from_safetensors(path) if path.suffix == ".safetensors" else _lent(state_dict(read_file(path), where))


def _lent(state: Mapping[str, Tensor]) -> dict[str, Given]:
    return {name: Given(tensor.shape, partial(_same, tensor)) for name, tensor in state.items()}


def _same(tensor: Tensor) -> Tensor:
    return tensor


def from_safetensors(path: Path) -> dict[str, Given]:
    """The tensors of a file, each read when it is needed."""
    from safetensors import SafetensorError, safe_open

    try:
        file: Any = safe_open(path, "pt")
        return {n: Given(torch.Size(file.get_slice(n).get_shape()), partial(file.get_tensor, n)) for n in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read this file: {error}", where=str(path), do=_FILE) from error


def state_dict(loaded: Any, where: str) -> dict[str, Tensor]:
    """The state dict in a file, whatever surrounds it: of I-JEPA, which holds three, that of the target encoder."""
    for key in ("model", "state_dict", "target_encoder"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in loaded.items()):
        raise CheckpointError("no state dict found", where=where, do=_FILE)
    return {name.removeprefix("module."): tensor for name, tensor in loaded.items()}


def from_timm(name: str) -> dict[str, Tensor]:
    """The pretrained weights of a timm model. They are held whole by every process. Raises CheckpointError."""
    do = "see timm.list_models(pretrained=True); without a network, name a file of weights"
    try:
        import timm
    except ImportError as error:
        what, install = "timm is not installed", "pip install 'sar-foundation[timm]', or name a file of weights"
        raise CheckpointError(what, where=f"model.init = {TIMM}{name}", do=install) from error
    if not timm.is_model(name):
        raise CheckpointError("timm has no such model", where=f"model.init = {TIMM}{name}", do=do)
    try:
        return dict(timm.create_model(name, pretrained=True, num_classes=0).state_dict())
    except Exception as error:  # of whichever library downloads
        what = f"timm could not load these weights: {type(error).__name__} {error}"
        raise CheckpointError(what, where=f"model.init = {TIMM}{name}", do=do) from error


def encoder_names(found: Mapping[str, Given], where: str) -> dict[str, Given]:
    """Tensors of the encoder by our names, positions as `pos_embed`. Raises CheckpointError for what is no ViT."""
    ours = {}
    for name, given in found.items():
        known = rename(name).removeprefix("encoder.").replace("reg_token", "register_token")
        if not _HEADS.match(known):
            ours["pos_embed" if known == POSITIONS else known] = given
    needed = {PATCHES: 4, "blocks.0.attn.qkv.weight": 2, "blocks.0.fc1.weight": 2, "blocks.0.fc2.weight": 2}
    for name, dimensions in needed.items():
        if name not in ours or len(ours[name].shape) != dimensions:
            names = ", ".join(list(found)[:3]) or "no tensor"
            what = f"this is no ViT: {name} of {dimensions} dimensions is missing; it holds {names} ..."
            raise CheckpointError(what, where=where, do=_FILE)
    return ours


def is_relative(found: Mapping[str, Given]) -> bool:
    """Whether blocks have tables of relative positions; positions in front of them were then never added."""
    return any(name.endswith(".attn.rpe.table") for name in found)


def refuse_others(found: Mapping[str, Given], config: Config, where: str) -> None:
    """Raise CheckpointError for weights of another model, with the keys that make it theirs."""
    model = config.model
    dim, _, *patch = found[PATCHES].shape
    row, depth = FAMILY[model.size], len({name.split(".")[1] for name in found if name.startswith("blocks.")})
    outer, inner = found["blocks.0.fc1.weight"].shape[0], found["blocks.0.fc2.weight"].shape[1]
    size = next((name for name, row in FAMILY.items() if (row.dim, row.depth) == (dim, depth)), None)
    mlp, registers = "swiglu" if outer == 2 * inner else "gelu", found.get("register_token")
    tokens = registers.shape[1] if registers else 0
    wrong = {  # what they are, what the model is: the key
        f"model.size={size}": (f"width {dim}, {depth} blocks", f"width {row.dim}, {row.depth} blocks"),
        f"model.patch={patch[0]}": (f"patches {patch[0]}x{patch[1]}", f"patches {model.patch}x{model.patch}"),
        f"model.mlp={mlp}": (f"MLP {mlp}", f"MLP {model.mlp}"),
    }
    if "blocks.0.ls1.gamma" in found and model.layer_scale is None:
        wrong["model.layer_scale=1e-5"] = "layer scales", "no layer scales"
    if "blocks.0.attn.q_norm.weight" in found and not model.qk_norm:
        wrong["model.qk_norm=true"] = "norms of queries and keys", "none"
    if is_relative(found) and model.positions != "relative":
        wrong["model.positions=relative"] = "tables of relative positions", f"positions {model.positions}"
    elif model.positions == "sincos" and "pos_embed" in found and not is_fixed(found, where):
        wrong["model.positions=learned"] = "learnt positions", "positions sincos"
    if tokens and tokens != model.registers:
        wrong[f"model.registers={tokens}"] = f"{tokens} registers", f"{model.registers}"
    differing = {key: f"{theirs}, not {ours}" for key, (theirs, ours) in wrong.items() if theirs != ours}
    if differing:
        do = f"set {' '.join(differing)}"
        if size is None:
            do = "choose other weights: no size of the family has this width and so many blocks"
        for kind in {"relative", "learned"} - {*build(config).encodings}:
            if f"model.positions={kind}" in differing:
                do = f"choose other weights: {kind} positions do not go with objective.name={config.objective.name}"
        what = f"these are weights of another model: {'; '.join(differing.values())}"
        raise CheckpointError(what, where=where, do=do)


def fit(found: Mapping[str, Given], config: Config, where: str) -> tuple[dict[str, Given], list[str]]:
    """Weights for the configured channels and grid, and what was changed.

    A position of the class token or of registers becomes part of the token itself.
    """
    weights, model, changes = dict(found), config.model, list[str]()
    kernel, table = weights[PATCHES], weights.pop("pos_embed", None)
    dim, channels, *patch = kernel.shape
    if channels != model.channels:
        shape = torch.Size((dim, model.channels, *patch))
        weights[PATCHES] = Given(shape, lambda: spread(kernel.read(), model.channels))
        changes.append(f"{channels} channels summed" + f" and spread over {model.channels}" * (model.channels > 1))
    if model.input_gain != 1:
        changes.append(f"model.input_gain={model.input_gain:g} has no effect on given weights")
    if table is None or is_relative(found):
        return weights, changes
    prefix, side = layout(found, where)
    wanted, at = config.data.image_size // model.patch, 0
    for name in TOKENS:
        if name in weights and at < prefix:
            token, first, at = weights[name], at, at + weights[name].shape[1]
            weights[name] = Given(token.shape, partial(_joined, token, table, first, at))
    if model.positions == "learned":
        grids = (side, side), (wanted, wanted)
        weights[POSITIONS] = Given(
            torch.Size((1, wanted**2, dim)), lambda: resized(table.read().float()[:, prefix:], *grids)
        )
        changes += [f"positions resized from {side}x{side} to {wanted}x{wanted}"] if side != wanted else []
    elif model.positions == "relative":
        changes.append("left out: positions of the patches")
    return weights, changes


def _joined(token: Given, table: Given, first: int, last: int) -> Tensor:
    return token.read().float() + table.read().float()[:, first:last]


def spread(weight: Tensor, channels: int) -> Tensor:
    """Patch weights [dim, c, p, p] for another number of channels: their sum over c, in equal parts.

    So an image that is repeated in all channels has the same tokens: 3 to 1 is the sum, 1 to n an n-th each.
    """
    return weight.float().sum(1, keepdim=True).expand(-1, channels, -1, -1) / channels


def layout(found: Mapping[str, Given], where: str) -> tuple[int, int]:
    """Positions in front of the patches, and the side of the square grid of these. Raises CheckpointError."""
    table, front = found["pos_embed"], [found[name].shape[1] for name in TOKENS if name in found]
    length = table.shape[1] if len(table.shape) == 3 else 0
    for prefix in dict.fromkeys((0, *front[:1], sum(front))):
        side = math.isqrt(max(0, length - prefix))
        if side and side**2 == length - prefix:
            return prefix, side
    what = f"pos_embed {list(table.shape)} are no positions of a square grid"
    raise CheckpointError(what, where=where, do="choose weights of square images")


def is_fixed(found: Mapping[str, Given], where: str) -> bool:
    """Whether positions are the fixed sines and cosines of MAE and I-JEPA, which are computed here."""
    table, (prefix, side) = found["pos_embed"], layout(found, where)
    if table.shape[2] % 4:
        return False
    fixed = F.pad(sincos((side, side), table.shape[2], torch.device("cpu"), torch.float32), (0, 0, prefix, 0))
    return bool((table.read().float() - fixed).abs().max() <= 1e-4)
