"""The best checkpoint by its probe is kept, and found again: in a folder and in an object store."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation.config import from_dict
from foundation.errors import CheckpointError
from foundation.training import checkpoint, rewinding
from foundation.training.committed import committed, flaw, position_of
from foundation.training.guard import Rewind
from foundation.training.pins import Score, pinned
from foundation.training.places import Bucket, Place, place
from foundation.training.ranks import ALONE
from foundation.training.tracking import Tracker


@pytest.fixture(params=["folder", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A folder of checkpoints, and the same in an object store."""
    url = f"memory://{secrets.token_hex(4)}/checkpoints"
    yield place(tmp_path / "checkpoints") if request.param == "folder" else place(url)
    if request.param == "memory":
        place(url).remove()


def put(root: Place, position: int, score: float | None = None, name: str = "knn", keep: int = 1) -> str:
    """Save, and the name of the checkpoint."""
    worth = None if score is None else Score(score, name)
    state = {"position": position}
    return checkpoint.save(root.location, {"x": torch.zeros(2)}, state, position, keep, score=worth).name


def numbers(root: Place) -> list[int]:
    return [position_of(name) for name in committed(root)]


def test_the_best_so_far_stays_and_gives_way_to_a_better_one(root: Place) -> None:
    put(root, 10, 0.5)
    put(root, 20, 0.4)
    put(root, 30)  # saved where no probe was
    assert numbers(root) == [30, 10]
    assert checkpoint.best(root.location).name == "samples-000000000010"
    put(root, 40, 0.5)  # no better
    assert numbers(root) == [40, 10]
    put(root, 50, 0.6)
    assert numbers(root) == [50]
    put(root, 60, 0.55)
    assert numbers(root) == [60, 50]
    assert pinned(root) == {"samples-000000000050": Score(0.6, "knn")}
    assert flaw(root / "samples-000000000050") is None


