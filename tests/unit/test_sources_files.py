"""Archives and buckets as sources: what is damaged or hostile is named, and what changed is read again."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shards import spool
from shards.errors import DataError
from shards.pack import REJECTED, SourceSpec, pack
from shards.reader import Reader
from shards.sources import files
from shards.sources.base import Item
from shards.sources.files import Files
from shards.sources.folder import Folder


def hostile_tar(path: Path) -> None:
    """Four good images among everything an archive can do."""

    def image(value: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(np.full((9, 9), value, np.uint8)).save(file, "PNG")
        return file.getvalue()

    with tarfile.open(path, "w:") as archive:

        def add(name: str, data: bytes = b"", **fields: object) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in fields.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(data))

        for i in range(3):
            add(f"c/good{i}.png", image(i + 1))
        add("../outside.png", image(50))
        add(str(path.parent / "absolute.png"), image(51))
        add("c/link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add("c/hard.png", type=tarfile.LNKTYPE, linkname="c/good0.png")
        add("c/device.png", type=tarfile.CHRTYPE)
        add("c/twice.png", image(60))
        add("c/twice.png", image(61))


def test_hostile_archive_members_are_listed_and_nothing_valid_is_lost(tmp_path):
    hostile_tar(tmp_path / "in.tar")
    catalog = pack(tmp_path / "out", [SourceSpec("s", tmp_path / "in.tar")], on_error="skip")
    assert {Reader(catalog)[i].pixels.max() for i in range(4)} == {1, 2, 3, 61}
    listed = {r["file"]: r["reason"] for r in map(json.loads, (tmp_path / "out" / REJECTED).read_text().splitlines())}
    absolute = str(tmp_path / "absolute.png")
    names = {"../outside.png", absolute, "c/link.png", "c/hard.png", "c/device.png", "c/twice.png"}
    assert {name.lstrip("/") for name in listed} == {name.lstrip("/") for name in names}
    assert "points outside" in listed["../outside.png"]
    assert {p.name for p in tmp_path.iterdir()} == {"in.tar", "out"}
    with pytest.raises(DataError, match="6 of 10 files cannot be used"):
        pack(tmp_path / "again", [SourceSpec("s", tmp_path / "in.tar")])


def plain_tar(path: Path, count: int = 4) -> list[tuple[str, int, int]]:
    """A tar of small images; name, header and end of data of each."""
    places = []
    with tarfile.open(path, "w:", format=tarfile.USTAR_FORMAT) as archive:
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(np.full((9, 9), i + 1, np.uint8)).save(file, "PNG")
            info = tarfile.TarInfo(f"{i}.png")
            info.size, start = file.tell(), archive.offset
            archive.addfile(info, io.BytesIO(file.getvalue()))
            places.append((info.name, start, start + 512 + info.size))
    return places


@given(data=st.data())
def test_a_tar_cut_anywhere_gives_the_files_before_the_cut_and_says_that_it_is_cut(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "in.tar"
    places = plain_tar(path)
    end = -(-places[-1][2] // 512) * 512
    at = data.draw(st.integers(places[0][2], end + 511))
    path.write_bytes(path.read_bytes()[:at])
    found = Files(path)
    assert found.names == [name for name, _, stop in places if stop <= at]
    assert found.refused[-1].key == "in.tar"
    assert re.fullmatch(r"the archive is damaged at byte \d+: what follows is lost", found.refused[-1].reason)


def test_a_tar_with_a_damaged_header_stops_the_packing_or_gives_what_stands_before_it(tmp_path):
    path = tmp_path / "in.tar"
    places = plain_tar(path)
    whole = path.read_bytes()
    assert Files(path).refused == []
    path.write_bytes(whole + b"more")
    assert [r.key for r in Files(path).refused] == ["in.tar"]
    start = places[2][1]
    path.write_bytes(whole[:start] + b"?" + whole[start + 1 :])
    reason = f"in.tar: the archive is damaged at byte {start}: what follows is lost"
    with pytest.raises(DataError, match=f"1 of 3 files cannot be used[\\s\\S]*{reason}"):
        pack(tmp_path / "out", [SourceSpec("s", path)])
    assert pack(tmp_path / "out", [SourceSpec("s", path)], on_error="skip").samples == 2
    assert json.loads((tmp_path / "out" / REJECTED).read_text())["file"] == "in.tar"
    path.write_bytes(b"?" + whole[1:])
    with pytest.raises(DataError, match="not a readable plain tar"):
        pack(tmp_path / "out", [SourceSpec("s", path)], on_error="skip")


class _Bucket:
    """A file system that says of its one file what `facts` hold."""

    def __init__(self, **facts: object) -> None:
        self.facts = facts

    def find(self, base: str, detail: bool) -> dict[str, dict[str, object]]:
        return {f"{base}/a.png": {"size": 3, **self.facts}}


@pytest.mark.parametrize("fact", ["ETag", "etag", "LastModified", "updated", "last_modified", "mtime", "created"])
def test_a_file_of_a_bucket_that_was_written_anew_is_another_chunk(monkeypatch, fact):
    def digest(**facts: object) -> str:
        monkeypatch.setattr(files, "filesystem", lambda _: (_Bucket(**facts), "bucket"))
        corpus = Folder(Files("s3://bucket"))
        (chunk,) = spool.cut("s", "raw", Path("x"), corpus, [i for i in corpus.items() if isinstance(i, Item)])
        return chunk.digest

    assert digest(**{fact: "1"}) == digest(**{fact: "1"}) != digest(**{fact: "2"})
    assert digest(ETag="1", LastModified="1") == digest(ETag="1", LastModified="2")
