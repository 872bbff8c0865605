"""The contact sheet shows every source with its chips as a model is given them, and labels where they belong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.catalog import Amplitude, Catalog
from shards.inspect import contact_sheet, source_sheet, summary, thumbnail, values
from shards.pack import SourceSpec, pack
from shards.reader import Reader, Sample
from shards.schema import Record


def catalog(out: Path, *sizes: tuple[int, int], label: str | None = "tank") -> Catalog:
    """One white chip of each size."""
    rng = np.random.default_rng(0)
    records = [Record(rng.integers(250, 256, size).astype(np.uint8), f"{i}", label) for i, size in enumerate(sizes)]
    return pack(out, [SourceSpec("white", split="train", records=records)])


def sample(pixels: np.ndarray, scale: float, decibels: float = 0.0) -> Sample:
    return Sample(pixels[None], scale, decibels, -1, "key", "source")


@pytest.mark.parametrize("size", [(13, 13), (54, 54), (60, 20), (112, 112), (128, 128), (800, 300)])
def test_a_label_stands_right_below_its_chip(tmp_path: Path, size: tuple[int, int]) -> None:
    packed = catalog(tmp_path, size)
    sheet = np.asarray(source_sheet(Reader(packed), packed.sources[0], 0))
    chip = np.flatnonzero((sheet > 240).any(1))
    label = np.flatnonzero((sheet > 120).any(1) & ~(sheet > 240).any(1))
    assert 0 <= label.min() - chip.max() <= 5
    columns = np.flatnonzero((sheet > 240).any(0))
    text = np.flatnonzero((sheet[chip.max() + 1 :] > 120).any(0))
    assert abs((columns.min() + columns.max()) - (text.min() + text.max())) <= 6  # their middles, doubled


def test_chips_of_a_row_stand_on_one_line(tmp_path: Path) -> None:
    packed = catalog(tmp_path, (16, 100), (100, 100), (100, 16))
    sheet = np.asarray(source_sheet(Reader(packed), packed.sources[0], 0, columns=3))
    bottoms = {int(np.flatnonzero(cell.max(1) > 240).max()) for cell in np.split(sheet[:, 4:352], 3, axis=1)}
    assert len(bottoms) == 1


def test_small_chips_grow_by_whole_factors_and_large_ones_shrink() -> None:
    pixels = np.arange(13 * 9, dtype=np.uint8).reshape(13, 9)
    grown = np.asarray(thumbnail(sample(pixels, 255.0), 112))
    assert grown.shape == (13 * 8, 9 * 8)
    assert (grown == grown[::8, ::8].repeat(8, 0).repeat(8, 1)).all()
    assert thumbnail(sample(np.ones((300, 150), np.uint8), 255.0), 112).size == (56, 112)


def test_values_follow_the_amplitude_rule_of_the_source() -> None:
    pixels = np.array([[0, 1, 10, 100, 1000]], np.uint16)
    np.testing.assert_allclose(values(sample(pixels, 100.0)), [[0, 0.01, 0.1, 1, 1]], rtol=1e-6)
    np.testing.assert_allclose(values(sample(pixels, 100.0, 40.0)), [[0, 0, 0.5, 1, 1]], atol=1e-6)


def test_a_picture_in_decibels_is_not_brightened_again() -> None:
    pixels = np.full((112, 112), 10, np.uint16)
    assert np.asarray(thumbnail(sample(pixels, 100.0, 40.0), 112)).mean() == pytest.approx(128, abs=1)
    assert np.asarray(thumbnail(sample(pixels, 100.0), 112)).mean() == pytest.approx(255 * 0.1**0.5, abs=1)


def test_a_sheet_has_a_band_for_every_source(tmp_path: Path) -> None:
    first = catalog(tmp_path / "c", *[(20, 20)] * 20)
    one = Image.open(contact_sheet(first, tmp_path / "new" / "one.png"))
    records = [Record(np.full((30, 40), 7, np.uint16) + np.eye(30, 40, dtype=np.uint16), "x")]
    both = pack(tmp_path / "c", [SourceSpec("zwei", records=records)])
    both = both.with_amplitudes({"zwei": Amplitude("by hand", 50.0, 30.0)})
    two = Image.open(contact_sheet(both, tmp_path / "two.png"))
    assert two.width == one.width
    assert two.height > one.height
    assert two.crop((0, 0, one.width, one.height)).tobytes() == one.tobytes()
    assert [(row["source"], row["samples"], row["dtype"], row["size"]) for row in summary(both)] == [
        ("white", 20, "uint8", "20x20"),
        ("zwei", 1, "uint16", "30x40"),
    ]
