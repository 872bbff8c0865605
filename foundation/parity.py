"""Compare this installation with reference values of the published implementation, item by item."""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foundation.errors import DataError, ExplainedError
from foundation.evaluation.attention import attention_distances
from foundation.interchange import (
    FIXED,
    UNUSED,
    Model,
    by_channel,
    fixed_gap,
    from_published,
    is_linear,
    is_relative,
    model_of,
    rename,
)
from foundation.interchange.joint import joint_from_published, joint_name, joint_of, joint_parts
from foundation.models.heads import Decoder
from foundation.objectives.half_windows import log_ratios
from foundation.objectives.histograms import HOG, SARHOG
from foundation.objectives.masks import Masks
from foundation.objectives.reconstruction import gather_masked
from foundation.objectives.targets import FixedTarget, GaussianRatio, GradientRatio, NormalisedPixels, patchify
from foundation.training.optim import learning_rate
from kernels.gradient_ratio import gradient_ratio
from kernels.rpe_attention.buckets import num_buckets, product_buckets

RADII = (5, 9, 13, 17)
ATTENTION = ("reference", "sdpa", "dense")
"""Backends compared unless others are named: those that every CPU has."""
COPY = "take the folder again as the project has it: tests/golden"
EDGES = 1e-3
"""Share of the entries of histograms whose angle may lie on the edge of a bin."""


class Line(NamedTuple):
    """One comparison: the largest error, its tolerance, and a note (why it could not be made, or what it covers)."""

    file: str
    item: str
    error: float | None
    tolerance: float | None
    note: str = ""

    @property
    def status(self) -> str:
        """ok, FAILED, or `not covered yet` for a file that nothing here reads."""
        if self.tolerance is None:
            return "not covered yet"
        return "ok" if self.error is not None and self.error <= self.tolerance else "FAILED"


Arrays = dict[str, np.ndarray]


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _images(arrays: Arrays) -> Tensor:
    return _tensor(arrays["images"]).float() / 255


def _gap(ours: Tensor, theirs: np.ndarray) -> float:
    """Largest absolute difference; infinite when shapes differ or a value is not finite."""
    reference = _tensor(theirs).double()
    if ours.shape != reference.shape or not bool(torch.isfinite(ours).all()):
        return float("inf")
    return float((ours.detach().double() - reference).abs().max())


def _relative(ours: float, theirs: float) -> float:
    """Relative difference; infinite when a value is not finite, because no comparison with NaN finds anything."""
    error = abs(ours - theirs) / max(abs(theirs), 1e-12)
    return error if error < float("inf") else float("inf")


def _targets(arrays: Arrays, _: Path, attention: Sequence[str]) -> Iterator[tuple[str, float, float, str]]:
    for dtype, images in (("uint8", _tensor(arrays["images"])), ("float32", _images(arrays))):
        for backend in ("integral", "reference"):
            ours = gradient_ratio(images, RADII, backend=backend)
            yield f"gradient ratio, radii 5 9 13 17, {backend}, {dtype}", _gap(ours, arrays["targets"]), 3e-5, ""


def _structural(arrays: Arrays, _: Path, attention: Sequence[str]) -> Iterator[tuple[str, float, float, str]]:
    for dtype, images in (("uint8", _tensor(arrays["images"])), ("float32", _images(arrays))):
        for backend in ("integral", "reference"):
            scales = gradient_ratio(images, (3, 5, 9, 13, 17), 1e-6, "exclude", backend, blind_spot=True, sigmoid=True)
            yield f"SARATR-X v2, six scales, {backend}, {dtype}", _gap(scales, arrays["scales"]), 1e-5, ""
    fused = scales.mean(1)  # of equal weights
    yield "SARATR-X v2, fused with equal weights", _gap(fused, arrays["fused_equal_weights"]), 1e-5, ""


def _histogram_gap(ours: Tensor, theirs: np.ndarray) -> float:
    """As `_gap`, less the 0.1 % of entries that differ most: an angle on the edge of a bin may fall on either side."""
    reference = _tensor(theirs).double()
    if ours.shape != reference.shape or not bool(torch.isfinite(ours).all() and torch.isfinite(reference).all()):
        return float("inf")
    error = (ours.double() - reference).abs().flatten()
    return float(error.kthvalue(len(error) - int(len(error) * EDGES)).values)


def _hog(arrays: Arrays, _: Path, attention: Sequence[str]) -> Iterator[tuple[str, float, float, str]]:
    for name, window in (("no_gaussian_window", None), ("gaussian_window_16", 16)):
        cells = HOG(8, 9, window).maps(_images(arrays))
        for kind, ours in (("cells", cells), ("patches", patchify(cells, 2))):
            item = f"HOG, {name.replace('_', ' ')}, {kind}"
            yield item, _histogram_gap(ours, arrays[f"{name}_{kind}"]), 1e-4, "all but 0.1 %"


