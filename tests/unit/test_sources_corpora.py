"""Corpora are read from their published layouts: classes, parts and columns; what does not fit is named."""

from __future__ import annotations

import importlib
import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from shards.errors import DataError
from shards.schema import COLUMNS, SPLITS, Rejected
from shards.sources.base import Item, Options, Part, check_counts
from shards.sources.files import Files
from shards.sources.folder import Folder
from shards.sources.fusar_ship import FusarShip
from shards.sources.msar import Msar
from shards.sources.mstar import Mstar
from shards.sources.sample import Sample
from shards.sources.sar_acd import SarAcd
from shards.sources.sar_ship import SarShip
from shards.sources.sarsim import SarSim

GREY = np.arange(1, 257, dtype=np.uint16).reshape(16, 16).clip(0, 255).astype(np.uint8)
SLC = (GREY * np.exp(1j * GREY)).astype(np.complex64)
CORPORA = {source.kind: source for source in (FusarShip, Msar, Mstar, Sample, SarAcd, SarShip, SarSim)}
KINDS = tuple(CORPORA)


def picture(kind: str, pixels: np.ndarray = GREY) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def matlab() -> bytes:
    file = io.BytesIO()
    scipy.io.savemat(file, {"complex_img": SLC.astype(complex), "azimuth": 10.0})
    return file.getvalue()


def raw(**fields: object) -> bytes:
    lines = {"native_header_length": 0, "NumberOfColumns": 16, "NumberOfRows": 16, **fields}
    text = "".join(f"{key}= {value}\n" for key, value in lines.items()) + "[EndofPhoenixHeader]\n"
    head = f"[PhoenixHeaderVer01.04]\nPhoenixHeaderLength= {len(text) + 51:05d}\n".encode()
    return head + text.encode() + np.stack([np.abs(SLC), np.angle(SLC)]).astype(">f4").tobytes()


def boxes(*names: str) -> bytes:
    objects = "".join(f"<object><name>{name}</name><bndbox><xmin>1</xmin></bndbox></object>" for name in names)
    return f"<annotation><filename>x.jpg</filename>{objects}</annotation>".encode()


