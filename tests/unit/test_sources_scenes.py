"""Large scenes: tiles are windows of their file, bit for bit, and no more is read than is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_samples import BOMB, assert_windows, speckle, take, to_tar, write_tiff

from shards.errors import DataError
from shards.sources import corpus
from shards.sources.base import Options
from shards.sources.files import Files
from shards.sources.scenes import inside_border, radar_band
from shards.sources.sidecar import numbers, parse_json, parse_xml

rasterio = pytest.importorskip("rasterio")


@settings(max_examples=25, deadline=None)
@given(height=st.integers(8, 70), width=st.integers(8, 70), tile=st.integers(8, 40), overlap=st.integers(0, 7))
def test_tiles_cover_a_scene_and_are_its_windows(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, tile: int, overlap: int
) -> None:
    scene = speckle(height, width)
    path = write_tiff(tmp_path_factory.mktemp("scene") / "a.tif", scene)
    records, rejected = take("geotiff", path, tile=tile, overlap=overlap)
    assert not rejected
    assert_windows(records, scene, tile)
    covered = np.zeros((height, width), int)
    for record in records:
        covered[record.meta["top"] : record.meta["top"] + tile, record.meta["left"] : record.meta["left"] + tile] += 1
    assert covered.all()
    places = {(record.meta["top"], record.meta["left"]) for record in records}
    assert len(places) == len(records)
    assert len({record.key for record in records}) == len(records)
    if overlap == 0 and height % tile == 0 and width % tile == 0:
        assert (covered == 1).all()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "complex64", "int16"])
@pytest.mark.parametrize("shape", [(40, 50), (3, 40, 50)])
def test_a_geotiff_keeps_its_dtype_and_bands(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    scene = speckle(*shape, dtype=dtype)
    records, rejected = take("geotiff", write_tiff(tmp_path / "a.tif", scene), tile=16)
    assert len(records) == 12
    assert not rejected
    assert_windows(records, scene, 16)


def test_scenes_are_cut_into_tiles_of_256_where_nothing_is_said(tmp_path: Path) -> None:
    records, _ = take("geotiff", write_tiff(tmp_path / "a.tif", speckle(300, 200)))
    assert [(r.pixels.shape, r.meta["top"]) for r in records] == [((256, 200), 0), ((256, 200), 44)]


def test_bands_can_be_chosen_and_an_alpha_band_is_no_channel(tmp_path: Path) -> None:
    scene = speckle(3, 20, 20)
    path = write_tiff(tmp_path / "a.tif", scene)
    records, _ = take("geotiff", path, extra={"bands": "3,1"})
    assert (records[0].pixels == scene[[2, 0]]).all()
    _, rejected = take("geotiff", path, extra={"bands": "4"})
    assert rejected[0].reason == "no band 4: it has 3"
    with pytest.raises(DataError, match="bands=VV names no bands"):
        take("geotiff", path, extra={"bands": "VV"})
    alpha = np.concatenate((speckle(1, 20, 20, dtype="uint8"), np.full((1, 20, 20), 255, np.uint8)))
    records, _ = take("geotiff", write_tiff(tmp_path / "b.tif", alpha, photometric="MINISBLACK", alpha="YES"))
    assert (records[0].pixels == alpha[0]).all()


@pytest.mark.parametrize(
    ("dtype", "nodata"), [("uint16", 0), ("float32", np.nan), ("float32", -9999), ("complex64", 0)]
)
def test_tiles_outside_the_imaged_area_are_left_out(tmp_path: Path, dtype: str, nodata: float) -> None:
    scene = speckle(32, 32, dtype=dtype)
    scene[:, :8] = nodata
    path = write_tiff(tmp_path / "a.tif", scene, nodata=nodata)
    records, rejected = take("geotiff", path, tile=16)
    assert [r.meta["left"] for r in records] == [16, 16]
    assert {(r.kind, r.reason) for r in rejected} == {("flat", "50% of the tile is nodata, max_nodata 0.0")}
    records, rejected = take("geotiff", path, tile=16, max_nodata=0.5)
    assert not rejected
    assert (records[0].pixels[:, :8] == 0).all()
    assert (records[0].pixels[:, 8:] == scene[:16, 8:16]).all()


def test_a_zero_real_part_is_no_nodata(tmp_path: Path) -> None:
    scene = speckle(16, 16, dtype="complex64")
    scene.real[3, 4] = 0
    records, rejected = take("geotiff", write_tiff(tmp_path / "a.tif", scene, nodata=0))
    assert not rejected
    assert_windows(records, scene, 256)


def test_flat_sea_is_left_out_when_asked(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    sea = np.sqrt(random.exponential(1000.0, (32, 64)))  # single-look speckle: std / mean is 0.52
    sea[8:12, 40:44] = 3000
    path = write_tiff(tmp_path / "a.tif", sea.astype(np.uint16))
    records, rejected = take("geotiff", path, tile=32, min_std=0.6)
    assert [r.meta["left"] for r in records] == [32]
    assert [(r.key, r.kind) for r in rejected] == [("a.tif@0,0", "flat")]
    assert "min_std 0.6" in rejected[0].reason


def test_a_geotiff_says_its_spacing_scene_and_tags(tmp_path: Path) -> None:
    from rasterio.transform import from_origin

    scene, tags = speckle(2, 20, 20), {"SENSOR": "ALOS-2", "polarization": "HH+HV"}
    projected = {"crs": "EPSG:32631", "transform": from_origin(5e5, 5e6, 2.5, 3.0)}
    records, _ = take("geotiff", write_tiff(tmp_path / "map.tif", scene, tags, **projected))
    meta = records[0].meta
    assert (meta["scene"], meta["sensor"], meta["polarisation"]) == ("map", "ALOS-2", "HH+HV")
    assert meta["spacing"] == pytest.approx(3.0)
    geographic = {"crs": "EPSG:4326", "transform": from_origin(10.0, 60.0, 2e-4, 1e-4)}
    records, _ = take("geotiff", write_tiff(tmp_path / "lonlat.tif", scene, **geographic))
    assert records[0].meta["spacing"] == pytest.approx(11.13, rel=0.01)  # 2e-4 degrees of longitude at 60 degrees north
    records, _ = take("geotiff", write_tiff(tmp_path / "plain.tif", scene))
    assert "spacing" not in records[0].meta


def test_a_short_name_stands_for_a_scene_only_together_with_its_folder(tmp_path: Path) -> None:
    names = ("train/0001", "test/0001", "train/CAPELLA_C02_SM_1", "test/CAPELLA_C02_SM_1")
    for name in names:
        write_tiff(tmp_path / f"{name}.tif", speckle(8, 8))
    records, _ = take("geotiff", tmp_path)
    assert [r.meta["scene"] for r in records] == ["test/0001", "CAPELLA_C02_SM_1", "train/0001", "CAPELLA_C02_SM_1"]


def test_damage_is_reported_and_what_can_be_read_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "scenes"
    whole = write_tiff(folder / "cut.tif", speckle(64, 64), blockysize=16).read_bytes()
    (folder / "cut.tif").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "noise.tif").write_bytes(b"no TIFF at all")
    (folder / "empty.tif").write_bytes(b"")
    write_tiff(folder / "wide.tif", np.ones((8, 8), np.float64))
    (folder / "trap.tif").write_text('<VRTDataset rasterXSize="8" rasterYSize="8"></VRTDataset>')
    write_tiff(folder / "good.tif", speckle(16, 16))
    records, rejected = take("geotiff", folder, tile=16)
    assert {r.meta["file"] for r in records} == {"cut.tif", "good.tif"}
    reasons = {r.key.partition("@")[0]: r.reason for r in rejected}
    assert {r.kind for r in rejected} == {"bad"}
    for name in ("cut.tif", "noise.tif", "empty.tif", "trap.tif"):
        assert reasons[name].startswith("truncated or damaged: RasterioIOError")
    assert reasons["wide.tif"] == "pixels are float64"
    again, rejected_again = take("geotiff", to_tar(folder), tile=16)
    assert [(r.key, r.pixels.tobytes()) for r in again] == [(r.key, r.pixels.tobytes()) for r in records]
    assert {r.key for r in rejected_again} == {r.key for r in rejected}


def test_a_scene_that_only_claims_to_be_large_is_refused(tmp_path: Path) -> None:
    sparse = {"driver": "GTiff", "count": 1, "dtype": "uint16", "tiled": True, "SPARSE_OK": True}
    for name, side, block in (("empty.tif", 60_000, 4096), ("block.tif", 32_768, 32_768)):
        with rasterio.open(tmp_path / name, "w", height=side, width=side, blockxsize=block, blockysize=block, **sparse):
            pass
    _, rejected = take("geotiff", tmp_path)
    assert rejected[0].reason.startswith("a stored block of 32768x32768 pixels takes 2,147,483,648 bytes")
    assert rejected[1].reason.startswith("nearly nothing is stored: 60000x60000 pixels in ")


def test_processes_share_a_scene_row_by_row_where_looking_at_it_costs_no_copy(tmp_path: Path) -> None:
    write_tiff(tmp_path / "scenes/a.tif", speckle(40, 40))
    for root, items in ((tmp_path / "scenes", 3), (tmp_path / "scenes/a.tif", 3), (to_tar(tmp_path / "scenes"), 1)):
        assert len(list(corpus("geotiff")(Files(root), Options(tile=16)).items())) == items
        assert len(take("geotiff", root, tile=16)[0]) == 9


def test_a_scene_below_min_side_is_small_and_a_wrong_overlap_is_refused_before_reading(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", speckle(20, 40))
    assert [(r.kind, r.reason) for r in take("geotiff", path, min_side=30, tile=8)[1]] == [
        ("small", "20x40 is below min_side 30")
    ]
    with pytest.raises(DataError, match="an overlap of 16 leaves nothing of a tile of 16"):
        take("geotiff", path, tile=16, overlap=16)


MEMORY = """
import re, sys
from shards.sources.base import Item, Options
from shards.sources.files import Files
from shards.sources.geotiff import GeoTiff

