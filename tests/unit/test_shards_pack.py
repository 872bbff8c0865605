"""Packing is deterministic, complete and honest about what it leaves out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shards_samples import records, small

from shards import catalog as catalogs
from shards.errors import DataError
from shards.inspect import contact_sheet, summary
from shards.pack import REJECTED, Record, Rejected, SourceSpec, pack
from shards.statistics import Statistics
from shards.stream import Reader

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_the_same_input_gives_the_same_bytes_and_leaves_nothing_else_behind(tmp_path):
    small(tmp_path / "a")
    small(tmp_path / "b")
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert {p.suffix for p in (tmp_path / "a").iterdir()} == {".tar", ".npz", ".json"}


def test_every_sample_comes_back_with_its_pixels_class_and_metadata(tmp_path):
    catalog = small(tmp_path)
    reader = Reader(catalog)
    given = {(r.pixels.tobytes(), r.label) for r in records(24)}
    samples = [reader[i] for i in range(24)]
    assert {(s.pixels.tobytes(), catalog.classes[s.label]) for s in samples} == given
    assert {s.pixels.shape[0] for s in samples} == {1}
    assert reader.labels().tolist() == [reader[i].label for i in range(len(reader))]
    meta = json.loads(reader.meta(0))
    assert (meta["source"], meta["class"]) == ("one", catalog.classes[reader[0].label])
    assert len(meta["sha256"]) == 64


def test_classes_are_mixed_over_the_shards(tmp_path):
    catalog = small(tmp_path).only(["one"])
    sizes = [shard.samples for shard in catalog.sources[0].shards]
    assert len(sizes) > 1
    first = Reader(catalog).labels()[: sizes[0]]
    assert set(first.tolist()) == {0, 1}


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
    assert {p.name for p in tmp_path.glob("*.tar")} == {sh.name for s in after.sources for sh in s.shards}
    assert len(list(tmp_path.glob("*.npz"))) == len(list(tmp_path.glob("*.tar")))
    after.verify()


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


def bad_folder(root: Path, bad: int) -> Path:
    root.mkdir()
    for i in range(3):
        Image.fromarray(np.full((8, 8), i + 1, np.uint8)).save(root / f"good{i}.png")
    for i in range(bad):
        (root / f"bad{i:02}.png").write_bytes(b"")
    return root


def test_bad_files_stop_the_packing_with_all_of_them_counted_and_nothing_written(tmp_path):
    with pytest.raises(DataError, match="12 of 15 files cannot be used") as caught:
        pack(tmp_path / "out", [SourceSpec("s", bad_folder(tmp_path / "in", 12))])
    assert "bad09.png: empty file (0 bytes)" in str(caught.value)
    assert "bad10" not in str(caught.value)
    assert "and 2 more" in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_skipped_files_are_listed_with_their_reason_and_counted(tmp_path):
    source = bad_folder(tmp_path / "in", 2)
    Image.fromarray(np.full((8, 8), 300, np.uint16)).save(source / "wide.png")
    catalog = pack(tmp_path / "out", [SourceSpec("s", source)], on_error="skip")
    assert catalog.samples == 3
    assert catalog.sources[0].statistics["rejected"] == {"bad": 3, "small": 0, "flat": 0}
    lines = [json.loads(line) for line in (tmp_path / "out" / REJECTED).read_text().splitlines()]
    assert lines[0] == {"file": "bad00.png", "kind": "bad", "reason": "empty file (0 bytes)", "source": "s"}
    assert lines[2]["reason"] == "uint16 in a source of uint8: split the source"
    pack(tmp_path / "out", [SourceSpec("s", source, exclude=("bad*", "wide*"))])
    assert not (tmp_path / "out" / REJECTED).exists()


def test_a_source_that_cannot_be_packed_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"source 's' has no usable image \(none found\)[\s\S]*include and exclude"):
        pack(tmp_path, [SourceSpec("s", records=[])])
    with pytest.raises(DataError, match=r"no usable image \(\{'small': 1\}\)"):
        pack(tmp_path, [SourceSpec("s", records=[Rejected("a", "small", "")])])
    with pytest.raises(DataError, match=r"'a\.b' cannot name a source"):
        pack(tmp_path, [SourceSpec("a.b", records=records(2))])
    with pytest.raises(DataError, match="two sources are named 's'"):
        pack(tmp_path, [SourceSpec("s", records=records(2)), SourceSpec("s", records=records(2))])
    with pytest.raises(DataError, match="unknown split 'val'"):
        pack(tmp_path, [SourceSpec("s", split="val", records=records(2))])
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="packing stopped"):
        pack(tmp_path / "file" / "out", [SourceSpec("s", records=records(2))])


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
            SourceSpec("mstar-train", mini, "train", include=("mini-train/*",)),
            SourceSpec("mstar-test", mini, "test", include=("mini-test-dev/*",)),
            SourceSpec("ships", ships, labels=False),
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
