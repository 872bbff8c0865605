"""An index says where the samples of a shard lie; no bytes of a shard or an index do more than raise a DataError."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from shards_samples import records, small

from shards import index as indexes
from shards import metadata
from shards.catalog import Catalog, Source
from shards.errors import DataError
from shards.pack import Record, SourceSpec, pack
from shards.schema import DTYPES, npy_bytes

ADVICE = r"[\s\S]*foundation shards verify .* --rebuild"


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return small(tmp_path_factory.mktemp("index"))


@pytest.fixture
def shard(catalog: Catalog, tmp_path: Path) -> tuple[Source, Path, Path]:
    """The first source of a catalog, and copies of its first shard and of its index."""
    source = catalog.sources[0]
    tar = Path(catalog.root) / source.shards[0].name
    for path in (tar, indexes.path_of(tar)):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return source, tmp_path / tar.name, indexes.path_of(tmp_path / tar.name)


def samples_of(dtype: str, channels: int) -> list[np.ndarray]:
    """Pixels of two sizes in a dtype of the schema."""
    rng = np.random.default_rng(1)
    found = []
    for size in ((7, 5), (4, 9)):
        wide = rng.uniform(1, 100, (3, *size, 2))
        if dtype == "complex64":
            whole = (wide[..., 0] + 1j * wide[..., 1]).astype(dtype)
        else:
            whole = (wide if dtype == "int16" else wide[..., 0]).astype(dtype)
        found.append(whole if channels == 3 else whole[0])
    return found


def opened(path: Path, tar: Path, source: Source) -> indexes.IndexFile:
    file = indexes.IndexFile(path)
    with open(tar, "rb") as data:
        indexes.compare(file, data.fileno(), source.shards[0], len(source.classes))
    return file


@pytest.mark.parametrize("codec", indexes.CODECS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_finds_the_pixels_the_json_and_the_class_of_its_sample(
    tmp_path: Path, dtype: str, channels: int, codec: str
) -> None:
    given_pixels = samples_of(dtype, channels)
    chips = [Record(p, str(i), "ab"[i]) for i, p in enumerate(given_pixels)]
    source = pack(tmp_path, [SourceSpec("s", records=chips, codec=codec)]).sources[0]  # type: ignore[arg-type]
    tar = tmp_path / source.shards[0].name
    file = opened(indexes.path_of(tar), tar, source)
    data = tar.read_bytes()
    assert len(file) == 2
    for row in map(file.row, range(2)):
        stored = data[int(row["offset"]) : int(row["offset"] + row["stored"])]
        meta = json.loads(data[int(row["meta_offset"]) :][: int(row["meta_bytes"])])
        pixels = indexes.unpack(row, stored)
        wanted = given_pixels[int(meta["from"])]
        assert zlib.crc32(stored) == row["crc"]
        assert pixels.dtype == wanted.dtype
        assert np.array_equal(pixels if len(pixels) > 1 else pixels[0], wanted)
        assert source.classes[row["label"]] == meta["class"] == "ab"[int(meta["from"])]
        assert (indexes.CODECS[row["codec"]], DTYPES[row["dtype"]]) == (codec, dtype)
        assert row["key"].decode().startswith("s-0000000")
    for wrong in (-1, 2):
        with pytest.raises(IndexError):
            file.row(wrong)
    file.close()


def test_an_index_file_is_a_plain_array_that_building_gives_again(shard: tuple[Source, Path, Path]) -> None:
    source, tar, path = shard
    rows = indexes.build(tar, source.classes)
    assert np.array_equal(np.load(path, allow_pickle=False), rows)
    assert np.array_equal(indexes.read(path), rows)
    before = path.read_bytes()
    assert indexes.write(rows, tar) == source.shards[0].index_sha256
    assert path.read_bytes() == before


def test_rebuilding_writes_the_packed_index_again_and_refuses_a_changed_shard(tmp_path: Path) -> None:
    catalog = small(tmp_path)
    tar = tmp_path / catalog.sources[0].shards[0].name
    path = indexes.path_of(tar)
    good = path.read_bytes()
    path.unlink()
    with pytest.raises(DataError, match="missing index" + ADVICE):
        indexes.IndexFile(path)
    assert indexes.rebuild(catalog) == len(list(tmp_path.glob("*.tar")))
    assert path.read_bytes() == good
    row = indexes.read(path)[0]
    data = bytearray(tar.read_bytes())
    data[int(row["offset"])] ^= 1
    tar.write_bytes(data)
    with pytest.raises(DataError, match=r"the shard has changed: its index would not be the packed one[\s\S]*restore"):
        indexes.rebuild(catalog)
    assert path.read_bytes() == good


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("offset", lambda a: a + 10**6, "a sample lies beyond the end"),
        ("offset", lambda a: a + 512, "no array at the place of one-"),
        ("offset", lambda a: a - a, "no array at the place of one-"),
        ("stored", lambda a: a + 1, "a size does not fit its shape"),
        ("stored", lambda a: ~(a * 0), "a sample lies beyond the end"),
        ("meta_offset", lambda a: ~(a * 0), "a sample lies beyond the end"),
        ("shape", lambda a: ~(a * 0), "a size does not fit its shape"),
        ("shape", lambda a: a * 0, "a shape, dtype or codec is out of range"),
        ("dtype", lambda a: a + 5, "a shape, dtype or codec is out of range"),
        ("codec", lambda a: a + 2, "a shape, dtype or codec is out of range"),
        ("label", lambda a: a + 2, "a label is out of range"),
        ("label", lambda a: a - 2, "a label is out of range"),
        ("key", lambda a: np.full_like(a, b"../x"), "a key is out of range"),
    ],
)
def test_an_index_that_disagrees_with_its_shard_asks_to_be_rebuilt(
    shard: tuple[Source, Path, Path], field: str, change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    source, tar, path = shard
    rows = indexes.read(path).copy()
    rows[field] = change(rows[field])
    indexes.write(rows, tar)
    with pytest.raises(DataError, match=rf"the index disagrees with its shard: .*{message}{ADVICE}"):
        opened(path, tar, source)


def test_an_index_of_another_number_of_samples_is_refused(shard: tuple[Source, Path, Path]) -> None:
    source, tar, path = shard
    indexes.write(indexes.read(path)[1:], tar)
    with pytest.raises(DataError, match=r"\d+ samples, the catalog says \d+" + ADVICE):
        opened(path, tar, source)


def test_an_index_cut_off_while_it_is_open_is_an_error(shard: tuple[Source, Path, Path]) -> None:
    source, tar, path = shard
    file = opened(path, tar, source)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(DataError, match="the index was cut off while it was read" + ADVICE):
        file.row(len(file) - 1)
    with pytest.raises(DataError, match=r"the index cannot be read: .* bytes cannot be \d+ rows" + ADVICE):
        indexes.IndexFile(path)


def header_of(path: Path, old: bytes, new: bytes) -> None:
    path.write_bytes(path.read_bytes().replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new"), [(b"'<u8'", b"'|O8'"), (b"(", b"[" * 90), (b"'shape': (", b"'shape': (9999999")]
)
def test_a_header_that_lies_is_refused(shard: tuple[Source, Path, Path], old: bytes, new: bytes) -> None:
    header_of(shard[2], old, new)
    with pytest.raises(DataError, match="the index cannot be read" + ADVICE):
        indexes.IndexFile(shard[2])


def tar_of(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.USTAR_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:", format=form) as archive:
        for info, data in members:
            info.size = len(data) if info.isreg() else 0
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def member(name: str, data: bytes, **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


PIXELS = npy_bytes(np.arange(1, 13, dtype=np.uint8).reshape(3, 4))
JSON = b'{"class":null}'
SPARSE = zstandard.ZstdCompressor().compress(PIXELS[:128] + bytes(1 << 24))
HOSTILE = {
    "a link": tar_of(member("a.npy", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"), member("a.json", JSON)),
    "a device": tar_of(member("a.npy", b"", type=tarfile.CHRTYPE), member("a.json", JSON)),
    "an absolute name": tar_of(member("/a.npy", PIXELS), member("/a.json", JSON)),
    "a name outside": tar_of(member("../a.npy", PIXELS), member("../a.json", JSON)),
    "a foreign member": tar_of(member("a.png", PIXELS), member("a.json", JSON)),
    "a lone array": tar_of(member("a.npy", PIXELS)),
    "two arrays": tar_of(member("a.npy", PIXELS), member("b.npy", PIXELS)),
    "a name twice": tar_of(*(2 * [member("a.npy", PIXELS), member("a.json", JSON)])),
    "pax headers": tar_of(member("a" * 150 + ".npy", PIXELS, pax_headers={"x": "y" * 9999}), form=tarfile.PAX_FORMAT),
    "a long GNU name": tar_of(member("a" * 150 + ".npy", PIXELS), form=tarfile.GNU_FORMAT),
    "a pickle": tar_of(
        member("a.npy", b"\x93NUMPY\x01\x00\x76\x00{'descr': '|O'" + b" " * 200), member("a.json", JSON)
    ),
    "a shape that lies": tar_of(member("a.npy", PIXELS.replace(b"(3, 4)", b"(9, 9)")), member("a.json", JSON)),
    "a huge shape": tar_of(member("a.npy", PIXELS.replace(b"(3, 4), }    ", b"(3000000, 4)}")), member("a.json", JSON)),
    "no class": tar_of(member("a.npy", PIXELS), member("a.json", b"{}")),
    "an unknown class": tar_of(member("a.npy", PIXELS), member("a.json", b'{"class":"zz"}')),
    "a class that is a list": tar_of(member("a.npy", PIXELS), member("a.json", b'{"class":[]}')),
    "deep JSON": tar_of(member("a.npy", PIXELS), member("a.json", b"[" * 100_000)),
    "huge JSON": tar_of(member("a.npy", PIXELS), member("a.json", JSON + b" " * (1 << 20))),
    "a number of many digits": tar_of(member("a.npy", PIXELS), member("a.json", b"9" * 10_000)),
    "no zstd": tar_of(member("a.npy.zst", PIXELS), member("a.json", JSON)),
    "a zstd bomb": tar_of(member("a.npy.zst", SPARSE), member("a.json", JSON)),
    "nothing": tar_of(),
    "no bytes": b"",
    "more after the end": tar_of(member("a.npy", PIXELS), member("a.json", JSON)) + b"x" * 512,
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_shard_that_packing_did_not_write_is_refused(tmp_path: Path, what: str) -> None:
    (tmp_path / "s.tar").write_bytes(HOSTILE[what])
    with pytest.raises(DataError, match=r"the shard cannot be read: .+\n[\s\S]*pack the source again"):
        indexes.build(tmp_path / "s.tar", "ab")


def test_a_plain_pair_is_read_and_the_error_of_another_names_the_member(tmp_path: Path) -> None:
    good = [member("a.npy", PIXELS), member("a.json", JSON)]
    (tmp_path / "s.tar").write_bytes(tar_of(*good))
    rows = indexes.build(tmp_path / "s.tar", "")
    assert rows["shape"].tolist() == [[1, 3, 4]]
    (tmp_path / "s.tar").write_bytes(tar_of(*good, member("stray.txt", b"x")))
    with pytest.raises(DataError, match=r"member 'stray.txt' is not part of a sample"):
        indexes.build(tmp_path / "s.tar", "")


@pytest.mark.parametrize("size", [2**40, 2**63, -1])
def test_a_member_header_with_an_impossible_size_is_refused(tmp_path: Path, size: int) -> None:
    data = bytearray(tar_of(member("a.npy", PIXELS), member("a.json", JSON)))
    data[124:136] = b"\x80\0\0\0" + struct.pack(">Q", size) if size > 0 else b"\xff" * 12
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "s.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.npy is cut off"):
        indexes.build(tmp_path / "s.tar", "")


def test_a_compressed_sample_whose_frame_lies_about_its_size_is_an_error() -> None:
    with pytest.raises(DataError, match="a compressed sample cannot be read: it does not hold"):
        indexes.decompress(SPARSE, (1, 3, 4), np.dtype("uint8"))
    good = zstandard.ZstdCompressor().compress(PIXELS)
    assert indexes.decompress(good, (1, 3, 4), np.dtype("uint8")) == PIXELS[128:]
    with pytest.raises(DataError, match="a compressed sample cannot be read"):
        indexes.decompress(good[:-3], (1, 3, 4), np.dtype("uint8"))


def mutate(data: bytes, edits: list[tuple[float, int]], end: float) -> bytes:
    changed = bytearray(data)
    for place, value in edits:
        changed[int(place * (len(data) - 1))] = value
    return bytes(changed[: int(end * len(data))])


EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8)
ENDS = st.one_of(st.just(1.0), st.floats(0, 1))


@pytest.fixture(scope="module", params=indexes.CODECS)
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Path]:
    folder = tmp_path_factory.mktemp("fuzz")
    source = pack(folder, [SourceSpec("s", records=records(3), codec=request.param)]).sources[0]
    return source, folder / source.shards[0].name


@settings(max_examples=150, deadline=None)
@given(edits=EDITS, end=ENDS)
def test_no_change_of_a_shard_makes_the_scan_fail_in_another_way(
    packed: tuple[Source, Path], edits: list[tuple[float, int]], end: float
) -> None:
    source, tar = packed
    changed = tar.with_name("changed.tar")
    changed.write_bytes(mutate(tar.read_bytes(), edits, end))
    try:
        rows = indexes.build(changed, source.classes)
    except DataError:
        return
    assert (rows["offset"] + rows["stored"] <= changed.stat().st_size).all()


@settings(max_examples=150, deadline=None)
@given(edits=EDITS, end=ENDS)
def test_no_change_of_an_index_leads_outside_its_shard(
    packed: tuple[Source, Path], edits: list[tuple[float, int]], end: float
) -> None:
    source, tar = packed
    changed = tar.with_name("changed.idx")
    changed.write_bytes(mutate(indexes.path_of(tar).read_bytes(), edits, end))
    try:
        file = opened(changed, tar, source)
    except DataError:
        return
    data = tar.read_bytes()
    for row in map(file.row, range(len(file))):
        stored = data[int(row["offset"]) : int(row["offset"] + row["stored"])]
        assert len(stored) == row["stored"]
        if zlib.crc32(stored) == row["crc"]:
            try:
                assert indexes.unpack(row, stored).shape[:3] == tuple(row["shape"].tolist())
            except DataError:
                assert row["codec"]
    file.close()


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=2000))
def test_random_bytes_are_neither_a_shard_nor_an_index_nor_metadata(packed: tuple[Source, Path], data: bytes) -> None:
    path = packed[1].with_name("random")
    path.write_bytes(data)
    with pytest.raises(DataError):
        indexes.build(path, "ab")
    with pytest.raises(DataError):
        indexes.read(path)
    with pytest.raises(DataError, match="the metadata have changed"):
        metadata.read(path, packed[0])
