"""Packing is deterministic, complete and honest about what it leaves out."""

from __future__ import annotations

import hashlib
import json
import tarfile
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from shards_samples import records, small

from shards import catalog as catalogs
from shards import spool
from shards.errors import DataError
from shards.inspect import contact_sheet, summary
from shards.pack import Options, Record, SourceSpec, pack, published
from shards.reader import Reader
from shards.schema import npy_bytes
from shards.sources.base import Corpus, Item, Part
from shards.statistics import Statistics

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_the_same_input_gives_the_same_bytes_and_leaves_nothing_else_behind(tmp_path):
    small(tmp_path / "a")
    small(tmp_path / "b")
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert {p.suffix for p in (tmp_path / "a").iterdir()} == {".tar", ".idx", ".json", ".parquet"}


def test_every_sample_comes_back_with_its_pixels_class_and_metadata(tmp_path):
    catalog = small(tmp_path)
    reader = Reader(catalog)
    given = {(r.pixels.tobytes(), r.label) for r in records(24)}
    samples = [reader[i] for i in range(24)]
    assert {(s.pixels.tobytes(), catalog.classes[s.label]) for s in samples} == given
    assert {s.pixels.shape[0] for s in samples} == {1}
    meta = json.loads(reader.meta(0))
    assert (meta["source"], meta["class"]) == ("one", catalog.classes[reader[0].label])
    assert len(meta["sha256"]) == 64


def test_classes_are_mixed_over_the_shards(tmp_path):
    catalog = small(tmp_path).only(["one"])
    sizes = [shard.samples for shard in catalog.sources[0].shards]
    assert len(sizes) > 1
    reader = Reader(catalog)
    assert {reader[i].label for i in range(sizes[0])} == {0, 1}


def test_a_plain_webdataset_reader_reads_the_shards(tmp_path):
    wds = pytest.importorskip("webdataset")
    catalog = small(tmp_path)
    for source in catalog.sources:
        urls = [str(tmp_path / shard.name) for shard in source.shards]
        samples = list(wds.WebDataset(urls, shardshuffle=False).decode())
        assert len(samples) == source.samples
        assert {s["json"]["source"] for s in samples} == {source.name}
        assert {s["npy"].dtype.name for s in samples} == {source.dtype}
        assert len({s["__key__"] for s in samples}) == source.samples


def test_packing_again_replaces_a_source_by_name_and_leaves_the_others(tmp_path):
    before = small(tmp_path)
    after = pack(tmp_path, [SourceSpec("two", records=records(5, "uint16", 7))], shard_bytes=2000)
    assert [(s.name, s.samples) for s in after.sources] == [("one", 24), ("two", 5)]
    assert after.sources[0] == before.sources[0]
    after.verify()


def files_of(*packed: catalogs.Catalog) -> set[str]:
    """Every file that these catalogs point to, and the list of sources."""
    sources = [source for catalog in packed for source in catalog.sources]
    tars = {shard.name for source in sources for shard in source.shards}
    indexes = {Path(name).with_suffix(".idx").name for name in tars}
    return tars | indexes | {source.metadata.name for source in sources} | {"catalog.json"}


def test_what_a_running_job_reads_stays_until_the_packing_after_the_next(tmp_path):
    first = small(tmp_path)
    second = pack(tmp_path, [SourceSpec("two", records=records(5, "uint16", 7))], shard_bytes=2000)
    assert {p.name for p in tmp_path.iterdir()} == files_of(first, second)
    first.verify()
    third = pack(tmp_path, [SourceSpec("three", records=records(4))])
    assert {p.name for p in tmp_path.iterdir()} == files_of(third)
    third.verify()


def test_statistics_are_those_of_the_pixels(tmp_path):
    catalog = small(tmp_path)
    pixels = np.concatenate([r.pixels.ravel() for r in records(24)])
    known = catalog.sources[0].statistics
    assert known["mean"] == pytest.approx(pixels.mean())
    assert known["std"] == pytest.approx(pixels.std())
    assert (known["min"], known["max"]) == (pixels.min(), pixels.max())
    assert known["p50"] == np.percentile(pixels, 50, method="inverted_cdf")
    assert (known["height"], known["width"]) == ([8, 9, 10], [9, 9, 9])
    assert known["class_counts"] == {"a": 12, "b": 12}
    assert catalog.sources[0].amplitude == catalogs.Amplitude("full", 255.0)


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_wide_pixels_are_scaled_by_their_percentile_99_9(dtype):
    values = np.random.default_rng(0).rayleigh(900, (300, 300)).astype(dtype)
    statistics = Statistics(np.dtype(dtype))
    statistics.add(values, None)
    amplitude = statistics.amplitude()
    assert amplitude.rule == "percentile"
    assert amplitude.scale == pytest.approx(np.percentile(values, 99.9), rel=0.01)