def _undecided(images: Tensor, radius: int, bins: int = 9, cell: int = 8) -> Tensor:
    """Whether a cell has a gradient ratio within rounding of the edge of a bin: bool [N, bins, H / cell, W / cell]."""
    across, down = log_ratios(images, radius, 0.01, "include")
    edges = (torch.arange(bins) * torch.pi / bins).view(-1, 1, 1)
    distance = (across * edges.cos() - down * edges.sin()).abs()  # of the gradient from the line along each edge
    near = ((distance < 1e-6) & (torch.hypot(across, down) > 1e-6)).any(1, keepdim=True)
    cells = near.unflatten(-1, (-1, cell)).unflatten(-3, (-1, cell)).any(-1).any(-2)
    return cells.expand(-1, bins, -1, -1)


def _variants(arrays: Arrays, _: Path, attention: Sequence[str]) -> Iterator[tuple[str, float, float, str]]:
    images = _images(arrays)
    gaussian = GaussianRatio(RADII, 0.01, "exclude").maps(images)
    yield "gradient ratio, Gaussian, centre excluded", _gap(gaussian, arrays["gaussian"]), 3e-5, ""
    theirs = arrays["sar_hog_patches"]

    def patches(maps: Tensor) -> Tensor:
        return patchify(maps, 2).unflatten(-1, (len(RADII), -1)).transpose(1, 2)

    published = SARHOG(RADII, 0.01, "include", 8, 9, exact=False).maps(images)
    yield "SAR-HOG, published sums", _histogram_gap(patches(published), theirs), 1e-4, "all but 0.1 %"
    # Exact sums find no gradient between halves that mirror each other, where rounding gives the published ones a
    # direction: cells with such a pixel have no defined histogram.
    exact = SARHOG(RADII, 0.01, "include", 8, 9)
    decided = ~patches(torch.cat([_undecided(images, radius) for radius in RADII], dim=1)).numpy()
    ours = patches(exact.maps(images))
    if ours.shape != theirs.shape:
        yield "SAR-HOG, exact sums", float("inf"), 1e-4, f"shapes differ: {tuple(ours.shape)}, {theirs.shape}"
        return
    note = f"cells without a gradient on the edge of a bin, {decided.mean():.0%} of all; all but 0.1 %"
    yield "SAR-HOG, exact sums", _histogram_gap(ours[_tensor(decided)], theirs[decided]), 1e-4, note


def _buckets(arrays: Arrays, _: Path, attention: Sequence[str]) -> Iterator[tuple[str, float, float, str]]:
    for name in sorted(arrays):
        if match := re.fullmatch(r"product_(\d+)x(\d+)", name):
            grid = int(match[1]), int(match[2])
            yield f"iRPE buckets {grid[0]}x{grid[1]}", _gap(product_buckets(grid), arrays[name]), 0.0, "exact"
    yield "number of buckets", abs(num_buckets() - int(arrays["num_buckets"])), 0.0, "exact"


def _loaded_model(arrays: Arrays, backend: str) -> Model:
    """The model that the file's tensors describe; every tensor must find its place."""
    prefix = "state/"
    state = from_published({n.removeprefix(prefix): _tensor(a) for n, a in arrays.items() if n.startswith(prefix)})
    config = json.loads(str(arrays["config"]))
    if not is_relative(state):
        model = model_of(state, backend, heads=(config["num_heads"], config["decoder_num_heads"]))
        model.load_state_dict(state)
        return model
    model = model_of(state, backend)
    found = [model.encoder.heads]
    wanted = [config["heads" if "heads" in config else "num_heads"]]
    if isinstance(model.decoder, Decoder):
        found, wanted = [*found, model.decoder.heads], [*wanted, config["dheads"]]
    if found != wanted:
        listed = ", ".join(map(str, wanted))
        what = f"tables say {tuple(found)} heads, the file's configuration {listed}"
        raise DataError(what, do=COPY)
    model.load_state_dict(state)
    return model


def _windows(arrays: Arrays) -> tuple[Masks, Tensor]:
    """Masks [N, windows, ...] and predictions [N, windows, n, out] of a file.

    Row r of the file belongs to image r mod N: window-major. Ours is [image, window, ...].
    """
    n = arrays["images"].shape[0]
    ids = _tensor(arrays["patch_ids"].astype(np.int64)).unflatten(0, (-1, n)).transpose(0, 1).contiguous()
    mask = _tensor(arrays["mask"]).unflatten(0, (-1, n)).transpose(0, 1)
    hidden = mask.nonzero()[:, 2].view(*mask.shape[:2], -1)
    return Masks(ids, hidden), _tensor(arrays["pred"]).unflatten(0, (-1, n)).transpose(0, 1)


