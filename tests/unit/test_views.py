"""What an encoder sees: roll-out is the published product, colours and planes do not depend on chance or order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation.config import from_dict
from foundation.errors import DataError
from foundation.evaluation.embedding import components, nearest_agree, pca_colours, perplexity, tsne
from foundation.evaluation.rollout import patch_share, rollout, rollout_maps
from foundation.evaluation.views import attention_views, chip_views, known, patch_views, pick_labelled
from foundation.models.initialise import initialise
from foundation.models.vit import ViT
from shards.catalog import load


def maps(batch: int, heads: int, tokens: int, seed: int) -> torch.Tensor:
    return torch.rand(batch, heads, tokens, tokens, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def test_roll_out_of_two_layers_is_the_hand_computation() -> None:
    first = torch.tensor([[[0.5, 0.5], [0.0, 1.0]], [[1.0, 0.0], [0.5, 0.5]]])[None]  # heads: mean 3/4 1/4, 1/4 3/4
    second = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])[None]
    wanted = torch.tensor([[0.5, 0.5], [0.5, 0.5]]) @ torch.tensor([[0.875, 0.125], [0.125, 0.875]])
    assert torch.allclose(rollout([first, second])[0], wanted)
    assert torch.allclose(rollout([first])[0], torch.tensor([[0.875, 0.125], [0.125, 0.875]]))


@settings(max_examples=20, deadline=None)
@given(depth=st.integers(1, 4), tokens=st.integers(1, 6), heads=st.integers(1, 3), seed=st.integers(0, 99))
def test_rows_of_a_roll_out_sum_to_one(depth: int, tokens: int, heads: int, seed: int) -> None:
    found = rollout(maps(2, heads, tokens, seed + i) for i in range(depth))
    assert torch.allclose(found.sum(-1), torch.ones(2, tokens), atol=1e-5)


def test_a_roll_out_needs_a_block() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        rollout([])


def test_the_answer_is_the_class_token_or_else_all_patches() -> None:
    rolled = torch.tensor([[[0.5, 0.1, 0.1, 0.3], [0.2, 0.2, 0.2, 0.4], [0.0, 0.5, 0.5, 0.0], [0.0, 0.0, 0.2, 0.8]]])
    assert torch.allclose(patch_share(rolled, (1, 3), 1), torch.tensor([[[0.2, 0.2, 0.6]]]))
    assert torch.allclose(patch_share(rolled, (1, 2), 2), torch.tensor([[[0.25, 0.75]]])), "after a register"
    without = rolled[:, 1:, 1:] / rolled[:, 1:, 1:].sum(-1, keepdim=True)
    assert torch.allclose(patch_share(without, (1, 3), 0, class_token=False), without.mean(1)[:, None])


def encoder(class_token: bool = True, registers: int = 0, positions: str = "relative") -> ViT:
    model = ViT(24, 2, 3, patch=8, positions=positions, class_token=class_token, registers=registers)
    initialise(model, 0)
    return model.eval()


@pytest.mark.parametrize(("class_token", "registers"), [(True, 0), (True, 2), (False, 0), (False, 3)])
def test_roll_out_takes_any_tokens_in_front_of_the_patches(class_token: bool, registers: int) -> None:
    model = encoder(class_token, registers).train()
    found = rollout_maps(model, torch.rand(2, 1, 24, 32))
    assert found.shape == (2, 3, 4)
    assert torch.allclose(found.sum((1, 2)), torch.ones(2), atol=1e-5)
    assert model.training


def test_principal_directions_have_signs_that_order_cannot_change() -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)) * torch.tensor([5.0, 3, 2, 1, 0.5, 0.1])
    directions, share = components(x, 3)
    again, _ = components(x.flip(0), 3)
    assert torch.allclose(directions, again, atol=1e-9)
    assert torch.allclose(directions.T @ directions, torch.eye(3, dtype=torch.float64), atol=1e-9)
    assert bool((directions.gather(0, directions.abs().argmax(0, keepdim=True)) > 0).all())
    mirrored, _ = components(-x, 3)
    assert torch.allclose(directions, mirrored, atol=1e-9)
    variance = ((x - x.mean(0)).double() @ directions).var(0, correction=0)
    assert torch.allclose(share, variance / x.double().var(0, correction=0).sum(), atol=1e-6)
    assert components(x[:, :2], 3)[0].shape == (2, 3), "of two features there are two"


def test_one_colour_means_the_same_in_every_image() -> None:
    tokens = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2))
    tokens[1] = tokens[0]
    colours, share = pca_colours(tokens)
    assert colours.shape == (3, 5, 3)
    assert 0 <= float(colours.min()) < float(colours.max()) <= 1
    assert torch.equal(colours[0], colours[1])
    assert 0 < share <= 1
    shuffled, _ = pca_colours(tokens[[2, 0, 1]])
    assert torch.allclose(shuffled[[1, 2, 0]], colours, atol=1e-6)
    assert torch.equal(pca_colours(torch.ones(2, 4, 8))[0], torch.zeros(2, 4, 3)), "equal patches have one colour"


def test_a_plane_is_the_same_every_time_and_keeps_groups_together() -> None:
    generator = torch.Generator().manual_seed(3)
    y = torch.arange(3).repeat_interleave(15)
    x = torch.eye(3, 9)[y] * 10 + torch.randn(45, 9, generator=generator)
    first, second = tsne(x, seed=4), tsne(x, seed=4)
    assert torch.equal(first, second)
    assert first.shape == (45, 2)
    assert nearest_agree(first, y)[0] == 1
    share, low, high = nearest_agree(torch.tensor([[0.0], [0.1], [5.0], [5.1]]), torch.tensor([0, 0, 1, 2]))
    assert share == 0.5
    assert 0 < low < 0.5 < high < 1


def test_the_perplexity_fits_few_chips() -> None:
    assert perplexity(300) == 30
    assert perplexity(4) == 1
    assert tsne(torch.randn(5, 3)).isfinite().all()


def test_a_plane_is_refused_for_too_few_chips_or_numbers_that_are_none() -> None:
    with pytest.raises(DataError, match="at least 4 chips, not 3"):
        tsne(torch.rand(3, 2))
    with pytest.raises(DataError, match="not finite"):
        tsne(torch.full((9, 2), torch.nan))


def test_labelled_chips_come_from_the_test_split_and_from_all_its_classes(catalog: Path) -> None:
    opened = load(catalog)
    assert [source.name for source in known(opened).sources] == ["unseen"]
    images, y = pick_labelled(opened, 32, 16)
    assert images.shape == (16, 1, 32, 32)
    assert len(set(y.tolist())) == 8
    again, same = pick_labelled(opened, 32, 16)
    assert torch.equal(images, again)
    assert torch.equal(y, same)
    assert [source.name for source in known(opened.select("train")).sources] == ["known"]
    assert len(pick_labelled(opened.select("pretrain"), 32, 16)[1]) == 0


def test_views_of_an_encoder_stand_beside_the_untrained_one(catalog: Path, tmp_path: Path) -> None:
    config = from_dict(
        {"data": {"image_size": 32}, "model": {"size": "nano", "patch": 8}, "objective": {"windows": 1, "window": 4}}
    )
    both = {"pretrained": encoder(), "random-init": encoder()}
    opened, images = load(catalog), torch.rand(4, 1, 32, 32)
    found = patch_views(both, images, tmp_path) | attention_views(both, images, tmp_path)
    found |= chip_views(both, opened, config, tmp_path)
    assert list(found) == [
        "Principal components of patch features (fitted over 4 images)",
        "Attention distance",
        "Attention roll-out",
        "t-SNE of 32 chips of unseen",
    ]
    assert all(Path(path).stat().st_size > 5000 for path in found.values() if isinstance(path, Path))
    assert chip_views(both, opened.select("pretrain"), config, tmp_path) == {}