def peak():
    # Of this program alone: getrusage also counts the process that started it.
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

source = GeoTiff(Files(sys.argv[1]), Options(tile=512))
tiles = source.load(Item("a.tif"))  # the whole scene, as it is read from a tar
first = next(tiles)
before = peak()
print(1 + sum(1 for _ in tiles), peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to see the peak of memory")
def test_memory_is_bounded_by_a_strip_of_tiles(tmp_path: Path) -> None:
    height, width = 16_384, 4096
    profile = {"driver": "GTiff", "height": height, "width": width, "count": 1, "dtype": "uint16", "tiled": True}
    block = speckle(1, 1024, width)
    with rasterio.open(tmp_path / "a.tif", "w", blockxsize=512, blockysize=512, **profile) as file:
        for top in range(0, height, 1024):
            file.write(block, window=((top, top + 1024), (0, width)))
    run = [sys.executable, "-c", MEMORY, str(tmp_path / "a.tif")]
    tiles, kilobytes = map(int, subprocess.run(run, check=True, capture_output=True, text=True).stdout.split())
    assert tiles == height * width // 512**2
    assert kilobytes < 64_000  # the scene has 131,072, a strip 4096, and GDAL's cache of blocks up to 32,768


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), min_size=1, max_size=4))
def test_inside_the_border_is_from_the_first_to_the_last_pixel_of_a_row(rows: list[list[int]]) -> None:
    pixels = np.array(rows, np.uint16)
    for row, inside in zip(pixels, inside_border(pixels), strict=True):
        filled = np.flatnonzero(row)
        expected = range(filled[0], filled[-1] + 1) if len(filled) else range(0)
        assert np.flatnonzero(inside).tolist() == list(expected)
    assert (inside_border(np.stack((pixels, 0 * pixels))) == inside_border(pixels)).all()
    pairs = np.stack((0 * pixels, pixels), axis=-1).astype(np.int16)
    assert (inside_border(pairs) == inside_border(pixels)).all()


def test_frequencies_have_their_letters() -> None:
    letters = {1.27e9: "L", 3.2e9: "S", 5.405e9: "C", 9.6e9: "X", 14.6e9: "Ku", 35e9: "Ka", 0.435e9: "P"}
    assert {hertz: radar_band(hertz) for hertz in letters} == letters
    assert radar_band(None) is radar_band(94e9) is radar_band(1e6) is None


def test_annotations_are_read_without_trust() -> None:
    with pytest.raises(DataError, match="document type") as caught:
        parse_xml(BOMB.encode(), "a.xml")
    assert caught.value.where == "a.xml"
    root = parse_xml(b'<a xmlns="urn:x"><B>0.15m</B><c><b>-3e2</b></c><b>none</b></a>', "a.xml")
    assert numbers(root, "b") == [0.15, -300.0]
    for text in ("[" * 100_000, "{", "\xff"):
        with pytest.raises(DataError, match=r"a\.json is not readable JSON"):
            parse_json(text.encode("latin-1"), "a.json")