def _step(arrays: Arrays, _: Path, attention: Sequence[str]) -> Iterator[tuple[str, float, float, str]]:
    masks, pred = _windows(arrays)
    yield from _one_step(arrays, _images(arrays), masks, pred, GradientRatio(RADII, 0.01, "include"), attention)


def _lomar(arrays: Arrays, _: Path, attention: Sequence[str]) -> Iterator[tuple[str, float, float, str]]:
    masks, pred = _windows(arrays)
    yield from _pixel_step(arrays, masks, pred, attention)


def _mae(arrays: Arrays, _: Path, attention: Sequence[str]) -> Iterator[tuple[str, float, float, str]]:
    for name in FIXED:
        yield f"fixed positions, {name}", fixed_gap(_tensor(arrays[f"state/{name}"])), 1e-6, ""
    mask = _tensor(arrays["mask"])[:, None]
    hidden = mask.nonzero()[:, 2].view(len(mask), 1, -1)
    masks = Masks(torch.arange(mask.shape[2]).expand(len(mask), 1, -1), hidden)
    yield from _pixel_step(arrays, masks, _tensor(arrays["pred"])[:, None], attention)


def _latent(arrays: Arrays, _: Path, attention: Sequence[str]) -> Iterator[tuple[str, float, float, str]]:
    parts = {part: _under(arrays, f"{part}/") for part in ("encoder", "target_encoder", "predictor")}
    for part, name in (("encoder", "pos_embed"), ("target_encoder", "pos_embed"), ("predictor", "predictor_pos_embed")):
        yield f"fixed positions, {part}", fixed_gap(parts[part][name]), 1e-6, ""
    state = joint_from_published(joint_parts(parts) or {})
    heads, n = json.loads(str(arrays["config"]))["num_heads"], arrays["images"].shape[0]
    context = _tensor(arrays["context_ids"].astype(np.int64))[0]
    targets = _tensor(arrays["target_ids"].astype(np.int64)).transpose(0, 1).contiguous()
    for backend in attention:
        model = joint_of(state, backend, heads=(heads, heads))
        model.load_state_dict(state)
        found = model(_images(arrays), context, targets)
        for name, ours in zip(("pred", "target"), found, strict=True):  # rows of the file: block outside, image inside
            theirs = arrays[name].reshape(-1, n, *arrays[name].shape[1:])
            yield f"{name}, {backend}", _gap(ours.transpose(0, 1), theirs), 1e-4, ""
        loss = F.smooth_l1_loss(*found)
        yield f"loss, {backend}", _relative(loss.item(), float(arrays["loss"])), 1e-5, "relative"
        loss.backward()
        published = {joint_name(name): norm for name, norm in json.loads(str(arrays["grad_norms"])).items()}
        yield from _norms(model, published, backend)


def _under(arrays: Arrays, prefix: str) -> dict[str, Tensor]:
    """The tensors of a file whose names begin so, without the beginning."""
    return {name.removeprefix(prefix): _tensor(array) for name, array in arrays.items() if name.startswith(prefix)}


def _pixel_step(
    arrays: Arrays, masks: Masks, pred: Tensor, attention: Sequence[str]
) -> Iterator[tuple[str, float, float, str]]:
    """A step whose target is normalised pixels; images have one channel and are repeated to the file's."""
    _, channels, patch, _ = arrays["state/patch_embed.proj.weight"].shape
    images = _images(arrays).expand(-1, channels, -1, -1)
    target = NormalisedPixels(patch, channels)
    yield from _one_step(arrays, images, masks, by_channel(pred, channels, -1), target, attention)


def _one_step(
    arrays: Arrays, images: Tensor, masks: Masks, pred: Tensor, target: FixedTarget, attention: Sequence[str]
) -> Iterator[tuple[str, float, float, str]]:
    """Prediction of all slots, loss of the masked ones and gradient norms of the model in the file."""
    linear = is_linear(name.removeprefix("state/") for name in arrays)
    for backend in attention:
        model = _loaded_model(arrays, backend)
        everything = model(images, *masks, predict_all=True)
        yield f"prediction, {backend}", _gap(everything, pred.numpy()), 1e-4, ""
        tokens = patchify(target.maps(images), model.encoder.patch)
        loss = F.mse_loss(model(images, *masks), gather_masked(tokens, masks))
        yield f"loss, {backend}", _relative(loss.item(), float(arrays["loss"])), 1e-5, "relative"
        loss.backward()
        norms = {rename(name, linear): value for name, value in json.loads(str(arrays["grad_norms"])).items()}
        yield from _norms(model, norms, backend)


