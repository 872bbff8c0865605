"""The synthetic corpus: its physics, its determinism, and that only structure tells the classes apart."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy import ndarray

from shards import synthetic
from shards.errors import DataError

SIZE = 96


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@lru_cache(maxsize=2)
def corpus(split: str, per_class: int) -> tuple[ndarray, ndarray]:
    """Pixels [N, 96, 96] and class numbers [N], in turns."""
    records = list(synthetic.generate(split, synthetic.CLASSES, per_class, SIZE, seed=0))
    labels = [synthetic.CLASSES.index(str(r.label)) for r in records]
    return np.stack([r.pixels for r in records]).astype(np.float64), np.array(labels)


def brightness(images: ndarray) -> ndarray:
    """Mean, deviation, maximum and percentiles: all that levels can say. [N, 9]."""
    flat = images.reshape(len(images), -1)
    levels = np.percentile(flat, [1, 10, 50, 90, 99, 99.5], axis=1)
    return np.column_stack([flat.mean(1), flat.std(1), flat.max(1), *levels])


def score(features: tuple[ndarray, ndarray]) -> float:
    """Test accuracy of a logistic regression."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200, tol=1e-3))
    return float(model.fit(features[0], corpus("train", 60)[1]).score(features[1], corpus("test", 40)[1]))


@pytest.mark.parametrize("looks", [1, 2, 4])
def test_homogeneous_clutter_has_as_many_equivalent_looks_as_asked_for(looks: int) -> None:
    chips = [synthetic.scene(rng(i), "clutter", SIZE, looks, shape=float("inf"))[0] ** 2 for i in range(12)]
    intensity = np.stack([c / c.mean() for c in chips])
    assert intensity.mean() ** 2 / intensity.var() == pytest.approx(looks, rel=0.1)


@pytest.mark.parametrize("shape", [1.5, 4.0, 12.0])
def test_texture_has_the_moments_of_a_gamma_distribution(shape: float) -> None:
    fields = np.stack([synthetic.texture(rng(i), SIZE, shape, 2.0) for i in range(40)])
    assert fields.mean() == pytest.approx(1, rel=0.05)
    assert fields.var() == pytest.approx(1 / shape, rel=0.12)


def test_textured_clutter_has_the_heavy_tail_of_a_k_distribution() -> None:
    def moment(shape: float) -> float:
        power = np.stack([synthetic.speckle(rng(i), SIZE, 1)[0] for i in range(30)])
        power = np.abs(power) ** 2 * np.stack([synthetic.texture(rng(99 + i), SIZE, shape, 2.0) for i in range(30)])
        return float((power**2).mean() / power.mean() ** 2)

    assert moment(float("inf")) == pytest.approx(2, rel=0.05)  # Rayleigh amplitude
    assert moment(2.0) == pytest.approx(2 * (1 + 1 / 2.0), rel=0.12)


def test_neighbouring_pixels_share_speckle_and_distant_ones_do_not() -> None:
    field = synthetic.speckle(rng(), SIZE, 20)

    def correlation(lag: int) -> float:
        return float(abs((field[..., lag:] * field[..., :-lag].conj()).mean()))

    assert correlation(1) > 0.4
    assert correlation(8) < 0.03


@pytest.mark.parametrize("kind", synthetic.CLASSES)
def test_targets_are_brighter_and_their_shadows_darker_than_the_clutter(kind: str) -> None:
    mean = np.mean([synthetic.scene(rng(i), kind, SIZE)[0] for i in range(40)], axis=0)
    edge = np.concatenate([mean[:12].ravel(), mean[-12:].ravel()]).mean()
    assert mean[30:60, 36:60].max() > 2 * edge
    assert mean[56:70, 44:52].mean() < 0.9 * edge, "the shadow falls away from the radar, along +rows"
    single = synthetic.scene(rng(3), kind, SIZE, looks=4, shape=float("inf"))[0]
    blocks = single.reshape(24, 4, 24, 4).mean((1, 3))
    assert blocks.min() < 0.4 * np.median(blocks)
    assert blocks.max() > 3 * np.median(blocks)


def test_the_far_side_of_a_target_is_hidden() -> None:
    wall = np.array([[48.0, 40.0, 20.0, 4.0, 0.0, 10.0, 0.0]])
    x = np.full(4, 48.0)
    y = np.array([30.0, 45.0, 55.0, 70.0])
    hidden = synthetic._blocked(x, y, 0.0, wall, np.pi / 4, 0.5)
    assert hidden.tolist() == [False, True, False, False], "at 45 degrees a height of 10 hides 10 pixels"
    assert not synthetic._blocked(x + 20, y, 0.0, wall, np.pi / 4, 0.5).any()