def test_a_source_that_cannot_be_packed_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"source 's' has no usable image: none found[\s\S]*--include and --exclude"):
        pack(tmp_path, [SourceSpec("s", records=[])])
    with pytest.raises(DataError, match=r"'a\.b' cannot name a source"):
        pack(tmp_path, [SourceSpec("a.b", records=records(2))])
    with pytest.raises(DataError, match="two sources are named 's'"):
        pack(tmp_path, [SourceSpec("s", records=records(2)), SourceSpec("s", records=records(2))])
    with pytest.raises(DataError, match=r"unknown codec 'zip'[\s\S]*raw, zstd"):
        pack(tmp_path, [SourceSpec("s", codec="zip", records=records(2))])
    with pytest.raises(DataError, match=r"folder has no part 'x'[\s\S]*no parts"):
        pack(tmp_path, [SourceSpec("s", tmp_path, part="x")])
    with pytest.raises(DataError, match="unknown split 'val'"):
        pack(tmp_path, [SourceSpec("s", split="val", records=records(2))])
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="packing stopped"):
        pack(tmp_path / "file" / "out", [SourceSpec("s", records=records(2))])
    with pytest.raises(DataError, match=r"the catalog folder is a file[\s\S]*name a folder"):
        pack(tmp_path / "file", [SourceSpec("s", records=records(2))])
    for url in ("s3://bucket/corpus", Path("s3://bucket/corpus")):
        with pytest.raises(DataError, match=r"packed into a URL[\s\S]*foundation shards copy"):
            pack(url, [SourceSpec("s", records=records(2))])


def test_the_summary_and_the_contact_sheet_show_every_source(tmp_path):
    catalog = small(tmp_path / "a")
    rows = summary(catalog)
    assert [(r["source"], r["samples"], r["dtype"], r["size"]) for r in rows] == [
        ("one", 24, "uint8", "8x9 to 10x9"),
        ("two", 9, "uint16", "8x9 to 10x9"),
    ]
    sheet = Image.open(contact_sheet(catalog, tmp_path / "sheets" / "s.png", columns=4))
    assert sheet.width == 4 * 116 + 4
    assert np.asarray(sheet).std() > 0


@pytest.mark.skipif(not REAL.is_dir(), reason="the real SAR images are not beside the repository")
def test_real_chips_are_packed_whole(tmp_path):
    mini, ships = REAL / "mstar-soc" / "mini.tar", REAL / "opensarship-mini" / "all.tar"
    catalog = pack(
        tmp_path,
        [
            SourceSpec("mstar-train", mini, "train", options=Options(include=("mini-train/*",))),
            SourceSpec("mstar-test", mini, "test", options=Options(include=("mini-test-dev/*",))),
            SourceSpec("ships", ships, options=Options(labels=False)),
        ],
        shard_bytes=1 << 20,
    )
    catalog.verify()
    by_name = {s.name: s for s in catalog.sources}
    assert {name: s.samples for name, s in by_name.items()} == {"mstar-train": 100, "mstar-test": 50, "ships": 522}
    assert len(catalog.classes) == 10
    assert (by_name["ships"].dtype, by_name["mstar-train"].dtype) == ("uint16", "uint8")
    assert [by_name["ships"].statistics["height"][i] for i in (0, 2)] == [13, 185]
    assert by_name["ships"].statistics["unlabelled"] == 522


def test_a_negative_zero_does_not_move_the_amplitude_scale(tmp_path):
    pixels = np.linspace(0, 4, 64 * 64, dtype=np.float32).reshape(64, 64)
    pixels[:4] = -0.0
    catalog = pack(tmp_path, [SourceSpec("floats", records=[Record(pixels, "one")])])
    assert catalog.sources[0].amplitude.scale == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize("dtype", ["complex64", "int16"])
def test_statistics_of_complex_pixels_are_those_of_their_magnitude(dtype):
    rng = np.random.default_rng(0)
    parts = rng.integers(1, 3000, (20, 30, 2))
    pixels = parts.astype(np.int16) if dtype == "int16" else (parts[..., 0] + 1j * parts[..., 1]).astype(np.complex64)
    magnitude = np.hypot(*np.moveaxis(parts, -1, 0).astype(np.float64))
    statistics = Statistics(pixels.dtype)
    statistics.add(pixels, None)
    found = statistics.summary()
    assert found["mean"] == pytest.approx(magnitude.mean(), rel=1e-6)
    assert found["max"] == pytest.approx(magnitude.max(), rel=1e-6)
    assert found["p50"] == pytest.approx(np.percentile(magnitude, 50, method="inverted_cdf"), rel=0.01)
    assert (found["height"], found["width"]) == ([20] * 3, [30] * 3)