PNG, JPG, TIF = picture("PNG"), picture("JPEG"), picture("TIFF")
RGB = picture("JPEG", np.stack([GREY] * 3, 2))
CHIP = raw(
    TargetType="t72_tank",
    TargetSerNum="a64",
    TargetAz="358.48",
    MeasuredDepression="17.25",
    RangePixelSpacing="0.202148",
    CrossRangePixelSpacing="0.203125",
    ParentScene="hb20333",
    Polarization="HH",
)
META = (
    b"id,mmsi,length,width,polarMode,centerLookAngle,heightspace,widthspace,path\n"
    b"Ship_C01S02N0001,477939300,138,26,DH,42.51,1.702,1.124,Cargo\\BulkCarrier\n"
    b"Ship_C02S01N0001,,nan,,HH,inf,x,1.1,Fishing\\Fishing\n"
)
MEASURED = "real/t72/t72_real_A_elevDeg_016_azCenter_013_77_serial_812"
SYNTHETIC = "synth/zsu23/zsu23_synth_A_elevDeg_015_azCenter_079_99_serial_d08"
# kind → path → (bytes, part, class, some of what is known of the sample)
GOOD = {
    "msar": {
        "JPEGImages/1.jpg": (RGB, "", "ship", {"band": "C", "product": "chip"}),
        "JPEGImages/2.jpg": (RGB, "", None, {}),
        "JPEGImages/3.jpg": (RGB, "", None, {}),
    },
    "sar-ship": {
        "Gao_ship_hh_02016.jpg": (RGB, "", None, {"sensor": "Gaofen-3", "polarisation": "HH", "band": "C"}),
        "Sen_ship_vh_02016.jpg": (RGB, "", None, {"sensor": "Sentinel-1", "polarisation": "VH"}),
        "newship01.jpg": (RGB, "", None, {"band": "C"}),
    },
    "sarsim": {
        "grass_tank_e15_a000.png": (PNG, "", "tank", {"background": "grass", "band": "X"}),
        "medium_Bus_02.png": (PNG, "", "bus", {"background": "medium", "product": "simulated"}),
        "more/roads_0001.png": (PNG, "", None, {"background": "roads"}),
    },
    "sample": {
        f"png_images/qpm/{MEASURED}.png": (
            *(PNG, "qpm", "t72"),
            {"depression": 16.0, "azimuth": 13.0, "serial": "812", "product": "chip"},
        ),
        f"png_images/decibel/{SYNTHETIC}.png": (PNG, "decibel", "zsu23", {"product": "simulated", "azimuth": 79.0}),
        f"mat_files/{MEASURED}.mat": (matlab(), "complex", "t72", {"band": "X", "polarisation": "HH"}),
    },
    "mstar": {
        "TARGETS/TRAIN/17_DEG/T72/SN_132/HB03787.015": (
            *(CHIP, "train", "T72"),
            {"azimuth": 358.48, "depression": 17.25, "spacing": 0.203125, "scene": "hb20333", "polarisation": "HH"},
        ),
        "15_DEG/COL2/SCENE1/ZSU_23_4/HB15000.026": (raw(), "test", "ZSU234", {"depression": 15.0, "band": "X"}),
        "17_DEG/COL1/SCENE1/BRDM_2/HB15001.001": (raw(), "train", "BRDM2", {"product": "chip"}),
        "15_DEG/COL2/SCENE1/SLICY/HB14931.015": (raw(), "other", "SLICY", {"depression": 15.0}),
        "30_DEG/COL2/SCENE1/2S1/HB14932.000": (raw(), "other", "2S1", {"depression": 30.0}),
        "train/BMP2/10001.jpeg": (JPG, "train", "BMP2", {"depression": 17.0, "sensor": "STARLOS"}),
        "mini-test-dev/2S1/100001.jpeg": (JPG, "test", "2S1", {"depression": 15.0}),
        "TEST/15_DEG/BMP2/SN_9563/HB1.JPG": (JPG, "test", "BMP2", {"serial": "9563"}),
    },
    "fusar-ship": {
        "Cargo/BulkCarrier/Ship_C01S02N0001.tiff": (
            *(TIF, "", "Cargo"),
            {"look_angle": 42.51, "spacing": 1.702, "mmsi": "477939300", "polar_mode": "DH", "length": 138.0},
        ),
        "Fishing/Fishing/Ship_C02S01N0001.tiff": (TIF, "", "Fishing", {"polarisation": "HH", "spacing": 1.1}),
        "Tanker/OilTanker/Ship_C03S01N0001.tiff": (TIF, "", "Tanker", {"sensor": "Gaofen-3"}),
        "Bridges/B1.tiff": (TIF, "", "Bridges", {"band": "C"}),
        "Train/OtherShip/a/1.png": (PNG, "train", "OtherShip", {}),
        "Val/SeaPatches/1.tif": (TIF, "test", "SeaPatches", {}),
    },
    "sar-acd": {
        "A220/1.jpg": (JPG, "", "A220", {"sensor": "Gaofen-3", "polarisation": "HH"}),
        "A320_321/1.jpg": (JPG, "", "A320-321", {}),
        "A320/A321/2.jpg": (JPG, "", "A320-321", {}),
        "Boeing737/1.jpg": (JPG, "", "B737", {}),
        "B787/1.jpg": (JPG, "", "B787", {}),
    },
}
ASIDE = {  # side files that say something, or that are passed over
    "msar": {
        "Annotations/1.xml": boxes("Ship", "ship"),
        "Annotations/2.xml": boxes("ship", "tank"),
        "readme.txt": b"x",
    },
    "sar-ship": {"Gao_ship_hh_02016.txt": b"0 0.5 0.5 0.1 0.1"},
    "sarsim": {"notes.md": b"x"},
    "sample": {"sample_public.pdf": b"x", "verify.py": b"x"},
    "mstar": {"15_DEG/COL2/SCENE1/README.TXT": b"x"},
    "fusar-ship": {"meta.csv": META, "meta.xls": b"x"},
    "sar-acd": {".DS_Store": b"x"},
}
DECOY = {
    "msar": ("other/1.jpg", RGB, "not a file of msar; expected JPEGImages/*.jpg and Annotations/*.xml"),
    "sar-ship": ("1.bmp", b"x", "not a file of sar-ship; expected a flat folder of .jpg chips, e.g. Gao_ship_hh"),
    "sarsim": ("sand_tank.png", PNG, "not a file of sarsim; expected BACKGROUND_VEHICLE...png"),
    "sample": (
        "png_images/qpm/real/t72/t71_1.png",
        PNG,
        "not a file of sample; expected png_images/qpm/real/",
    ),
    "mstar": ("T72/1.jpeg", JPG, "neither depression nor split in its path; expected 17_DEG/COL1/SCENE1/BRDM_2"),
    "fusar-ship": ("1.tiff", TIF, "not a file of fusar-ship; expected Cargo/BulkCarrier/Ship_C01S02N0001.tiff"),
    "sar-acd": ("A380/1.jpg", JPG, "not a file of sar-acd; expected CLASS/*.jpg with a class of A220, A320-321"),
}


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def layout(kind: str) -> dict[str, bytes]:
    return {**{name: row[0] for name, row in GOOD[kind].items()}, **ASIDE[kind]}


