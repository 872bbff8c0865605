"""Checkpoints in a bucket of a real S3 server, which stops to answer at every request of a save in turn."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from object_store import ObjectServer, Request, point_to
from torch import Tensor

from foundation.errors import CheckpointError
from foundation.training import places
from foundation.training.checkpoint import latest, load, read, restore, save
from foundation.training.committed import committed, flaw
from foundation.training.places import Url, place
from shards.remote import Retry

pytest.importorskip("moto.server", reason="moto[server] is not installed")
pytest.importorskip("s3fs", reason="s3fs is not installed")

ROOT = "s3://bucket/runs/a"
HASTY = Retry(patience=0.3, first=0.01, longest=0.05, connect=30, read=60)


@pytest.fixture
def server(upstream: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    with ObjectServer(upstream=upstream, slow=1) as proxy:
        fs = point_to(proxy, monkeypatch)
        monkeypatch.setattr(places, "RETRY", HASTY)
        for name in fs.find("bucket"):
            fs.rm_file(name)
        proxy.requests.clear()
        yield proxy


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"model.w": torch.randn(40, 7, generator=generator), "step": torch.tensor(float(seed))}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def names() -> list[str]:
    """All objects of the run."""
    return sorted(place(ROOT).sizes())


def failure(action: Callable[[], object]) -> str:
    """The message of a CheckpointError, empty without one."""
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return ""


def from_then_on(count: int, method: Callable[[Request], bool]) -> Callable[[Request], int]:
    """Refuse everything from the `count`-th of these requests on, as if the process had died there."""
    seen = [0]

    def refuse(request: Request) -> int:
        seen[0] += method(request)
        return 403 if seen[0] > count else 0

    return refuse


def changes(request: Request) -> bool:
    return request.method in ("PUT", "POST", "DELETE")


def test_a_bucket_is_used_like_a_folder(server: ObjectServer) -> None:
    for position in (10, 20, 30):
        path = save(ROOT, tensors(position), {"position": position}, position, keep=2)
    assert path == Url(ROOT) / "samples-000000000030"
    assert path.name == "samples-000000000030"
    assert latest(ROOT) == (path, [])
    assert {name.partition("/")[0] for name in names()} == {"latest", "samples-000000000020", "samples-000000000030"}
    assert place(f"{ROOT}/latest").read() == b"samples-000000000030\n"
    for where in (ROOT, path):
        found = load(where)
        assert found["position"] == 30
        assert same(found["tensors"], tensors(30))
    assert restore(ROOT) == (path, {"position": 30}, [])


def test_the_last_object_is_commit_and_before_it_the_manifest(server: ObjectServer) -> None:
    save(ROOT, tensors(1), {}, 10)
    written = [request.path.rpartition("/")[2] for request in server.requests if request.method == "PUT"]
    assert [name for name in written if name.endswith("safetensors")] == written[:1]
    assert written[-3:] == ["manifest.json", "COMMIT", "latest"]


def test_what_is_not_a_checkpoint_stays_in_the_bucket(server: ObjectServer) -> None:
    others = ("samples-raw/chip-0001.tif", "samples-list.csv", "notes/a.txt")
    for name in others:
        (place(ROOT) / name).write([b"x"])
    save(ROOT, tensors(1), {"position": 10}, 10)
    assert set(others) <= set(names())


def test_only_the_rows_that_are_needed_are_asked_for(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(ROOT, tensors(1), {}, 10)
    server.requests.clear()
    filled = {name: torch.zeros_like(tensor) for name, tensor in tensors(1).items()}
    monkeypatch.setattr(places, "BATCH", 100)  # several rounds of requests
    read(path, filled)
    assert same(filled, tensors(1))
    asked = [request.range for request in server.gets(".safetensors")]
    assert all(text is not None and text.startswith("bytes=") for text in asked)
    spans = [tuple(map(int, str(text).removeprefix("bytes=").split("-"))) for text in asked]
    assert sum(stop - start + 1 for start, stop in spans) == 40 * 7 * 4 + 4


def test_a_save_that_dies_at_any_request_loses_nothing_that_was_committed(
    server: ObjectServer, caplog: pytest.LogCaptureFixture
) -> None:
    old = save(ROOT, tensors(10), {"position": 10}, 10, keep=1)
    outcomes = []
    for count in range(60):
        server.refuse = from_then_on(count, changes)
        message = failure(lambda: save(ROOT, tensors(20), {"position": 20}, 20, keep=1))
        outcomes.append("refused" if message else "saved")
        if message:
            assert "the checkpoint at 20 samples could not be written: " in message
            assert "access denied" in message
            assert "check the credentials in the environment and the rights on the file; then resume" in message
            assert f"where: {ROOT}/samples-000000000020" in message
        server.refuse = lambda _: 0
        assert [flaw(place(ROOT) / name) for name in committed(place(ROOT))] == [None] * len(committed(place(ROOT)))
        found, state, skipped = restore(ROOT)
        if outcomes[-1] == "refused":
            assert (found, state) == (old, {"position": 10})
            leftovers = [name for name in names() if name.startswith("samples-000000000020")]
            line = "samples-000000000020: has no COMMIT marker: the save was interrupted"
            assert skipped == ([line] if leftovers else [])
            place(ROOT).clear()
        else:
            assert (found, state) == (Url(ROOT) / "samples-000000000020", {"position": 20})
        assert same(load(str(found))["tensors"], tensors(state["position"]))
        if outcomes[-1] == "saved":
            lines = [each.message for each in caplog.records if each.name == "foundation.training.checkpoint"]
            caplog.clear()
            if not lines:
                break
            assert len(lines) == 1
            assert lines[0].startswith("old checkpoints in s3://bucket/runs/a could not be removed: ")
            place(f"{ROOT}/samples-000000000020").remove()
            save(ROOT, tensors(10), {"position": 10}, 10, keep=1)
    assert outcomes.count("refused") == 5  # piece, index, state, manifest, COMMIT
    assert outcomes.count("saved") > 5  # pointer and the objects of the old one
    assert {name.partition("/")[0] for name in names()} == {"latest", "samples-000000000020"}


def test_saving_a_position_again_never_leaves_less_than_one_whole_checkpoint(server: ObjectServer) -> None:
    save(ROOT, tensors(1), {"position": 10}, 10, keep=1)
    for count in range(60):
        server.refuse = from_then_on(count, changes)
        died = failure(lambda: save(ROOT, tensors(2), {"position": 10}, 10, keep=1))
        server.refuse = lambda _: 0
        found = load(ROOT)["tensors"]
        assert same(found, tensors(1)) or same(found, tensors(2))
        if not died and len(names()) == 6:
            break
    assert same(load(ROOT)["tensors"], tensors(2))
    assert count > 5
    assert len(names()) == 6  # piece, index, state, manifest, COMMIT and the pointer


def test_damage_and_foreign_names_are_found_as_in_a_folder(server: ObjectServer) -> None:
    old, new = (save(ROOT, tensors(n), {"position": n}, n) for n in (10, 20))
    piece = next(name for name in place(new).sizes() if name.endswith(".safetensors"))
    content = place(new / piece).read()
    place(new / piece).write([content[:-1] + bytes([content[-1] ^ 1])])
    reason = f"the checkpoint is damaged: the sha256 of {piece} differs from the manifest"
    with pytest.raises(CheckpointError, match=reason):
        load(new)
    assert restore(ROOT) == (old, {"position": 10}, [f"samples-000000000020: {reason}"])
    place(new / piece).write([content[:-1]])
    assert latest(ROOT)[1] == [
        f"samples-000000000020: is damaged: {piece} has {len(content) - 1} bytes, not {len(content)}"
    ]
    facts = json.loads(place(new / "manifest.json").read())
    facts["files"]["../../secret"] = {"bytes": 1, "sha256": ""}
    place(new / "manifest.json").write([json.dumps(facts).encode()])
    assert latest(ROOT)[1] == ["samples-000000000020: has an unreadable manifest.json"]


def test_a_passing_fault_costs_one_more_request(server: ObjectServer) -> None:
    met: set[Request] = set()

    def once(request: Request) -> int:
        new = request not in met
        met.add(request)
        return 503 if new else 0

    server.refuse = once
    path = save(ROOT, tensors(1), {"position": 10}, 10)
    assert same(load(path)["tensors"], tensors(1))
    assert {request.method for request in met} >= {"GET", "PUT"}
    assert len(met) > 10


def test_a_store_that_is_away_is_named_and_is_not_taken_for_an_empty_one(server: ObjectServer) -> None:
    save(ROOT, tensors(1), {"position": 10}, 10)
    server.down()
    for action in (lambda: restore(ROOT), lambda: latest(ROOT), lambda: load(ROOT)):
        with pytest.raises(CheckpointError, match="cannot be listed: the list of files cannot be read: given up after"):
            action()
    with pytest.raises(CheckpointError, match="the checkpoint at 20 samples could not be written: ") as caught:
        save(ROOT, tensors(2), {"position": 20}, 20)
    assert "hunter2" not in str(caught.value)


def test_a_bucket_that_does_not_exist_is_named(server: ObjectServer) -> None:
    where: Any = "s3://no-such-bucket/run"
    assert latest(where) == (None, [])
    with pytest.raises(CheckpointError, match="could not be written: "):
        save(where, tensors(1), {}, 10)
