"""A run learns from several places, filtered and mixed as its configuration says, and says what it left out."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from object_store import ObjectServer
from processes import finish, hashes, record, start

from foundation.config import Config
from foundation.training.data import REPLACED, check_agreement, training_catalog
from foundation.training.run import train
from shards import catalog as catalogs
from shards import index as indexes
from shards.cache import Cache
from shards.errors import DataError
from shards.store import filesystem
from shards.transfer import copy

Make = Callable[..., Config]


@pytest.fixture(scope="module")
def bucket(upstream: str) -> Iterator[tuple[ObjectServer, dict[str, str]]]:
    """A real S3 server on loopback behind a counting, misbehaving proxy, and the environment of its clients."""
    with ObjectServer(upstream=upstream) as proxy:
        environment = {
            "AWS_ENDPOINT_URL": proxy.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        before = dict(os.environ)
        os.environ.update(environment)
        yield proxy, environment
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def uploaded(bucket, catalog: Path) -> str:
    import s3fs

    s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"]).makedirs("corpora", exist_ok=True)
    copy(catalogs.load(catalog), "s3://corpora/small")
    return "s3://corpora/small"


def test_a_run_from_a_bucket_sees_what_a_run_from_a_folder_sees_whatever_the_server_does(
    bucket, uploaded: str, tiny_yaml: Path, finished: Path, tmp_path: Path
) -> None:
    proxy, _ = bucket
    proxy.requests.clear()
    proxy.faults.extend(["", 503, "truncate", 500, "", "truncate"])
    where = [f"data.catalog={uploaded}", f"data.cache={tmp_path / 'cache'}", "data.workers=2"]
    code, output = finish(start("train", tiny_yaml, *where, "train.samples=48"))
    assert code == 0, output
    assert hashes(tmp_path / "runs" / "tiny") == hashes(finished)[: 48 // 8]
    names = {
        shard.name
        for source in catalogs.load(uploaded).select(("pretrain", "train")).sources
        for shard in source.shards
    }
    cached = {path.name.partition("-")[2] for path in (tmp_path / "cache").rglob("*.tar")}
    assert cached
    assert cached <= names
    # Each file once, whatever the number of processes, and again only for an injected fault.
    assert len(proxy.gets(".tar")) <= len(cached) + 6


def test_copying_a_catalog_goes_on_where_it_was_and_never_hides_other_sources(uploaded: str, catalog: Path) -> None:
    here = catalogs.load(catalog)
    assert catalogs.load(uploaded).fingerprint == here.fingerprint
    assert copy(here, uploaded) == 0
    with pytest.raises(DataError, match=r"a catalog there holds other sources: unseen[\s\S]*another target"):
        copy(here.select(("pretrain", "train")), uploaded)


def test_nothing_damaged_is_uploaded_and_a_damaged_upload_is_mended_on_request(
    bucket, catalog: Path, tmp_path: Path
) -> None:
    import s3fs

    s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"]).makedirs("mended", exist_ok=True)
    data = Path(shutil.copytree(catalog, tmp_path / "data"))
    here, target = catalogs.load(data), "s3://mended/small"
    shard = data / here.sources[0].shards[0].name
    whole = shard.read_bytes()
    shard.write_bytes(whole[:600] + bytes([whole[600] ^ 1]) + whole[601:])
    with pytest.raises(DataError, match=rf"{shard.name} is damaged: its sha256 is not the catalog's\n  where: {data}"):
        copy(here, target)
    shard.write_bytes(whole)
    assert copy(here, target) > 0
    fs, base = filesystem(target)
    fs.pipe_file(f"{base}/{shard.name}", bytes(len(whole)))
    assert copy(here, target) == 0
    with pytest.raises(DataError, match="changed on the server"):
        catalogs.load(target, cache=Cache(tmp_path / "cache", 1 << 30)).verify()
    assert copy(here, target, again=True) > 0
    catalogs.load(target, cache=Cache(tmp_path / "cache", 1 << 30)).verify()
    remote = catalogs.load(target, cache=Cache(tmp_path / "cache", 1 << 30))
    (cached,) = (tmp_path / "cache").rglob(f"*{shard.name}")
    cached.write_bytes(bytes(len(whole)))
    assert copy(remote, str(tmp_path / "back")) > 0
    assert (tmp_path / "back" / shard.name).read_bytes() == whole
    (data / here.sources[0].metadata.name).unlink()
    with pytest.raises(DataError, match=rf"{here.sources[0].metadata.name} is missing"):
        copy(here, str(tmp_path / "elsewhere"))


def test_a_bucket_that_is_not_there_is_neither_made_nor_a_traceback(bucket, catalog: Path, tmp_path: Path) -> None:
    from shards.pack import pack, published

    with pytest.raises(DataError, match=r"after 0 files: there is no such bucket[\s\S]*make the folder"):
        copy(catalogs.load(catalog), "s3://nowhere/small")
    fs, _ = filesystem("s3://nowhere")
    assert "nowhere" not in fs.ls("")
    with pytest.raises(DataError, match=r"no possible name of a bucket[\s\S]*correct the URL"):
        copy(catalogs.load(catalog), "s3://no_SUCH name/small")
    with pytest.raises(DataError, match=r"http:// is only read"):
        copy(catalogs.load(catalog), "http://127.0.0.1:1/small")
    with pytest.raises(DataError, match=r"no such (bucket or )?folder"):
        pack(tmp_path / "out", published("folder", "x", "s3://nowhere/small"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, r"EndpointConnectionError[\s\S]*do: "),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, r"no credentials \(NoCredentials"),
    ],
    ids=["a dead endpoint", "no credentials"],
)
def test_a_bucket_that_cannot_be_used_is_explained(
    bucket, catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], message: str
) -> None:
    for key, value in {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path), **changes}.items():
        monkeypatch.setenv(key, value)
    for words in (("copy", catalog, "s3://corpora/x"), ("pack", tmp_path / "out", "s3://corpora/x", "--name", "x")):
        code, output = finish(start("shards", *words))
        assert code == 2, output
        assert re.search(message, output), output
        assert "Traceback" not in output
        assert len(output.strip().splitlines()) <= 3


def test_a_damaged_sample_is_replaced_listed_and_told_once_and_the_run_goes_on(
    tiny_yaml: Path, catalog: Path, finished: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(catalog, tmp_path / "data"))
    (free,) = catalogs.load(data).only(["free"]).sources
    for shard in free.shards:
        for row in (0, 2):
            offset = int(indexes.read(indexes.path_of(data / shard.name))[row]["offset"])
            with open(data / shard.name, "r+b") as file:
                file.seek(offset + 5)
                file.write(b"\x00\xff\x00\xff")
    code, output = finish(start("train", tiny_yaml, f"data.catalog={data}", "data.workers=1"))
    assert code == 0, output
    lines = [json.loads(line) for line in (tmp_path / "runs" / "tiny" / REPLACED).read_text().splitlines()]
    assert lines
    assert all(line["used"] != line["corrupt"] and "free-" in line["reason"] for line in lines)
    assert output.count("damaged samples were replaced so far; see ") >= 1
    assert len(record(tmp_path / "runs" / "tiny")) == len(record(finished))
    touched = {line["position"] // 8 for line in lines}
    same = [a == b for a, b in zip(hashes(tmp_path / "runs" / "tiny"), hashes(finished), strict=True)]
    assert [step not in touched for step in range(len(same))] == same
    code, output = finish(start("train", tiny_yaml, f"data.catalog={data}", "data.corrupt=stop", "name=strict"))
    assert code == 2
    assert "DataError: sample free-" in output
    assert "data.corrupt=replace" in output


def test_filter_weights_and_amplitude_reach_the_run(tiny_config: Make, tmp_path: Path) -> None:
    lines = ["data.filter=source != 'free'", "data.amplitude={known: {scale: 50, decibels: 30}}", "name=other"]
    config = tiny_config(*lines, "train.samples=16")
    learnt = training_catalog(config)
    assert [source.name for source in learnt.sources] == ["known"]
    assert learnt.sources[0].amplitude == catalogs.Amplitude("run", 50, 30)
    run = train(config)
    with pytest.raises(Exception, match=r"started with other values of: data.filter, data.amplitude"):
        train(tiny_config("name=other", "train.samples=16"))
    assert len(record(run)) == 2
    weighted = tiny_config("data.weights={free: 0, known: 1}", "name=weighted", "train.samples=16")
    assert train(weighted).exists()
    with pytest.raises(DataError, match="no weight is given for known"):
        train(tiny_config("data.weights={free: 1}", "name=third"))


def test_the_test_images_of_another_catalog_can_be_held_out(tiny_config: Make, catalog: Path, tmp_path: Path) -> None:
    from shards.pack import SourceSpec, pack
    from shards.reader import Reader
    from shards.schema import Record

    seen = Reader(catalogs.load(catalog).only(["free"]))
    stolen = [Record(seen.native(i)[0], f"stolen-{i}") for i in range(3)]
    pack(tmp_path / "exam", [SourceSpec("exam", split="test", records=stolen)])
    held = f"data.held_out={tmp_path / 'exam'}"
    with pytest.raises(DataError, match="3 images to learn from are also test images"):
        train(tiny_config(held, "name=held", "train.samples=16"))
    assert train(tiny_config(held, "data.overlap=allow", "name=held", "train.samples=16")).exists()
    # A catalog without a test split is held out as a whole.
    pack(tmp_path / "whole", [SourceSpec("whole", split="train", records=stolen)])
    with pytest.raises(DataError, match="3 images to learn from are also test images"):
        train(tiny_config(f"data.held_out={tmp_path / 'whole'}", "name=whole", "train.samples=16"))


def test_the_amplitude_rule_of_a_run_holds_where_it_is_evaluated(tiny_config: Make, catalog: Path) -> None:
    from foundation.training.data import ruled

    config = tiny_config("data.amplitude={known: {scale: 50, decibels: 30}, unseen: {scale: 50, decibels: 30}}")
    assert training_catalog(config).only(["known"]).sources[0].amplitude.decibels == 30
    tested = ruled(catalogs.load(catalog), config.data, known=True).select("test")
    assert [source.amplitude for source in tested.sources] == [catalogs.Amplitude("run", 50, 30)]
    with pytest.raises(DataError, match=r"no source named \['knwon'\]"):
        training_catalog(tiny_config("data.amplitude={knwon: {scale: 50}}"))


class Two:
    """Stands for an engine of two processes whose other one brings `other`."""

    rank, world_size = 0, 2

    def __init__(self, other: int) -> None:
        self.other = other

    def sum_int(self, value: int) -> int:
        return value + self.other


def test_processes_that_hold_different_data_do_not_start(tiny_config: Make) -> None:
    config = tiny_config()
    learnt, heard = training_catalog(config), []
    listener = type("Listener", (Two,), {"sum_int": lambda self, value: heard.append(value) or 2 * value})
    check_agreement(listener(0), learnt, config, 16)
    message = r"the processes do not agree: here data \w{12}[\s\S]*rank 0 of 2[\s\S]*same catalog"
    with pytest.raises(DataError, match=message):
        check_agreement(Two(heard[0] + 1), learnt, config, 16)


def test_scenes_and_chips_in_a_bucket_are_packed_as_if_they_lay_here(bucket, tmp_path: Path) -> None:
    import numpy as np
    import rasterio
    import s3fs
    from PIL import Image

    from shards.pack import pack, published
    from shards.sources.base import Options

    rng = np.random.default_rng(0)
    (tmp_path / "here" / "chips" / "ship").mkdir(parents=True)
    (tmp_path / "here" / "scenes").mkdir()
    for i in range(3):
        Image.fromarray(rng.integers(1, 255, (20, 24), np.uint8)).save(tmp_path / f"here/chips/ship/{i}.png")
    shape = {"height": 90, "width": 150, "count": 1, "dtype": "uint16"}
    with rasterio.open(tmp_path / "here/scenes/s.tif", "w", driver="GTiff", **shape) as scene:
        scene.write(rng.rayleigh(100, (1, 90, 150)).astype(np.uint16))
    remote = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    remote.makedirs("raw", exist_ok=True)
    remote.put(str(tmp_path / "here"), "raw/", recursive=True)
    found = []
    for place in (tmp_path / "here", "s3://raw/here"):
        chips = published("folder", "chips", f"{place}/chips")
        scenes = published("geotiff", "scenes", f"{place}/scenes", options=Options(tile=64, overlap=8))
        found.append(pack(tmp_path / f"out{len(found)}", [*chips, *scenes]))
    assert [source.samples for source in found[0].sources] == [3, 6]
    assert found[0].fingerprint == found[1].fingerprint