@given(cuts=st.lists(st.integers(1, 11), max_size=3), dtype=st.sampled_from(["uint8", "uint16"]))
def test_statistics_of_parts_merge_to_those_of_the_whole(cuts, dtype):
    chips = records(12, dtype)
    whole, merged = Statistics(np.dtype(dtype)), Statistics(np.dtype(dtype))
    for chip in chips:
        whole.add(chip.pixels, chip.label)
    edges = [0, *sorted(cuts), 12]
    for first, last in pairwise(edges):
        part = Statistics(np.dtype(dtype))
        for chip in chips[first:last]:
            part.add(chip.pixels, chip.label)
        merged.merge(Statistics.from_json(json.loads(json.dumps(part.to_json()))))
    assert merged.to_json() == whole.to_json()
    assert merged.summary() == whole.summary()


def test_a_given_amplitude_replaces_the_one_of_the_statistics(tmp_path):
    rule = catalogs.Amplitude("calibrated", 2000.0, 40.0)
    source = pack(tmp_path, [SourceSpec("s", records=records(3, "uint16"), amplitude=rule)]).sources[0]
    assert source.amplitude == catalogs.load(tmp_path).sources[0].amplitude == rule


@pytest.mark.parametrize(("scale", "decibels"), [(0.0, 0.0), (-1.0, 0.0), (np.inf, 0.0), (np.nan, 0.0), (9.0, -1.0)])
def test_an_amplitude_rule_that_gives_no_values_is_refused_before_anything_is_read(tmp_path, scale, decibels):
    rule = catalogs.Amplitude("given", scale, decibels)
    with pytest.raises(DataError, match=r"amplitude scale of [\s\S]*where: s[\s\S]*a scale above 0"):
        pack(tmp_path / "out", [SourceSpec("s", tmp_path / "nowhere", amplitude=rule)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_the_statistics_of_nothing_are_zero(dtype):
    nothing = Statistics(np.dtype(dtype)).summary()
    assert nothing.pop("channels") == 1
    assert (nothing.pop("class_counts"), nothing.pop("height"), nothing.pop("width")) == ({}, [0] * 3, [0] * 3)
    assert set(nothing.values()) == {0}


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_compressed_samples_are_the_same_samples(tmp_path, dtype):
    chips = [Record(np.full((40, 40), i + 1, dtype), str(i), "a") for i in range(8)]
    raw = pack(tmp_path / "raw", [SourceSpec("s", records=chips)])
    packed = pack(tmp_path / "zstd", [SourceSpec("s", records=chips, codec="zstd")])
    assert packed.sources[0].origin["codec"] == "zstd"
    assert sum(s.bytes for s in packed.sources[0].shards) < sum(s.bytes for s in raw.sources[0].shards)
    with tarfile.open(tmp_path / "zstd" / packed.sources[0].shards[0].name) as archive:
        assert archive.getnames()[0].endswith(".npy.zst")
    for i in range(8):
        assert np.array_equal(Reader(raw)[i].pixels, Reader(packed)[i].pixels)
    packed.verify()
    assert packed.sources[0].statistics == raw.sources[0].statistics


class Ships(Corpus):
    """A published corpus for these tests."""

    kind, description = "ships-of-tests", "two parts"
    url, licence = "https://example.org", "free"
    parts: ClassVar = {"train": Part("train", {"a": 2, "b": 1}), "test": Part("test", 1)}
    columns: ClassVar = {"sensor": "made up"}

    def items(self):
        for name in self.files.names:
            part, label, _ = name.split("/")
            yield Item(name, part, label)


@pytest.fixture
def ships(tmp_path, monkeypatch):
    """The folder of a complete copy of that corpus."""
    for i, name in enumerate(("train/a/1", "train/a/2", "train/b/3", "test/a/4")):
        file = tmp_path / "ships" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 9), i + 1, np.uint8)).save(file)
    monkeypatch.setattr("shards.sources.corpora", lambda: {"ships-of-tests": Ships})
    return tmp_path / "ships"


def test_published_parts_become_sources_with_their_splits_and_origin(ships, tmp_path):
    catalog = pack(tmp_path / "out", published("ships-of-tests", "ships", ships))
    assert [(s.name, s.split, s.samples) for s in catalog.sources] == [
        ("ships-test", "test", 1),
        ("ships-train", "train", 3),
    ]
    assert catalog.sources[1].origin == {
        "kind": "ships-of-tests",
        "url": "https://example.org",
        "licence": "free",
        "part": "train",
        "codec": "raw",
    }
    assert catalog.table(["sensor", "class"], catalog.sources[0])["sensor"].to_pylist() == ["made up"]
    assert [s.name for s in published("ships-of-tests", "x", ships, parts=["test"])] == ["x-test"]
    with pytest.raises(DataError, match=r"ships-of-tests has no part 'val'[\s\S]*its parts: train, test"):
        published("ships-of-tests", "x", ships, parts=["val"])