def packed(root: Path, out: Path) -> Path:
    with tarfile.open(out, "w", format=tarfile.USTAR_FORMAT) as archive:
        for path in sorted(root.rglob("*")):
            archive.add(path, path.relative_to(root), recursive=False)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top", ["", "Corpus_v1.0/"])
@pytest.mark.parametrize("tarred", [False, True])
def test_labels_parts_and_columns_come_from_the_published_layout(tmp_path, kind, top, tarred):
    write(tmp_path / "s" / top, layout(kind))
    path = packed(tmp_path / "s", tmp_path / "s.tar") if tarred else tmp_path / "s"
    source = CORPORA[kind](Files(path))
    items = list(source.items())
    assert [item.name for item in items] == sorted(top + name for name in GOOD[kind])
    for item in items:
        _, part, label, known = GOOD[kind][item.name.removeprefix(top)]
        assert (item.part, item.label) == (part, label)
        (record,) = source.load(item)
        assert (record.key, record.label) == (item.name, label)
        assert known.items() <= record.meta.items()
        assert not part or part in source.parts
        for column in COLUMNS.keys() & record.meta.keys():
            assert type(record.meta[column]) is COLUMNS[column][0]
        if item.name.endswith((".mat", ".015", ".000", ".001", ".026")):
            assert record.pixels.dtype == np.complex64
            assert np.abs(record.pixels - SLC).max() < 1e-3
        else:
            assert (record.pixels.dtype, record.pixels.shape) == (np.uint8, (16, 16))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tar_of_the_current_folder_is_read_alike(tmp_path, kind):
    write(tmp_path / "s", {**layout(kind), DECOY[kind][0]: DECOY[kind][1]})
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        archive.add(tmp_path / "s", ".")  # its names begin with "./"
    folder, tar = (CORPORA[kind](Files(path)).items() for path in (tmp_path / "s", tmp_path / "s.tar"))
    for one, other in zip(folder, tar, strict=True):
        assert type(one) is type(other)
        if isinstance(one, Item):
            assert (one.part, one.label, one.meta) == (other.part, other.label, other.meta)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_does_not_fit_is_named_with_what_was_expected(tmp_path, kind):
    name, data, message = DECOY[kind]
    items = list(CORPORA[kind](Files(write(tmp_path, {**layout(kind), name: data}))).items())
    (rejected,) = (item for item in items if isinstance(item, Rejected))
    assert (rejected.key, rejected.kind) == (name, "bad")
    assert message in rejected.reason
    assert len(items) == len(GOOD[kind]) + 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_rejected_when_it_is_read(tmp_path, kind):
    name, row = next(iter(GOOD[kind].items()))
    source = CORPORA[kind](Files(write(tmp_path, {**layout(kind), name: row[0][: len(row[0]) * 3 // 4]})))
    (item,) = (item for item in source.items() if isinstance(item, Item) and item.name == name)
    (rejected,) = source.load(item)
    assert isinstance(rejected, Rejected)
    assert (rejected.key, rejected.kind) == (name, "bad")
    assert "damaged" in rejected.reason


@pytest.mark.parametrize("kind", KINDS)
def test_labels_can_be_left_out_and_globs_choose(tmp_path, kind):
    name = next(iter(GOOD[kind]))
    source = CORPORA[kind](Files(write(tmp_path, layout(kind))), Options(labels=False, include=(name,)))
    (item,) = source.items()
    (record,) = source.load(item)
    assert (record.key, record.label) == (name, None)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_checked_against_the_published_ones(tmp_path, kind, monkeypatch):
    source = CORPORA[kind](Files(write(tmp_path, layout(kind))))
    items = [item for item in source.items() if item.part in source.parts and source.parts[item.part].counts]
    with pytest.raises(DataError, match=f"{kind}: not the published counts"):
        check_counts(type(source), items, "here")
    items *= 2
    found = {part: Counter(i.label for i in items if i.part == part) for part in source.parts}
    small = {
        part: Part(fact.split, dict(found[part]) if isinstance(fact.counts, dict) else found[part].total())
        for part, fact in source.parts.items()
    }
    monkeypatch.setattr(type(source), "parts", small)
    check_counts(type(source), items, "here")
    for one_missing_or_too_many in (items[1:], [*items, items[0]]):
        with pytest.raises(DataError, match=r"\d files, published are \d"):
            check_counts(type(source), one_missing_or_too_many, "here")


PUBLISHED = {
    ("mstar", "train"): 2747,
    ("mstar", "test"): 2425,
    ("mstar", "train-variants"): 3671,
    ("mstar", "test-variants"): 3203,
    ("fusar-ship", "train"): 6870,
    ("fusar-ship", "test"): 2940,
    ("sar-acd", ""): 3032,
    ("sarsim", ""): 21168,
    ("sample", "decibel"): 2690,
    ("sample", "qpm"): 2690,
    ("msar", ""): (28449, 28499),
    ("sar-ship", ""): (39729, 43819),
}


def test_the_published_totals_stand_in_the_facts():
    for (kind, part), total in PUBLISHED.items():
        counts = CORPORA[kind].parts[part].counts
        assert (sum(counts.values()) if isinstance(counts, dict) else counts) == total
    for kind in KINDS:
        facts = CORPORA[kind]
        assert facts.description
        assert facts.url.startswith("https://")
        assert facts.licence
        assert set(facts.columns) <= set(COLUMNS)
        assert {part.split for part in facts.parts.values()} <= {*SPLITS, ""}


def test_the_registry_finds_every_corpus_by_its_kind():
    registry = importlib.import_module("shards.sources")
    assert CORPORA.items() <= registry.corpora().items()
    assert {row.reason for row in registry.rows() if row.kind in KINDS} == {""}


def test_a_wrong_count_names_the_class_what_was_found_and_what_is_published():
    items = [Item(f"A220/{i}.jpg", label="A220") for i in range(463)]
    with pytest.raises(DataError) as caught:
        check_counts(SarAcd, items, "some/folder")
    assert "class A220: 463 files, published are 464" in str(caught.value)
    assert "class ARJ21: 0 files, published are 514" in str(caught.value)
    assert "where: some/folder" in str(caught.value)


def test_msar_annotations_without_image_or_beyond_reading_are_named(tmp_path):
    bomb = '<!DOCTYPE a [<!ENTITY b "cc">]><annotation/>'
    files = {"Annotations/9.xml": boxes("ship"), "Annotations/1.xml": b"<annotation>"}
    files |= {"Annotations/2.xml": bomb.encode(), "Annotations/3.xml": bomb.encode("utf-16")}
    items = list(Msar(Files(write(tmp_path, {**layout("msar"), **files}))).items())
    rejected = {item.key: item.reason for item in items if isinstance(item, Rejected)}
    assert rejected["Annotations/9.xml"] == "its image JPEGImages/9.jpg is missing"
    assert rejected["Annotations/1.xml"].startswith("Annotations/1.xml is not readable XML: no element found")
    assert rejected["Annotations/2.xml"] == "an XML file with a document type is not read"
    assert rejected["Annotations/3.xml"] == rejected["Annotations/2.xml"]
    assert [item.label for item in items if isinstance(item, Item)] == [None] * 3


def test_a_fusar_table_without_its_columns_is_named_and_the_chips_are_still_read(tmp_path):
    broken = META.replace(b"polarMode", b"polar")
    first, *items = FusarShip(Files(write(tmp_path, {**layout("fusar-ship"), "meta.csv": broken}))).items()
    assert first.key == "meta.csv"
    assert first.reason.endswith("no column polarMode")
    assert [item.label for item in items if item.name.startswith("Cargo/")] == ["Cargo"]


def test_mstar_takes_the_standard_vehicles_unless_variants_are_asked_for(tmp_path):
    vehicles = {f"17_DEG/T72/SN_{serial}/1.015": CHIP for serial in ("132", "812", "S7")}
    vehicles |= {f"15_DEG/BMP2/SN_{serial}/1.015": CHIP for serial in ("9563", "9566", "C21")}
    vehicles |= {"17_DEG/BTR70/SN_C71/1.004": CHIP}
    files = Files(write(tmp_path, vehicles))
    found = list(Mstar(files).items())
    standard = [(item.part, item.label, item.meta["serial"]) for item in found if isinstance(item, Item)]
    assert standard == [("test", "BMP2", "9563"), ("train", "BTR70", "C71"), ("train", "T72", "132")]
    assert [(item.key, item.kind, item.reason) for item in found if isinstance(item, Rejected)] == [
        (f"{folder}/SN_{serial}/1.015", "other", f"{reason}: variants=yes takes it")
        for folder, serial, reason in (
            ("15_DEG/BMP2", "9566", "BMP2 9566 is a variant of the standard vehicle 9563"),
            ("15_DEG/BMP2", "C21", "BMP2 C21 is a variant of the standard vehicle 9563"),
            ("17_DEG/T72", "812", "T72 812 is a variant of the standard vehicle 132"),
            ("17_DEG/T72", "S7", "T72 S7 is a variant of the standard vehicle 132"),
        )
    ]
    every = list(Mstar(files, Options(extra={"variants": "yes"})).items())
    assert Counter(item.part for item in every) == {"train-variants": 4, "test-variants": 3}
    with pytest.raises(DataError, match="the option variants of mstar is 'maybe'"):
        Mstar(files, Options(extra={"variants": "maybe"}))
    with pytest.raises(DataError, match=r"did you mean variants\?"):
        Mstar(files, Options(extra={"variant": "yes"}))


DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.mark.skipif(not (DATA / "mstar-soc" / "train.tar").is_file(), reason=f"{DATA} holds no measured chips")
def test_measured_mstar_chips_have_the_published_counts():
    source = Mstar(Files(DATA / "mstar-soc" / "train.tar"))
    items = list(source.items())
    assert {(item.part, item.meta["depression"]) for item in items} == {("train", 17.0)}
    check_counts(type(source), items, "train.tar")
    for item in items[::300]:
        (record,) = source.load(item)
        assert (record.pixels.dtype, record.pixels.shape) == (np.uint8, (128, 128))
    with pytest.raises(DataError, match="part test: class 2S1: 137 files, published are 274"):
        check_counts(type(source), Mstar(Files(DATA / "mstar-soc" / "test-dev.tar")).items(), "test-dev.tar")


@pytest.mark.skipif(not (DATA / "mstar-slicy" / "pretrain.tar").is_file(), reason=f"{DATA} holds no measured chips")
def test_measured_sixteen_bit_chips_keep_their_range():
    source = Folder(Files(DATA / "mstar-slicy" / "pretrain.tar"))
    items = list(source.items())
    assert len(items) == 1953
    records = [record for item in items[::100] for record in source.load(item)]
    assert {(record.pixels.dtype.name, record.pixels.shape) for record in records} == {("uint16", (54, 54))}
    assert max(record.pixels.max() for record in records) > 4095