def test_brightness_does_not_tell_the_classes_apart() -> None:
    images = corpus("train", 60)[0], corpus("test", 40)[0]
    assert score((brightness(images[0]), brightness(images[1]))) < 0.30  # chance is 0.125


def test_the_background_does_not_tell_the_classes_apart() -> None:
    def corners(x: ndarray) -> ndarray:
        return brightness(np.concatenate([x[:, :16, :16], x[:, :16, -16:], x[:, -16:, :16], x[:, -16:, -16:]], axis=1))

    assert score((corners(corpus("train", 60)[0]), corners(corpus("test", 40)[0]))) < 0.2


def test_structure_tells_the_classes_apart() -> None:
    def centre(images: ndarray) -> ndarray:
        blocks = np.log1p(images[:, 16:80, 16:80].reshape(-1, 16, 4, 16, 4).mean((2, 4))).reshape(len(images), -1)
        blocks = blocks - blocks.mean(1, keepdims=True)
        return blocks / np.linalg.norm(blocks, axis=1, keepdims=True)

    (train, classes), (test, truth) = corpus("train", 60), corpus("test", 40)
    nearest = classes[(centre(test) @ centre(train).T).argmax(1)]
    assert (nearest == truth).mean() > 0.4


def test_no_two_chips_are_equal() -> None:
    images = np.concatenate([corpus("train", 60)[0], corpus("test", 40)[0]])
    assert len({image.tobytes() for image in images}) == len(images)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(-5, 2**40),
    st.sampled_from([*synthetic.CLASSES, "background", "clutter"]),
    st.integers(0, 10**6),
    st.sampled_from([(48, 8), (64, 16), (97, 8)]),
)
def test_a_chip_is_a_pure_function_of_its_address(seed: int, kind: str, index: int, form: tuple[int, int]) -> None:
    size, depth = form
    pixels, meta = synthetic.chip(seed, "train", kind, index, size, depth)
    again, same = synthetic.chip(seed, "train", kind, index, size, depth)
    assert np.array_equal(pixels, again)
    assert meta == same
    assert pixels.shape == (size, size)
    assert pixels.dtype == f"uint{depth}"
    for other in ((seed + 1, "train", kind, index), (seed, "test", kind, index), (seed, "train", kind, index + 1)):
        assert not np.array_equal(pixels, synthetic.chip(*other, size, depth)[0])


def test_eight_and_sixteen_bits_show_the_same_amplitude() -> None:
    low, high = (
        np.stack([synthetic.chip(1, "train", "tank", i, SIZE, bits)[0] for i in range(8)]) / synthetic.SCALES[bits]
        for bits in (8, 16)
    )
    assert high.max() > 1, "sixteen bits keep what eight bits saturate"
    np.testing.assert_allclose(low, np.minimum(high, 1), atol=0.003)


def test_records_take_turns_between_classes_and_may_hide_them() -> None:
    records = list(synthetic.generate("train", ["tank", "cargo"], 2, 48, seed=0))
    assert [r.label for r in records] == ["tank", "cargo"] * 2
    assert [r.key for r in records] == ["train/tank/0", "train/cargo/0", "train/tank/1", "train/cargo/1"]
    assert all(r.label is None for r in synthetic.generate("pretrain", ["tank"], 2, 48, seed=0, labelled=False))


def test_the_packed_corpus_has_three_splits_and_hides_the_classes_of_the_first(tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []
    packed = synthetic.write(
        tmp_path / "a", 32, per_class_train=3, per_class_test=2, pretrain=20, progress=lambda *a: seen.append(a)
    )
    again = synthetic.write(tmp_path / "b", 32, per_class_train=3, per_class_test=2, pretrain=20)
    assert packed.fingerprint == again.fingerprint
    assert {s.split: s.samples for s in packed.sources} == {"pretrain": 20, "train": 24, "test": 16}
    assert seen[-1] == ("synthetic-test", 16)
    assert packed.classes == tuple(sorted(synthetic.CLASSES))
    assert not packed.select("pretrain").sources[0].classes
    packed.verify()
    assert [s.name for s in synthetic.write(tmp_path / "c", 32, 1, 0, 0).sources] == ["synthetic-train"]


def test_an_unknown_class_is_refused() -> None:
    with pytest.raises(DataError, match="no synthetic class «tonk»") as error:
        synthetic.scene(rng(), "tonk")
    assert "tank, truck" in str(error.value)
