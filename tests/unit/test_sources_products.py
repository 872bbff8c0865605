"""Sentinel-1, SICD and ICEYE products: tiles in native dtype, and columns from their own annotation."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from source_samples import BOMB, assert_windows, speckle, take, to_tar, write_tiff

from shards.errors import DataError
from shards.pack import SourceSpec, pack
from shards.reader import Reader

pytest.importorskip("rasterio")
h5py = pytest.importorskip("h5py")
sicd = pytest.importorskip("sarkit.sicd")
etree = pytest.importorskip("lxml.etree")

# Sentinel-1


def write_safe(
    parent: Path, product: str, pixels: np.ndarray, polarisation: str = "vv", annotated: bool = True
) -> Path:
    """A SAFE folder with one measurement; the annotation holds what the specification puts there, and is read for."""
    safe, kind = parent / f"{product}.SAFE", product[7:10].lower()
    stem = f"s1a-iw-{kind}-{polarisation}-20200101t000000-20200101t000025-030000-037000-001"
    write_tiff(safe / f"measurement/{stem}.tiff", pixels)
    write_tiff(safe / "preview/quick-look.tif", pixels[:4, :4])
    (safe / "manifest.safe").write_text("<xfdu/>")
    (safe / "annotation/calibration").mkdir(parents=True, exist_ok=True)
    if annotated:
        (safe / f"annotation/{stem}.xml").write_text(f"""<?xml version="1.0" encoding="UTF-8"?><product>
