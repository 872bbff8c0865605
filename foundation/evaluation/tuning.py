"""Learning a classifier from labelled images or features: named recipes and the one loop that follows them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foundation.errors import NumericsError
from foundation.evaluation.features import Progress
from foundation.evaluation.layer_decay import scales
from shards.addressed import permutation, stream_key


@dataclass(frozen=True)
class Recipe:
    """How a classifier is learnt. The defaults are the published few-shot recipe, whose last step is tested.

    AdamW; a constant warm-up, then a cosine, both by epoch; epochs pass over the samples. `pool` is the feature: the
    class token («token») or the mean of the patch tokens («patches»); `batch_norm` standardises it before the linear
    layer. `layer_decay` multiplies the learning rate from layer to layer towards the pixels (below 1, biases and norms
    keep their weights). Images are augmented while they are learnt: moved by up to `shift` of their side, mirrored from
    left to right with probability `flip`, multiplied by 1 + `speckle` · a normal number per pixel.
    """

    name: str = "published"
    lr: float = 1e-3
    warmup_lr: float = 1e-5
    weight_decay: float = 5e-4
    epochs: int = 40
    warmup_epochs: int = 2
    batch: int = 50
    pool: str = "token"
    batch_norm: bool = False
    layer_decay: float = 1.0
    smoothing: float = 0.0
    shift: float = 0.0
    flip: float = 0.0
    speckle: float = 0.0

    def rate(self, epoch: int) -> float:
        """Learning rate of an epoch: constant warm-up, then a cosine of period `epochs` counted from its end."""
        if epoch < self.warmup_epochs:
            return self.warmup_lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * (epoch - self.warmup_epochs) / self.epochs))


def generator(seed: int, purpose: str) -> torch.Generator:
    """Random numbers of one purpose."""
    return torch.Generator().manual_seed(stream_key(seed, purpose) & (2**63 - 1))


def empty_linear(dim: int, classes: int) -> nn.Linear:
    """A linear layer without weights yet: the usual initialisation would draw from the global generator."""
    return nn.Linear(dim, classes, device="meta").to_empty(device="cpu")


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Groups of AdamW with the factor of their learning rate as `scale`; one group without layer decay."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if recipe.layer_decay == 1:
        return [{"params": list(trained.values()), "scale": 1.0}]
    depth = len({name.split("blocks.")[1].split(".")[0] for name in trained if "blocks." in name})
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, scale in scales(trained, depth, recipe.layer_decay).items():
        plain = trained[name].ndim <= 1
        decay = 0.0 if plain else recipe.weight_decay
        group = groups.setdefault((scale, plain), {"params": [], "scale": scale, "weight_decay": decay})
        group["params"].append(trained[name])
    return list(groups.values())


def augment(images: Tensor, recipe: Recipe, seed: int, step: int) -> Tensor:
    """The images [B, C, H, W] as the recipe shows them at a step, a pure function of (seed, step)."""
    if not (recipe.shift or recipe.flip or recipe.speckle):
        return images
    draw, count = generator(seed, f"evaluation/augment/{step}"), len(images)
    if recipe.flip:
        mirrored = torch.rand(count, generator=draw) < recipe.flip
        images = torch.where(mirrored.to(images.device)[:, None, None, None], images.flip(-1), images)
    if reach := round(recipe.shift * images.shape[-1]):
        padded = F.pad(images, (reach,) * 4, mode="reflect")
        places = torch.randint(0, 2 * reach + 1, (count, 2), generator=draw).tolist()
        height, width = images.shape[-2:]
        moved = (p[:, top : top + height, left : left + width] for p, (top, left) in zip(padded, places, strict=True))
        images = torch.stack(list(moved))
    if recipe.speckle:
        noise = torch.randn(images.shape, generator=draw).to(images.device)
        images = (images * (1 + recipe.speckle * noise)).clamp(0, 1)
    return images


def learn(
    model: nn.Module,
    fetch: Callable[[Tensor], Tensor],
    y: Tensor,
    seed: int,
    recipe: Recipe,
    progress: Progress | None = None,
) -> None:
    """Learn `model` on the inputs that `fetch` gives for indices (int64 [b] → [b, ...]) of `y` int64 [N].

    Batches are drawn by (seed, epoch), a last partial one is left. Raises NumericsError when a loss is not finite.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(
        parameter_groups(model, recipe), lr=recipe.lr, betas=(0.9, 0.999), weight_decay=recipe.weight_decay
    )
    size = min(recipe.batch, len(y))
    steps = len(y) // size
    model.train()
    for epoch in range(recipe.epochs):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(epoch) * group["scale"]
        order = permutation(seed, "evaluation/fewshot/order", torch.tensor([epoch]), len(y))[0]
        for step in range(steps):
            pick = order[step * size : (step + 1) * size]
            x = fetch(pick).to(device)
            x = augment(x, recipe, seed, epoch * steps + step) if x.ndim == 4 else x
            loss = F.cross_entropy(model(x), y[pick].to(device), label_smoothing=recipe.smoothing)
            descend(optimizer, loss, "few-shot", f"seed {seed}, epoch {epoch}")
            if progress is not None:
                progress(epoch * steps + step + 1, recipe.epochs * steps)
    model.eval()


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, what: str, where: str) -> None:
    """One update by a 0-d loss of `what`. Raises NumericsError, which says `where`, if it is not finite."""
    if not loss.isfinite():
        do = "check the encoder's weights and features; a recipe with a lower rate may help"
        raise NumericsError(f"the {what} loss is {loss.item()}", where=where, do=do)
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    optimizer.step()
