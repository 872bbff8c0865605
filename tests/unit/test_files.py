"""Files of a run are written whole or stay as they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from foundation.errors import StorageError
from foundation.files import read_json, write_whole


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_whole(tmp_path / "new" / "scores.json", "[1]")
    (path.parent / f".{path.name}.tmp").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"scores\.json cannot be written: No space left on device") as caught:
        write_whole(path, "[2]" * 10_000)
    assert "free space" in str(caught.value)
    assert read_json(path) == [1]


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text("[1, 2")
    with pytest.raises(StorageError, match=r"scores\.json cannot be read") as caught:
        read_json(tmp_path / "scores.json")
    assert str(tmp_path) in str(caught.value)
