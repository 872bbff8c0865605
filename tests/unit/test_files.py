"""Files of a run are written whole or stay as they were."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from foundation.errors import StorageError
from foundation.files import read_json, write_whole

FORK = multiprocessing.get_context("fork")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_whole(tmp_path / "new" / "scores.json", "[1]")
    monkeypatch.setattr("secrets.token_hex", lambda _: "drawn")
    (path.parent / f".{path.name}.drawn.tmp").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"scores\.json cannot be written: No space left on device") as caught:
        write_whole(path, "[2]" * 10_000)
    assert "free space" in str(caught.value)
    assert read_json(path) == [1]
    assert list(path.parent.iterdir()) == [path]


def write_often(path: Path, value: int) -> None:
    for _ in range(300):
        write_whole(path, json.dumps([value] * (1 + 999 * value)))


def test_of_several_writers_each_writes_whole(tmp_path: Path) -> None:
    path = write_whole(tmp_path / "scores.json", "[0]")
    writers = [FORK.Process(target=write_often, args=(path, value)) for value in (0, 1)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        found = read_json(path)
        assert found == [found[0]] * (1 + 999 * found[0])
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text("[1, 2")
    with pytest.raises(StorageError, match=r"scores\.json cannot be read") as caught:
        read_json(tmp_path / "scores.json")
    assert str(tmp_path) in str(caught.value)