<adsHeader><missionId>S1A</missionId><productType>{kind.upper()}</productType>
<polarisation>{polarisation.upper()}</polarisation><mode>IW</mode><swath>IW2</swath></adsHeader>
<imageAnnotation><imageInformation><rangePixelSpacing>2.329562e+00</rangePixelSpacing>
<azimuthPixelSpacing>1.394033e+01</azimuthPixelSpacing><incidenceAngleMidSwath>3.9e+01</incidenceAngleMidSwath>
</imageInformation></imageAnnotation><geolocationGrid><geolocationGridPointList count="2">
<geolocationGridPoint><incidenceAngle>3.0e+01</incidenceAngle></geolocationGridPoint>
<geolocationGridPoint><incidenceAngle>4.0e+01</incidenceAngle></geolocationGridPoint>
</geolocationGridPointList></geolocationGrid></product>""")
        (safe / f"annotation/calibration/calibration-{stem}.xml").write_text(
            '<calibration><calibrationVector><sigmaNought count="3">300 310.5 320</sigmaNought></calibrationVector>'
            "</calibration>"
        )
    return safe


GRD = "S1A_IW_GRDH_1SDV_20200101T000000_20200101T000025_030000_037000_ABCD"
SLC = "S1A_IW_SLC__1SDV_20200101T000000_20200101T000025_030000_037000_ABCD"


@pytest.mark.parametrize(("product", "dtype"), [(GRD, "uint16"), (SLC, "int16")])
def test_a_safe_product_becomes_tiles_with_what_its_annotation_says(tmp_path: Path, product: str, dtype: str) -> None:
    scene = speckle(40, 48, dtype=dtype)
    safe = write_safe(tmp_path / "products", product, scene)
    records, rejected = take("sentinel-1", safe, tile=16)
    assert not rejected
    assert len(records) == 9
    assert_windows(records, scene, 16)
    meta = {k: v for k, v in records[0].meta.items() if k not in ("file", "top", "left")}
    assert meta == {
        "sensor": "Sentinel-1",
        "platform": "Sentinel-1A",
        "band": "C",
        "product": product[7:10],
        "polarisation": "VV",
        "mode": "IW",
        "swath": "IW2",
        "spacing": 13.94033,
        "look_angle": 35.0,
        "scene": product,
        "calibration": "sigma0 = DN^2 / A^2 with A from 300 to 320, mean 310.2",
    }
    for root in (tmp_path / "products", to_tar(tmp_path / "products"), to_tar(safe)):
        others, _ = take("sentinel-1", root, tile=16)
        assert [(r.pixels.tobytes(), r.meta["scene"]) for r in others] == [
            (r.pixels.tobytes(), product) for r in records
        ]


def test_the_margins_of_a_safe_product_are_outside_and_dark_pixels_are_not(tmp_path: Path) -> None:
    scene = speckle(32, 48)
    scene[:, :4] = scene[:2] = 0
    scene[20, 40] = 0
    records, rejected = take("sentinel-1", write_safe(tmp_path, GRD, scene), tile=16)
    assert [(r.meta["top"], r.meta["left"]) for r in records] == [(16, 16), (16, 32)]
    assert {r.reason.split(" of ")[0] for r in rejected} == {"12%", "34%", "25%"}


def test_a_measurement_without_annotation_names_both(tmp_path: Path) -> None:
    safe = write_safe(tmp_path, GRD, speckle(8, 8), annotated=False)
    _, rejected = take("sentinel-1", safe)
    assert len(rejected) == 1
    assert rejected[0].kind == "bad"
    assert f"{rejected[0].key} has no annotation annotation/s1a-iw-grd-vv-" in rejected[0].reason


def test_an_annotation_with_entities_is_refused(tmp_path: Path) -> None:
    safe = write_safe(tmp_path, GRD, speckle(8, 8))
    annotation = next((safe / "annotation").glob("*.xml"))
    for encoding in ("utf-8", "utf-16"):
        annotation.write_bytes(BOMB.encode(encoding))
        _, rejected = take("sentinel-1", safe)
        assert rejected[0].reason == "an XML file with a document type is not read"
    annotation.write_text("<product><adsHeader>")
    assert "is not readable XML" in take("sentinel-1", safe)[1][0].reason


def test_annotations_that_changed_after_a_packing_that_stopped_are_read_again(tmp_path: Path) -> None:
    safe = write_safe(tmp_path / "in", GRD, speckle(8, 8))
    (annotation,), (calibration,) = (safe / "annotation").glob("*.xml"), (safe / "annotation/calibration").iterdir()
    text = calibration.read_text()
    calibration.unlink()
    stray = write_tiff(safe / "measurement/stray.tiff", speckle(8, 8))
    specs = [SourceSpec("s", safe, kind="sentinel-1")]

    def stopped() -> None:
        with pytest.raises(DataError, match=r"stray\.tiff has no annotation"):
            pack(tmp_path / "out", specs)

    stopped()
    calibration.write_text(text)
    stopped()
    calibration.write_text(text.replace("300", "400"))
    annotation.write_text(annotation.read_text().replace("IW2", "IW3"))
    stray.unlink()
    catalog = pack(tmp_path / "out", specs)
    assert (
        catalog.table(["calibration"])["calibration"].to_pylist()[0].startswith("sigma0 = DN^2 / A^2 with A from 310.5")
    )
    assert json.loads(Reader(catalog).meta(0))["swath"] == "IW3"


def test_a_product_without_calibration_says_so(tmp_path: Path) -> None:
    safe = write_safe(tmp_path, GRD, speckle(8, 8))
    next((safe / "annotation/calibration").iterdir()).unlink()
    records, _ = take("sentinel-1", safe)
    assert records[0].meta["calibration"].startswith("uncalibrated DN")


# SICD

SICD_XML = """<SICD xmlns="urn:SICD:1.3.0"><CollectionInfo><CollectorName>UMBRA-05</CollectorName>
<CoreName>2024-01-01-UMBRA-05</CoreName></CollectionInfo>
<ImageData><PixelType>{stored}</PixelType>{table}<NumRows>{rows}</NumRows><NumCols>{columns}</NumCols>
<FirstRow>0</FirstRow><FirstCol>0</FirstCol><SCPPixel><Row>5</Row><Col>5</Col></SCPPixel></ImageData>
<GeoData><SCP><ECF><X>6378137</X><Y>0</Y><Z>0</Z></ECF><LLH><Lat>0</Lat><Lon>0</Lon><HAE>0</HAE></LLH></SCP><ImageCorners>
<ICP index="1:FRFC"><Lat>1</Lat><Lon>1</Lon></ICP><ICP index="2:FRLC"><Lat>1</Lat><Lon>2</Lon></ICP>
<ICP index="3:LRLC"><Lat>2</Lat><Lon>2</Lon></ICP><ICP index="4:LRFC"><Lat>2</Lat><Lon>1</Lon></ICP>
</ImageCorners></GeoData><Grid><Row><SS>0.4</SS><UVectECF><X>0</X><Y>0.6</Y><Z>0.8</Z></UVectECF></Row>
<Col><SS>0.5</SS><UVectECF><X>0</X><Y>0.8</Y><Z>-0.6</Z></UVectECF></Col></Grid>
<Timeline><CollectStart>2024-01-01T00:00:00Z</CollectStart></Timeline>
<RadarCollection><TxFrequency><Min>9.4e9</Min><Max>9.8e9</Max></TxFrequency></RadarCollection>
<ImageFormation><TxRcvPolarizationProc>V:V</TxRcvPolarizationProc></ImageFormation>
<SCPCOA><ARPPos><X>6878137</X><Y>300000</Y><Z>0</Z></ARPPos><ARPVel><X>0</X><Y>0</Y><Z>7500</Z></ARPVel>
<SideOfTrack>L</SideOfTrack><GrazeAng>52.5</GrazeAng><IncidenceAng>37.5</IncidenceAng></SCPCOA>
<Radiometric><SigmaZeroSFPoly order1="0" order2="0"><Coef exponent1="0" exponent2="0">0.25</Coef></SigmaZeroSFPoly>
</Radiometric></SICD>"""
STORED = {
    "RE32F_IM32F": np.dtype(np.complex64),
    "RE16I_IM16I": np.dtype([("real", np.int16), ("imag", np.int16)]),
    "AMP8I_PHS8I": np.dtype([("amp", np.uint8), ("phase", np.uint8)]),
}


def write_sicd(path: Path, stored: str, pixels: np.ndarray, table: str = "") -> Path:
    rows, columns = pixels.shape
    xml = etree.ElementTree(etree.fromstring(SICD_XML.format(stored=stored, rows=rows, columns=columns, table=table)))
    security = {"security": {"clas": "U"}}
    meta = sicd.NitfMetadata(
        xmltree=xml,
        file_header_part={"ostaid": "here", **security},
        im_subheader_part={"isorce": "sensor", **security},
        de_subheader_part=security,
    )
    with warnings.catch_warnings(), open(path, "wb") as file:
        warnings.simplefilter("ignore")  # the XML is far from complete
        with sicd.NitfWriter(file, meta) as writer:
            writer.write_image(np.ascontiguousarray(pixels))
    return path


def test_a_sicd_becomes_complex_tiles_with_its_metadata(tmp_path: Path) -> None:
    scene = speckle(40, 36, dtype="complex64")
    path = write_sicd(tmp_path / "a.nitf", "RE32F_IM32F", scene)
    records, rejected = take("sicd", path, tile=16, overlap=2)
    assert not rejected
    assert len(records) == 9
    assert_windows(records, scene, 16)
    assert {k: v for k, v in records[0].meta.items() if k not in ("file", "top", "left")} == {
        "product": "SLC",
        "sensor": "UMBRA-05",
        "platform": "UMBRA-05",
        "band": "X",
        "polarisation": "VV",
        "spacing": 0.5,
        "look_angle": 37.5,
        "depression": 52.5,
        "scene": "2024-01-01-UMBRA-05",
        "calibration": "sigma0 = 0.25 |z|^2 at the scene centre",
    }


def test_stored_integers_of_a_sicd_stay_integers(tmp_path: Path) -> None:
    scene = speckle(20, 20, dtype="int16")
    pixels = scene.view(STORED["RE16I_IM16I"])[..., 0]
    records, _ = take("sicd", write_sicd(tmp_path / "a.ntf", "RE16I_IM16I", pixels), tile=16)
    assert len(records) == 4
    assert_windows(records, scene, 16)


def test_amplitude_and_phase_of_a_sicd_become_complex_by_its_table(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4), STORED["AMP8I_PHS8I"])
    pixels["amp"], pixels["phase"] = 2, 64
    table = '<AmpTable size="256"><Amplitude index="2">7.5</Amplitude></AmpTable>'
    records, _ = take("sicd", write_sicd(tmp_path / "a.ntf", "AMP8I_PHS8I", pixels, table))
    assert records[0].pixels.dtype == np.complex64
    assert np.allclose(records[0].pixels, 7.5j, atol=1e-5)
    records, _ = take("sicd", write_sicd(tmp_path / "b.ntf", "AMP8I_PHS8I", pixels))
    assert np.allclose(records[-1].pixels, 2j, atol=1e-5)


def test_a_damaged_sicd_is_rejected(tmp_path: Path) -> None:
    whole = write_sicd(tmp_path / "cut.nitf", "RE32F_IM32F", speckle(32, 32, dtype="complex64")).read_bytes()
    (tmp_path / "cut.nitf").write_bytes(whole[: len(whole) - 5000])
    (tmp_path / "half.nitf").write_bytes(whole[:600])
    (tmp_path / "noise.nitf").write_bytes(b"NITF02.10 and no more")
    begin = whole.index(b"<SICD")
    bomb = BOMB.encode().ljust(whole.index(b"</SICD>") + 7 - begin)
    (tmp_path / "type.nitf").write_bytes(whole[:begin] + bomb + whole[begin + len(bomb) :])
    records, rejected = take("sicd", tmp_path, tile=16)
    assert {r.kind for r in rejected} == {"bad"}
    assert {r.key.partition("@")[0] for r in rejected} == {"cut.nitf", "half.nitf", "noise.nitf", "type.nitf"}
    assert {r.meta["file"] for r in records} <= {"cut.nitf"}


# ICEYE


def write_iceye(path: Path, pixels: np.ndarray, **facts: Any) -> Path:
    real, imaginary = (pixels.real, pixels.imag) if pixels.dtype.kind == "c" else (pixels[..., 0], pixels[..., 1])
    with h5py.File(path, "w") as file:
        file.create_dataset("s_i", data=real, chunks=(8, 8), compression="gzip")
        file.create_dataset("s_q", data=imaginary, chunks=(8, 8), compression="gzip")
        for name, value in facts.items():
            file[name] = value
    return path


ICEYE = {
    "satellite_name": "ICEYE-X6",
    "product_name": "ICEYE_X6_SLC_SM_153426_20211026T060946",
    "polarization": "VV",
    "acquisition_mode": "stripmap",
    "carrier_frequency": 9.65e9,
    "range_sampling_rate": 299_792_458.0,
    "azimuth_ground_spacing": np.array([1.5]),
    "incidence_center": 25.0,
    "calibration_factor": 1e-5,
}


@pytest.mark.parametrize("dtype", ["int16", "complex64"])
def test_an_iceye_product_becomes_tiles_with_its_metadata(tmp_path: Path, dtype: str) -> None:
    scene = speckle(40, 36, dtype=dtype)
    path = write_iceye(tmp_path / "a.h5", scene, **ICEYE)
    records, rejected = take("iceye", path, tile=16)
    assert not rejected
    assert len(records) == 9
    assert_windows(records, scene, 16)
    assert {k: v for k, v in records[0].meta.items() if k not in ("file", "top", "left")} == {
        "sensor": "ICEYE",
        "platform": "ICEYE-X6",
        "band": "X",
        "product": "SLC",
        "polarisation": "VV",
        "mode": "stripmap",
        "spacing": 1.5,
        "look_angle": 25.0,
        "scene": "ICEYE_X6_SLC_SM_153426_20211026T060946",
        "calibration": "power = 1e-05 (I^2 + Q^2)",
    }


def test_metadata_of_an_iceye_product_may_be_attributes_or_absent(tmp_path: Path) -> None:
    path = write_iceye(tmp_path / "a.h5", speckle(8, 8, dtype="int16"))
    with h5py.File(path, "a") as file:
        file.attrs["product_name"] = np.bytes_(b"a name")
    records, _ = take("iceye", path)
    assert records[0].meta["scene"] == "a name"
    assert records[0].meta["calibration"] == "uncalibrated"
    assert "spacing" not in records[0].meta


def test_an_iceye_file_that_the_hdf5_library_would_read_for_ever_is_rejected(tmp_path: Path) -> None:
    path = write_iceye(tmp_path / "a.h5", speckle(8, 8, dtype="int16"), product_name="a product")
    content = bytearray(path.read_bytes())
    first = content.index(b"GCOL") + 16  # the heap of strings: objects of 16 + size bytes, the last one is free space
    free = first + 16 + (int.from_bytes(content[first + 8 : first + 16], "little") + 7) // 8 * 8
    content[free + 8 : free + 16] = bytes(8)
    path.write_bytes(content)
    records, rejected = take("iceye", path)
    assert not records
    assert [r.reason for r in rejected] == ["its metadata are damaged: the reader does not come to an end"]


def test_an_iceye_file_that_is_damaged_or_points_elsewhere_is_rejected(tmp_path: Path) -> None:
    scene = speckle(64, 64, dtype="int16")
    write_iceye(tmp_path / "other.h5", scene)
    whole = (tmp_path / "other.h5").read_bytes()
    folder = tmp_path / "products"
    folder.mkdir()
    (folder / "cut.h5").write_bytes(whole[: len(whole) // 2])
    (folder / "noise.h5").write_bytes(b"no HDF5 at all")
    with h5py.File(folder / "link.h5", "w") as file:
        file["s_i"] = file["s_q"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "s_i")
    with h5py.File(folder / "raw.h5", "w") as file:
        for part in ("s_i", "s_q"):
            file.create_dataset(part, (4, 4), "i2", external=[(str(tmp_path / "other.h5"), 0, 32)])
    with h5py.File(folder / "unlike.h5", "w") as file:
        file["s_i"], file["s_q"] = np.ones((4, 4), np.int16), np.ones((4, 5), np.int16)
    with h5py.File(folder / "bomb.h5", "w") as file:
        for part in ("s_i", "s_q"):
            file.create_dataset(part, (1 << 15, 1 << 15), "i2", chunks=(1 << 15, 1 << 15), compression="gzip")
    records, rejected = take("iceye", folder, tile=16)
    assert not records
    reasons = {r.key: r.reason for r in rejected}
    assert reasons["cut.h5"].startswith("truncated or damaged: OSError")
    assert reasons["noise.h5"].startswith("truncated or damaged: OSError")
    assert reasons["link.h5"] == "no image s_i: not an ICEYE SLC product"
    assert reasons["raw.h5"] == "s_i is stored in other files"
    assert reasons["unlike.h5"] == "s_i and s_q are no pair of int16 or float32 images: (4, 4) int16 and (4, 5) int16"
    assert reasons["bomb.h5"].startswith("a stored chunk of (32768, 32768) takes 2,147,483,648 bytes")
