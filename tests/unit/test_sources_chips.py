"""OpenSARShip and ATRNet-STAR: classes, parts and columns from names and annotations."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from source_samples import image, listed, take, to_tar

from shards.errors import DataError
from shards.pack import REJECTED, SourceSpec, pack
from shards.sources import corpus
from shards.sources.base import check_counts

# OpenSARShip

GRD = "S1A_IW_GRDH_1SDV_20150823T221233_20150823T221258_007396_00A2CA_54D0"
SLC = "S1A_IW_SLC__1SSV_20150217T204257_20150217T204324_004668_005C34_2DC9"


def ship_tiff(path: Path, bands: int) -> np.ndarray:
    rasterio = pytest.importorskip("rasterio")
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(bands).uniform(1, 900, (bands, 20, 30)).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(path, "w", "GTiff", 30, 20, bands, dtype="float32") as file:
            file.write(pixels)
    return pixels


@pytest.fixture
def ships(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    root = tmp_path / "ships"
    grd = ship_tiff(root / GRD / "Patch/Cargo_x10661_y11170.tif", 2)
    slc = ship_tiff(root / SLC / "Patch/Tanker_x5_y6.tif", 2)
    image(root / GRD / "Patch_Uint8/Visual_Cargo_x10661_y11170_vv.tif")
    (root / GRD / "Ship.xml").write_text(
        "<ShipList><ship><SARShipInformation><Center_x>10661</Center_x><Center_y>11170</Center_y>"
        "<Incidence_angle>37.68</Incidence_angle></SARShipInformation><AISShipInformation><MMSI>123</MMSI>"
        "<Length>179</Length><Width>0</Width></AISShipInformation></ship></ShipList>"
    )
    (root / SLC / "Ship.xml").write_text("<ShipList/>")
    return root, grd, slc


def test_opensarship_grd_keeps_both_channels_and_what_ais_says(ships: tuple[Path, np.ndarray, np.ndarray]) -> None:
    root, grd, _ = ships
    for place in (root, to_tar(root), root / GRD):
        (record,), rejected = take("opensarship", place)
        assert not rejected
        assert (record.pixels == grd).all()
        assert record.label == "Cargo"
        assert {k: v for k, v in record.meta.items() if k != "file"} == {
            "sensor": "Sentinel-1",
            "platform": "Sentinel-1A",
            "band": "C",
            "product": "GRD",
            "polarisation": "VH+VV",
            "scene": GRD,
            "x": 10661,
            "y": 11170,
            "look_angle": 37.68,
            "length": 179.0,
        }
    (record,), _ = take("opensarship", root, extra={"polarisation": "VV"})
    assert (record.pixels == grd[1]).all()
    assert record.meta["polarisation"] == "VV"


def test_opensarship_slc_becomes_complex(ships: tuple[Path, np.ndarray, np.ndarray]) -> None:
    root, _, slc = ships
    (record,), rejected = take("opensarship", root, extra={"product": "SLC"})
    assert not rejected
    assert record.pixels.dtype == np.complex64
    assert (record.pixels == slc[0] + 1j * slc[1]).all()
    assert (record.label, record.meta["polarisation"], record.meta["scene"]) == ("Tanker", "VV", SLC)


def test_what_does_not_fit_opensarship_is_rejected_with_its_reason(ships: tuple[Path, np.ndarray, np.ndarray]) -> None:
    root, _, _ = ships
    patch = root / GRD / "Patch"
    ship_tiff(patch / "Cargo_x1_y1.tif", 4)
    (patch / "Cargo_x2_y2.tif").write_bytes((patch / "Cargo_x1_y1.tif").read_bytes()[:900])
    ship_tiff(patch / "unnamed.tif", 2)
    ship_tiff(root / "folder/Patch/Cargo_x1_y1.tif", 2)
    bare = GRD.replace("54D0", "AAAA")
    ship_tiff(root / bare / "Patch/Cargo_x1_y1.tif", 2)
    records, rejected = take("opensarship", root)
    assert len(records) == 1
    reasons = {r.key: r.reason for r in rejected}
    assert reasons[f"{GRD}/Patch/Cargo_x1_y1.tif"].startswith("4 bands of float32 are not 2 channels")
    assert reasons[f"{GRD}/Patch/Cargo_x2_y2.tif"].startswith("truncated or damaged: RasterioIOError")
    assert reasons[f"{GRD}/Patch/unnamed.tif"] == "its name does not fit CLASS_xX_yY.tif"
    assert reasons["folder/Patch/Cargo_x1_y1.tif"] == "its name does not fit the folder of a Sentinel-1 product"
    name = f"{bare}/Patch/Cargo_x1_y1.tif"
    assert reasons[name] == f"{name} has no {bare}/Ship.xml"
    assert len(reasons) == 5
    for extra in ({"product": "RAW"}, {"polarisation": "LL"}):
        with pytest.raises(DataError, match="is unknown"):
            take("opensarship", root, extra=extra)


# ATRNet-STAR


@pytest.fixture
def star(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    root = tmp_path / "SOC_40classes"
    slant = (np.arange(1, 65).reshape(8, 8) * (1 + 2j)).astype(np.complex64)
    for part, number in (("train", 1), ("test", 2)):
        stem = root / f"{part}/Buick_Excelle_GT/KU_HH_15_30_{number}"
        tif = image(stem.with_suffix(".tif"), number)
        stem.with_suffix(".xml").write_text(
            "<annotation><scene><scene_name>sandstone</scene_name></scene><sensor><range_resolution>0.15m"
            "</range_resolution><cross_range_resolution>0.12m</cross_range_resolution></sensor></annotation>"
        )
        savemat = pytest.importorskip("scipy.io").savemat
        file = io.BytesIO()
        savemat(file, {"image": slant})
        stem.with_suffix(".mat").write_bytes(file.getvalue())
    return root, tif, slant


def test_atrnet_star_takes_class_part_and_angles_from_its_paths(star: tuple[Path, np.ndarray, np.ndarray]) -> None:
    root, tif, slant = star
    for place in (root, to_tar(root), root.parent):
        items, _ = listed("atrnet-star", place, exclude=("*.tar",))
        assert [item.part for item in items] == ["test", "train"]
        records, rejected = take("atrnet-star", place)
        assert not rejected
        assert (records[0].pixels == tif).all()
        assert {k: v for k, v in records[0].meta.items() if k != "file"} == {
            "sensor": "airborne SAR",
            "platform": "unmanned aircraft",
            "band": "Ku",
            "polarisation": "HH",
            "depression": 15.0,
            "azimuth": 30.0,
            "product": "chip",
            "calibration": "8 bit, nonlinearly quantised by the publisher",
            "background": "sandstone",
            "resolution": 0.15,
        }
        assert records[0].label == "Buick_Excelle_GT"
    records, rejected = take("atrnet-star", root, extra={"range": "slant"})
    assert not rejected
    assert records[0].pixels.dtype == np.complex64
    assert (records[0].pixels == slant).all()
    assert records[0].meta["product"] == "SLC"


@pytest.mark.parametrize(
    ("source", "folder", "part"),
    [
        ("training", "test", "test"),
        ("train", "SOC/test_v2", "test"),
        ("training", "test/train", "train"),
        ("test", ".", "test"),
        ("testing", ".", None),
    ],
)
def test_the_innermost_folder_says_the_part_of_an_atrnet_star_chip(
    tmp_path: Path, source: str, folder: str, part: str | None
) -> None:
    stem = tmp_path / source / folder / "train_bus/KU_HH_15_30_1"
    image(stem.with_suffix(".tif"))
    stem.with_suffix(".xml").write_text("<annotation/>")
    for place in (tmp_path / source, to_tar(tmp_path / source)):
        items, rejected = listed("atrnet-star", place)
        assert [item.part for item in items] == ([part] if part else [])
        assert len(items) + len(rejected) == 1


@pytest.mark.parametrize("kind", ["atrnet-star", "opensarship"])
def test_a_side_file_that_was_mended_is_read_again(
    star: tuple[Path, np.ndarray, np.ndarray], ships: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path, kind: str
) -> None:
    root = star[0] if kind == "atrnet-star" else ships[0]
    side = next(path for path in sorted(root.rglob("*.xml")))
    text = side.read_text()
    specs = [SourceSpec("s", root, kind=kind, incomplete=True)]
    side.write_text("<" * len(text))
    with pytest.raises(DataError, match="is not readable XML"):
        pack(tmp_path / "out", specs)
    side.write_text(text)
    assert pack(tmp_path / "out", specs).samples > 0
    assert not (tmp_path / "out" / REJECTED).exists()


def test_atrnet_star_checks_the_published_counts(star: tuple[Path, np.ndarray, np.ndarray]) -> None:
    items, _ = listed("atrnet-star", star[0])
    with pytest.raises(DataError, match=r"part test: 1 files, published are 29,284\n.*part train: 1 .* are 68,091"):
        check_counts(corpus("atrnet-star"), items, "here")


def test_what_does_not_fit_atrnet_star_is_rejected_with_its_reason(star: tuple[Path, np.ndarray, np.ndarray]) -> None:
    root = star[0]
    image(root / "train/Buick_Excelle_GT/KU_HH_15_30_9.tif")
    image(root / "train/Buick_Excelle_GT/photo.tif")
    image(root / "Buick_Excelle_GT/KU_HH_15_30_9.tif")
    (root / "test/Buick_Excelle_GT/KU_HH_15_30_2.xml").write_text("<annotation>")
    records, rejected = take("atrnet-star", root)
    assert [r.meta["file"] for r in records] == ["train/Buick_Excelle_GT/KU_HH_15_30_1.tif"]
    reasons = {r.key: r.reason for r in rejected}
    name = "train/Buick_Excelle_GT/KU_HH_15_30_9"
    assert reasons[f"{name}.tif"] == f"{name}.tif has no annotation {name}.xml"
    assert reasons["train/Buick_Excelle_GT/photo.tif"].endswith("BAND_POLARISATION_DEPRESSION_AZIMUTH_ID")
    assert reasons["Buick_Excelle_GT/KU_HH_15_30_9.tif"] == "its path does not fit train/CLASS or test/CLASS"
    assert "is not readable XML" in reasons["test/Buick_Excelle_GT/KU_HH_15_30_2.tif"]
    with pytest.raises(DataError, match="range=far is unknown"):
        take("atrnet-star", root, extra={"range": "far"})