def _norms(model: nn.Module, norms: dict[str, float], backend: str) -> Iterator[tuple[str, float, float, str]]:
    """Gradient norms beside published ones, under our names."""
    ours = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    if set(norms) != set(ours):
        yield f"gradient norms, {backend}", float("inf"), 1e-3, f"names differ: {sorted(set(norms) ^ set(ours))}"
        return
    errors = {name: _relative(ours[name], norm) for name, norm in norms.items()}
    worst = max(errors, key=lambda name: errors[name])
    yield f"gradient norms ({len(norms)}), {backend}", errors[worst], 1e-3, f"relative; worst {worst}"


@torch.no_grad()
def _classifier(arrays: Arrays, folder: Path, attention: Sequence[str]) -> Iterator[tuple[str, float, float, str]]:
    step = _read(folder / "sarjepa_pretrain_step.npz")
    images = _images(step)
    for backend in attention:
        encoder = _loaded_model(step, backend).encoder.eval()
        features = encoder(images)
        yield f"class-token features, {backend}", _gap(features, arrays["cls_features"]), 1e-4, ""
        logits = F.linear(features, _tensor(arrays["head_weight"]), _tensor(arrays["head_bias"]))
        yield f"classifier logits, {backend}", _gap(logits, arrays["logits"]), 1e-4, ""
    distances = attention_distances(encoder, images)
    yield "attention distance (px)", _gap(distances, arrays["mean_attention_distance"]), 1e-2, "all blocks and heads"


def _schedule(values: dict, _: Path, attention: Sequence[str]) -> Iterator[tuple[str, float, float, str]]:
    peak = values["base_lr"] * values["batch"] / 256
    per_epoch = 100_000  # any number of samples per epoch gives the same curve
    warmup, total = values["warmup_epochs"] * per_epoch, values["epochs"] * per_epoch
    ours = [learning_rate(epoch * per_epoch, total, warmup, peak) for epoch in values["epoch"]]
    error = _gap(torch.tensor(ours, dtype=torch.float64), np.array(values["lr"])) / peak
    yield f"learning rate at {len(ours)} epochs", error, 1e-6, "relative to the peak"


def _shapes(values: dict, _: Path, attention: Sequence[str]) -> Iterator[tuple[str, float, float, str]]:
    published = {name: torch.empty(shape, device="meta") for name, shape in values.items()}
    with torch.device("meta"):
        theirs = from_published(published)
        ours = model_of(theirs).state_dict()
    wrong = [n for n in sorted(set(ours) | set(theirs)) if n not in ours or n not in theirs]
    wrong += [n for n in ours if n in theirs and ours[n].shape != theirs[n].shape]
    note = f"unused upstream, not kept: {', '.join(sorted(UNUSED & set(values)))}" if not wrong else f"wrong: {wrong}"
    yield f"state dict, {len(theirs)} tensors", float(len(wrong)), 0.0, note


Check = Callable[..., Iterator[tuple[str, float, float, str]]]
CHECKS: dict[str, Check] = {
    "gradient_targets.npz": _targets,
    "structural_targets_v2.npz": _structural,
    "hog_targets.npz": _hog,
    "target_variants.npz": _variants,
    "rpe_buckets.npz": _buckets,
    "sarjepa_pretrain_step.npz": _step,
    "lomar_pretrain_step.npz": _lomar,
    "mae_pretrain_step.npz": _mae,
    "ijepa_pretrain_step.npz": _latent,
    "classifier.npz": _classifier,
    "lr_schedule.json": _schedule,
    "vit_base_state_shapes.json": _shapes,
}


def _read(path: Path) -> dict:
    if not path.is_file():
        raise DataError(f"{path.name} is missing", where=str(path.parent), do=COPY)
    try:
        if path.suffix == ".json":
            values = json.loads(path.read_text())
            if not isinstance(values, dict):
                raise ValueError(f"it holds a {type(values).__name__}, not names and values")
            return values
        with np.load(path, allow_pickle=False) as file:
            return dict(file.items())
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path.name} cannot be read: {error}", where=str(path), do=COPY) from error


def compare(folder: Path, attention: Sequence[str] = ATTENTION) -> Iterator[Line]:
    """Every comparison the files of `folder` allow; steps are made by each named attention backend.

    A file that cannot be compared is a FAILED line, never silence.

    Raises DataError when the folder holds no reference values at all.
    """
    present = sorted(p.name for p in folder.glob("*") if p.suffix in {".npz", ".json"}) if folder.is_dir() else []
    if not present:
        raise DataError("no reference values here", where=str(folder), do="name a folder with *.npz and *.json")
    for name in [n for n in CHECKS if n in present]:
        try:
            for item, error, tolerance, note in CHECKS[name](_read(folder / name), folder, attention):
                yield Line(name, item, error, tolerance, note)
        except (
            ExplainedError,
            ArithmeticError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            yield Line(name, "cannot be compared", None, 0.0, reason)
    for name in [n for n in present if n not in CHECKS]:
        yield Line(name, "unknown file", None, None)