def test_a_checkpoint_appears_with_its_pin(root: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is killed after the commit leaves the best one pinned."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    put(root, 10, 0.1)
    monkeypatch.setattr(checkpoint, "settle", killed)
    with pytest.raises(KeyboardInterrupt):
        put(root, 20, 0.2)
    assert sorted(pinned(root)) == ["samples-000000000010", "samples-000000000020"]
    assert checkpoint.best(root.location).name == "samples-000000000020"
    monkeypatch.undo()
    put(root, 30, 0.15)
    assert numbers(root) == [30, 20]


def test_somebody_elses_pin_is_neither_counted_nor_taken_away(root: Place) -> None:
    for position, text in ((10, b""), (20, b"keep, please"), (30, b'{"score": "high"}'), (40, b"[1]")):
        (root / put(root, position) / "PIN").write([text])
    with pytest.raises(CheckpointError, match=r"no checkpoint is pinned as the best[\s\S]*monitor\.probe=CATALOG"):
        checkpoint.best(root.location)
    put(root, 50, 0.1)
    put(root, 60, 0.2)
    assert numbers(root) == [60, 40, 30, 20, 10]
    assert checkpoint.best(root.location).name == "samples-000000000060"


def test_a_part_of_the_run_that_is_trained_again_is_judged_again(root: Place) -> None:
    put(root, 10, 0.3, keep=9)
    put(root, 20, 0.9, keep=9)
    put(root, 20, 0.2, keep=9)  # the same position once more
    assert pinned(root) == {"samples-000000000010": Score(0.3, "knn")}
    put(root, 20, math.nan, keep=9)
    assert pinned(root) == {"samples-000000000010": Score(0.3, "knn")}
    put(root, 10, math.nan, keep=9)
    assert pinned(root) == {}
    put(root, 30, 0.8, keep=9)
    put(root, 15, 0.4, keep=9)  # 20 and 30 were skipped, say: damaged
    assert list(pinned(root)) == ["samples-000000000015"]


def test_a_rewind_leaves_the_best_of_what_remains_as_the_best(root: Place, tmp_path: Path) -> None:
    put(root, 300, 0.8, keep=9)
    put(root, 600, 0.9, keep=9)
    assert list(pinned(root)) == ["samples-000000000600"]
    config = from_dict({"name": "run", "run_root": str(tmp_path), "train": {"checkpoints": str(root)}})
    config.run_folder.mkdir()
    learner, guard = SimpleNamespace(config=config), SimpleNamespace(jumps=[], restore=lambda _: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewinding, "fill", lambda *_: None)
        went: Any = rewinding.go_back
        assert went(learner, guard, Tracker(), ALONE, Rewind(500, 700)) == 300
    assert pinned(root) == {"samples-000000000300": Score(0.8, "knn")}
    assert checkpoint.best(root.location).name == "samples-000000000300"
    put(root, 600, 0.5)
    assert numbers(root) == [600, 300]
    assert checkpoint.best(root.location).name == "samples-000000000300"


def test_the_next_best_is_known_when_the_best_one_is_gone(root: Place) -> None:
    for position, score in ((10, 0.5), (20, 0.7), (30, 0.6), (40, 0.9)):
        put(root, position, score, keep=9)
    (root / "samples-000000000040").remove()
    assert checkpoint.best(root.location).name == "samples-000000000020"
    put(root, 50, keep=1)  # saved where no probe was
    assert numbers(root) == [50, 20]
    assert pinned(root) == {"samples-000000000020": Score(0.7, "knn")}


def test_a_score_that_only_the_pin_of_an_older_version_holds_counts(root: Place) -> None:
    for position, score in ((10, 0.5), (20, 0.7)):
        path = root / put(root, position, score, keep=9)
        facts = json.loads((path / "manifest.json").read())
        del facts["score"]
        (path / "manifest.json").write([json.dumps(facts).encode()])
    assert checkpoint.best(root.location).name == "samples-000000000020"
    put(root, 30, 0.6)
    assert numbers(root) == [30, 20]
    assert pinned(root) == {"samples-000000000020": Score(0.7, "knn")}


def test_a_pin_by_hand_stays_in_the_best_one(root: Place) -> None:
    put(root, 10, 0.5, keep=9)
    put(root, 20, 0.7, keep=9)
    (root / "samples-000000000010" / "PIN").write([b"mine"])
    (root / "samples-000000000020").remove()
    put(root, 30, 0.4)
    assert checkpoint.best(root.location).name == "samples-000000000010"
    assert (root / "samples-000000000010" / "PIN").read() == b"mine"


def test_scores_of_another_probe_do_not_compare(root: Place) -> None:
    put(root, 10, 0.9, "on other images")
    put(root, 20, 0.5)
    assert pinned(root) == {"samples-000000000020": Score(0.5, "knn")}


def test_a_score_that_is_no_number_pins_nothing(root: Place) -> None:
    put(root, 10, math.nan)
    assert pinned(root) == {}
    put(root, 20, 0.1)
    put(root, 30, math.nan)
    assert numbers(root) == [30, 20]


def test_a_pinned_checkpoint_that_is_damaged_is_not_the_best(root: Place) -> None:
    put(root, 10, 0.1)
    put(root, 20, 0.2)
    manifest = root / "samples-000000000020" / "manifest.json"
    manifest.write([json.dumps({"format": 2}).encode()])
    with pytest.raises(CheckpointError, match="no checkpoint is pinned"):
        checkpoint.best(root.location)


@given(st.lists(st.none() | st.integers(0, 4), min_size=1, max_size=8), st.integers(1, 2))
@settings(max_examples=20, deadline=None)
def test_the_first_of_the_best_is_always_there(scores: list[int | None], keep: int) -> None:
    store = place(f"memory://{secrets.token_hex(4)}")
    assert isinstance(store, Bucket)
    for number, score in enumerate(scores):
        put(store, 10 * number, score, keep=keep)
        seen = [s for s in scores[: number + 1] if s is not None]
        if seen:
            assert position_of(checkpoint.best(store.location).name) == 10 * scores.index(max(seen))
        assert len(numbers(store)) <= keep + 1
    store.remove()