def test_the_parts_of_a_corpus_share_the_scale_of_those_that_are_not_tested(ships, tmp_path):
    for i, name in enumerate(sorted(p.relative_to(ships).as_posix() for p in ships.rglob("*.png"))):
        Image.fromarray(np.full((9, 9), 900 if name.startswith("test") else 100 + i, np.uint16)).save(ships / name)
    specs = published("ships-of-tests", "ships", ships)
    test, train = pack(tmp_path / "both", specs).sources
    assert test.amplitude == train.amplitude == catalogs.Amplitude("percentile of ships-train", 103.0)
    (alone,) = pack(tmp_path / "alone", [s for s in specs if s.part == "test"]).sources
    assert alone.amplitude == catalogs.Amplitude("percentile", 900.0)


def test_sources_share_a_scale_only_with_those_of_their_kind_path_and_dtype(tmp_path):
    for name, value in (("a/1", 100), ("b/2", 103), ("test/3", 900)):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        np.save(tmp_path / "in" / f"{name}.npy", np.full((9, 9), value, np.uint16))
    (tmp_path / "in" / "wide").mkdir()
    np.save(tmp_path / "in" / "wide" / "4.npy", np.full((9, 9), 7, np.float32))
    (tmp_path / "other").mkdir()
    np.save(tmp_path / "other" / "5.npy", np.full((9, 9), 500, np.uint16))
    given = catalogs.Amplitude("given", 50.0)
    parts = [SourceSpec(n, tmp_path / "in", options=Options(include=(f"{n}/*",))) for n in ("wide", "b", "a")]
    tested = SourceSpec("test", tmp_path / "in", "test", options=Options(include=("test/*",)))
    apart = [SourceSpec("other", tmp_path / "other"), SourceSpec("one", records=records(3, "uint16"), amplitude=given)]
    packed = pack(tmp_path / "out", [*parts, tested, *apart, SourceSpec("two", records=records(3, "uint16"))])
    rules = {s.name: s.amplitude for s in packed.sources}
    assert rules["a"] == rules["b"] == rules["test"] == catalogs.Amplitude("percentile of a, b", 103.0)
    assert rules["other"] == catalogs.Amplitude("percentile", 500.0)
    assert (rules["wide"].rule, rules["one"], rules["two"].rule) == ("percentile", given, "percentile")


def test_a_corpus_that_is_not_complete_is_refused_or_its_deviation_recorded(ships, tmp_path):
    (ships / "train" / "a" / "1.png").unlink()
    with pytest.raises(DataError, match=r"class a: 1 files, published are 2[\s\S]*--incomplete"):
        pack(tmp_path / "out", published("ships-of-tests", "ships", ships))
    catalog = pack(tmp_path / "out", published("ships-of-tests", "ships", ships, incomplete=True))
    by_name = {s.name: s.statistics for s in catalog.sources}
    assert "class a: 1 files, published are 2" in by_name["ships-train"]["deviation"]
    assert "deviation" not in by_name["ships-test"]


def test_what_is_left_of_a_packing_that_never_ended_goes_with_the_next(tmp_path):
    stray = tmp_path / "one-00000-deadbeef.tar"
    stray.write_text("")
    others = tmp_path / "one-more-00000-deadbeef.tar"
    others.write_text("")
    small(tmp_path)
    assert not stray.exists()
    assert others.exists()


def test_a_failure_while_the_catalog_is_saved_leaves_the_old_one_whole(tmp_path, monkeypatch):
    before = small(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(catalogs, "save", full)
        with pytest.raises(DataError, match=r"packing stopped: .*No space left on device[\s\S]*free space"):
            pack(tmp_path, [SourceSpec("one", records=records(30, seed=3))])
    catalogs.load(tmp_path).verify()
    assert catalogs.load(tmp_path).fingerprint == before.fingerprint
    after = pack(tmp_path, [SourceSpec("one", records=records(30, seed=3))])
    after.verify()
    assert {p.name for p in tmp_path.iterdir()} == files_of(before, after)


def test_a_sample_that_reads_back_otherwise_stops_the_packing(tmp_path, monkeypatch):
    def spoiled(pixels, codec):
        return npy_bytes(pixels ^ 1)

    monkeypatch.setattr(spool, "_stored", spoiled)
    with pytest.raises(DataError, match=r"sample s-0000000\d read back from the shard is not what was packed"):
        pack(tmp_path, [SourceSpec("s", records=records(2))])
    assert not list(tmp_path.glob("*.tar"))
