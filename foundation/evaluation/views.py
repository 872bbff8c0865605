"""What an encoder sees in images, always beside the untrained encoder: attention, patch features, chips on a plane."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from foundation.config import Config
from foundation.evaluation.attention import attention_distances
from foundation.evaluation.embedding import FEWEST, nearest_agree, pca_colours, tsne
from foundation.evaluation.figures.attention import attention_figure, rollout_figure
from foundation.evaluation.figures.features import embedding_figure, pca_figure
from foundation.evaluation.rollout import rollout_maps
from foundation.models.vit import ViT
from shards.addressed import shuffled
from shards.augment import resize_center
from shards.catalog import Catalog
from shards.stream import Batch, Reader

CHIPS, SHOWN = 300, 8  # of a plane of chips; of pictures side by side
_TRIED = 10  # a source may hold chips without a class: so many times as many are looked at
_SIDE = 32  # of the images whose pixels stand beside features
_BATCH = 50

Figures = dict[str, bytes | Path]


def attention_views(encoders: Mapping[str, ViT], images: Tensor, folder: Path) -> Figures:
    """Attention distance over the images, fp32 [B, C, S, S], and roll-out over the first of them: caption → PNG.

    `encoders` are the one in question and the untrained one, in this order.
    """
    first, control = (attention_distances(encoder, images) for encoder in encoders.values())
    rolled = {name: rollout_maps(encoder, images[:SHOWN]) for name, encoder in encoders.items()}
    return {
        "Attention distance": attention_figure(first, folder / "attention-distance.png", control),
        "Attention roll-out": rollout_figure(images[:SHOWN], rolled, folder / "attention-rollout.png"),
    }


@torch.no_grad()
def patch_views(encoders: Mapping[str, ViT], images: Tensor, folder: Path) -> Figures:
    """The first three principal components of the patch features as colours, fitted over images fp32 [B, C, S, S]."""
    coloured = {}
    for name, encoder in encoders.items():
        rows, columns = encoder.grid(images)
        colours, share = pca_colours(encoder.forward_features(images)[:, encoder.prefix :].float())
        coloured[name] = (colours[:SHOWN].unflatten(1, (rows, columns)), share)
    caption = f"Principal components of patch features (fitted over {len(images)} images)"
    return {caption: pca_figure(images[:SHOWN], coloured, folder / "patch-features.png")}


@torch.no_grad()
def chip_views(encoders: Mapping[str, ViT], labelled: Catalog, config: Config, folder: Path) -> Figures:
    """t-SNE of chips with a class, by the features of each encoder and by pixels; empty where too few have one."""
    images, y = pick_labelled(labelled, config.data.image_size, CHIPS)
    if len(y) < FEWEST:
        return {}
    parts = images.split(_BATCH)
    features = {name: torch.cat([encoder(part).float() for part in parts]) for name, encoder in encoders.items()}
    features["pixels"] = F.adaptive_avg_pool2d(images, _SIDE).clamp_min(0).sqrt().flatten(1)
    panels = {name: (tsne(x, config.seed), nearest_agree(x, y)) for name, x in features.items()}
    caption = f"t-SNE of {len(y)} chips of {', '.join(source.name for source in known(labelled).sources)}"
    return {caption: embedding_figure(panels, y, labelled.classes, folder / "chips.png")}


def known(catalog: Catalog) -> Catalog:
    """The sources whose chips have classes: those of the test split, or else all of them."""
    sources = [source for source in catalog.sources if source.classes]
    names = [source.name for source in sources if source.split == "test"] or [source.name for source in sources]
    kept = tuple(source for source in sources if source.name in names)
    return type(catalog)(catalog.root, catalog.version, kept, catalog.classes, catalog.cache)


def pick_labelled(catalog: Catalog, size: int, count: int) -> tuple[Tensor, Tensor]:
    """At most `count` images with a class of the `known` sources, the same ones every time, drawn at random: classes
    may alternate in a fixed rhythm. fp32 [n, C, size, size], int64 [n]."""
    part = known(catalog)
    if not part.sources:
        return torch.empty(0), torch.empty(0, dtype=torch.int64)
    reader = Reader(part)
    tried = np.arange(min(len(reader), _TRIED * count))
    drawn = shuffled(0, "figures/chips", np.zeros_like(tried), tried, np.full_like(tried, len(reader))).tolist()
    labels = {i: reader.valid(i).label for i in drawn}
    ids = sorted([i for i in drawn if labels[i] >= 0][:count])
    images = [resize_center(Batch.of([reader.valid(i) for i in ids[at : at + _BATCH]]), size)
              for at in range(0, len(ids), _BATCH)]  # fmt: skip
    return torch.cat(images) if images else torch.empty(0), torch.tensor([labels[i] for i in ids], dtype=torch.int64)


def pick_images(catalog: Catalog, size: int, count: int) -> Tensor:
    """Images spread over the catalog, resized without randomness: fp32 [count, C, size, size]."""
    reader = Reader(catalog)
    ids = torch.linspace(0, len(reader) - 1, count).long()
    return resize_center(Batch.of([reader.valid(i) for i in ids.tolist()]), size)
