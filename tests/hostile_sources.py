"""The source side of the campaign (tests/hostile.py): headers through every decoder, and whole packings of mixtures."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from hostile_files import (
    DTYPES,
    SOUND,
    Rng,
    mutated,
    noise,
    odd_names,
    phoenix,
    refused,
    saved,
    tar_members,
    tar_wholes,
)  # fmt: skip

from shards import sources
from shards.errors import DataError
from shards.formats import check, decode
from shards.pack import REJECTED, Options, SourceSpec, pack
from shards.reader import Reader
from shards.schema import Record, Rejected, content_hash
from shards.sources.base import Item
from shards.sources.files import Files

Case = tuple[str, Callable[[], Counter[str]]]
MSTAR = "17_DEG/COL1/SCENE1/T72/"
SUFFIXES = {"geotiff": ".tif", "iceye": ".h5", "sicd": ".nitf", "mstar": ".015"}
SICD_XML = """<SICD xmlns="urn:SICD:1.3.0"><CollectionInfo><CollectorName>X</CollectorName><CoreName>core</CoreName>
</CollectionInfo><ImageData><PixelType>RE32F_IM32F</PixelType><NumRows>{0}</NumRows><NumCols>{1}</NumCols>
<FirstRow>0</FirstRow><FirstCol>0</FirstCol><SCPPixel><Row>5</Row><Col>5</Col></SCPPixel></ImageData>
<GeoData><SCP><ECF><X>6378137</X><Y>0</Y><Z>0</Z></ECF><LLH><Lat>0</Lat><Lon>0</Lon><HAE>0</HAE></LLH></SCP><ImageCorners>
<ICP index="1:FRFC"><Lat>1</Lat><Lon>1</Lon></ICP><ICP index="2:FRLC"><Lat>1</Lat><Lon>2</Lon></ICP>
<ICP index="3:LRLC"><Lat>2</Lat><Lon>2</Lon></ICP><ICP index="4:LRFC"><Lat>2</Lat><Lon>1</Lon></ICP>
</ImageCorners></GeoData><Grid><Row><SS>0.4</SS><UVectECF><X>0</X><Y>0.6</Y><Z>0.8</Z></UVectECF></Row>
<Col><SS>0.5</SS><UVectECF><X>0</X><Y>0.8</Y><Z>-0.6</Z></UVectECF></Col></Grid>
<Timeline><CollectStart>2024-01-01T00:00:00Z</CollectStart></Timeline>
<SCPCOA><ARPPos><X>6878137</X><Y>300000</Y><Z>0</Z></ARPPos><ARPVel><X>0</X><Y>0</Y><Z>7500</Z></ARPVel>
<SideOfTrack>L</SideOfTrack></SCPCOA></SICD>"""


def scene(kind: str, pixels: np.ndarray, folder: Path) -> bytes:
    """A scene file of a kind of source."""
    path = folder / f"made{SUFFIXES[kind]}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "geotiff":
            import rasterio

            size = dict(zip(("height", "width"), pixels.shape, strict=True))
            with rasterio.open(path, "w", "GTiff", count=1, dtype=pixels.dtype, compress="deflate", **size) as file:
                file.write(pixels[None])
        elif kind == "iceye":
            import h5py

            with h5py.File(path, "w") as file:
                for part, name in enumerate(("s_i", "s_q")):
                    file.create_dataset(name, data=pixels[..., part], chunks=(4, 8), compression="gzip")
                file["carrier_frequency"], file["product_name"] = 9.65e9, "a product"
        else:
            from lxml import etree
            from sarkit import sicd

            parts = {"security": {"clas": "U"}}
            heads = {"file_header_part": {"ostaid": "x", **parts}, "im_subheader_part": {"isorce": "x", **parts}}
            xml = etree.ElementTree(etree.fromstring(SICD_XML.format(*pixels.shape)))
            meta = sicd.NitfMetadata(xmltree=xml, **heads, de_subheader_part=parts)
            with open(path, "wb") as file, sicd.NitfWriter(file, meta) as writer:
                writer.write_image(pixels)
    data = path.read_bytes()
    path.unlink()
    return data


SCENES = {"geotiff": "uint16", "iceye": "int16", "sicd": "complex64"}


def iceye_bomb(folder: Path) -> bytes:
    """An HDF5 file that announces 100,000 x 100,000 pixels, with one chunk of them, all zeros."""
    import h5py

    with h5py.File(folder / "made.h5", "w") as file:
        for name in ("s_i", "s_q"):
            made = file.create_dataset(name, (100_000, 100_000), "i2", chunks=(2048, 2048), compression="gzip")
            made[:2048, :2048] = 0
    data = (folder / "made.h5").read_bytes()
    (folder / "made.h5").unlink()
    return data


class Decoders:
    """Every decoder with a few sound files of its own."""

    def __init__(self, folder: Path) -> None:
        rng, self.folder = np.random.default_rng(3), folder
        folder.mkdir()
        self.files: list[tuple[str, str, bytes]] = [("decode", "a.jpg", saved(noise(rng, "uint8", 24), "JPEG"))]
        for dtype, encoders in SOUND.items():
            self.files += [("decode", name, encode(noise(rng, dtype))) for name, encode in encoders.items()]
        self.files += [("mstar", MSTAR + "HB.015", phoenix(noise(rng, "complex64")))] * 3
        for kind, dtype in SCENES.items():
            self.files += [(kind, f"a{SUFFIXES[kind]}", scene(kind, noise(rng, dtype), folder))] * 4
        archive = io.BytesIO()
        for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
            with tarfile.open(fileobj=archive, mode="w", format=form) as tar:
                for name in ("a/1.png", "b" * 130 + "/2.png"):
                    info = tarfile.TarInfo(name)
                    info.size, info.pax_headers = 600, {"comment": "x" * 40}
                    tar.addfile(info, io.BytesIO(rng.bytes(600)))
            self.files += [("tar", "a.tar", archive.getvalue())] * 2
        self.numbers = rng.permutation(len(self.files))
        assert {kind for kind, _, _ in self.files} == {"decode", "mstar", "tar", *SCENES}

    def by_hand(self, rng: Rng, folder: Path) -> Iterator[Case]:
        for kind, name, data in self.files:
            yield f"header: sound {kind} {name}", partial(self._sound, kind, name, data)
        for name, data in refused(rng, folder / "outside").items():
            yield f"header: {name}", partial(self._refused, "decode", name, data)
        bands = next(data for kind, _, data in self.files if kind == "sicd").replace(b"NC2", b"NC099999", 1)
        yield "header: bands.nitf", partial(self._refused, "sicd", "bands.nitf", bands)
        yield "header: bomb.h5", partial(self._refused, "iceye", "bomb.h5", iceye_bomb(self.folder))
        for what, data in tar_wholes(rng, saved(noise(rng, "uint8"), "PNG")):
            yield f"header: tar with {what}", partial(self.load, "tar", "a.tar", data)

    def random(self, rng: Rng) -> Counter[str]:
        kind, name, data = self.files[int(rng.integers(len(self.files)))]
        _, _, other = self.files[int(rng.integers(len(self.files)))]
        return self.load(kind, name, mutated(data, rng, other)[1])

    def _sound(self, kind: str, name: str, data: bytes) -> Counter[str]:
        found = self.load(kind, name, data)
        assert "taken" in next(iter(found)), f"sound {name} is refused"
        return found

    def _refused(self, kind: str, name: str, data: bytes) -> Counter[str]:
        found = self.load(kind, name, data)
        assert "refused" in next(iter(found)), f"{name} is taken"
        return found

    def load(self, kind: str, name: str, data: bytes) -> Counter[str]:
        """Whatever the bytes are: pixels that can be a sample, or a reason."""
        try:
            if kind == "decode":
                pixels = decode(data, name)
                check(pixels, name)
                return Counter({f"{kind} taken": 1})
            path = self.folder / "case" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            if kind == "tar":
                found = Files(path)
                for inside in found.names:
                    assert not inside.startswith("/"), inside
                    assert ".." not in inside.split("/"), inside
                    assert len(found.read(inside)) == found.size(inside)
                return Counter({"tar taken": 1})
            corpus = sources.corpus(kind)(Files(self.folder / "case"), Options())
            taken = [one for item in corpus.items() for one in _loaded(corpus, item)]
            for one in taken:
                if isinstance(one, Record):
                    check(one.pixels, one.key) if kind == "mstar" else None
                else:
                    assert one.reason.strip(), f"{one.key} has no reason"
            assert taken, f"{name} is lost without a word"
            kept = any(isinstance(one, Record) for one in taken)
            return Counter({f"{kind} {'taken' if kept else 'refused'}": 1})
        except DataError as error:
            return Counter({f"{kind} {'refused' if error.what.strip() else 'refused without a word'}": 1})
        finally:
            shutil.rmtree(self.folder / "case", ignore_errors=True)


def _loaded(corpus: Any, item: Item | Rejected) -> Iterator[Record | Rejected]:
    yield from [item] if isinstance(item, Rejected) else corpus.load(item)


def by_hand(rng: Rng, folder: Path) -> Iterator[Case]:
    """Each dtype and kind once with every file that must be refused, as folder and as archive."""
    for kind in ("folder", *SUFFIXES):
        for dtype in DTYPES if kind == "folder" else [SCENES.get(kind, "complex64")]:
            for tarred in (False, True):
                how = f"source: {kind} of {dtype}, {'tar' if tarred else 'folder'}"
                yield how, partial(Mixture(rng, folder, kind, dtype, tarred).check, everything=True)


def random(rng: Rng, folder: Path) -> Counter[str]:
    """One packing of a random mixture; counts its hostile files."""
    kind = str(rng.choice(["folder", *SUFFIXES], p=[0.6, 0.1, 0.1, 0.1, 0.1]))
    dtype = str(rng.choice(DTYPES)) if kind == "folder" else SCENES.get(kind, "complex64")
    return Mixture(rng, folder, kind, dtype, bool(rng.random() < 0.5)).check(everything=False)


class Mixture:
    """Sound and hostile files of one source, packed inside a folder in which nothing else may change."""

    def __init__(self, rng: Rng, folder: Path, kind: str, dtype: str, tarred: bool) -> None:
        self.rng, self.kind, self.dtype, self.tarred, self.parent = rng, kind, dtype, tarred, folder
        self.sound: dict[str, tuple[bytes, str]] = {}
        self.must: dict[str, bytes] = {}  # be refused
        self.may: dict[str, bytes] = {}
        self.members: list[tuple[str, bytes]] = []

    def check(self, everything: bool) -> Counter[str]:
        with tempfile.TemporaryDirectory(dir=self.parent) as name:
            folder, scratch = Path(name), tempfile.tempdir
            for inside in ("keep/deep", "tmp", "source"):
                (folder / inside).mkdir(parents=True)
            (folder / "keep/deep/file").write_bytes(b"as it was")
            self._make(folder, everything)
            source = self._write(folder)
            before = snapshot(folder)
            tempfile.tempdir = str(folder / "tmp")
            try:
                spec = SourceSpec("s", source, kind=self.kind, incomplete=True)
                catalog = pack(folder / "out", [spec], on_error="skip")
            finally:
                tempfile.tempdir = scratch
            assert snapshot(folder) == before, "something was written outside the target"
            return self._compare(folder / "out", catalog)

    def _make(self, folder: Path, everything: bool) -> None:
        rng, outside = self.rng, folder / "outside"
        if self.kind == "folder":
            encoders = {n: e for n, e in SOUND[self.dtype].items() if not n.endswith(".015")}
            for i, (name, encode) in enumerate(encoders.items()):
                self._add(f"a/{i}-{name}", pixels := noise(rng, self.dtype), encode(pixels))
            if self.dtype == "uint8":
                data = saved(noise(rng, "uint8", 24), "JPEG")
                self._add("a/jpeg.jpg", decode(data, "a.jpg"), data)
            first = next(iter(encoders))
            for name in odd_names():
                pixels = noise(rng, self.dtype)
                name, data = f"b/{name}{Path(first).suffix}", encoders[first](pixels)
                if _text(name) == name:
                    self._add(name, pixels, data)
                else:  # no text, which JSON could not hold
                    self.must[name] = data
        else:
            for i in range(3):
                pixels = noise(rng, self.dtype, 16)
                data = phoenix(pixels) if self.kind == "mstar" else scene(self.kind, pixels, folder / "tmp")
                self._add(self._name(f"0{i}"), decode(data, "a.015") if self.kind == "mstar" else pixels, data)
        bad = [*refused(rng, outside).items(), ("bomb.h5", iceye_bomb(folder / "tmp"))]
        for name, data in bad if everything else (bad[i] for i in rng.choice(len(bad), 8, replace=False)):
            self.must[f"h/{name}" if self.kind == "folder" else self._name(f"h-{name}")] = data
        names = sorted(self.sound)
        for i in range(12):
            name = names[int(rng.integers(len(names)))]
            data = mutated(self.sound[name][0], rng, self.sound[names[0]][0])[1]
            suffix = "".join(Path(name).suffixes[-1:])
            self.may[f"m/{i}{suffix}" if self.kind == "folder" else self._name(f"m-{i}")] = data
        if self.tarred:
            self.members = list(tar_members(rng, self.sound[names[0]][0], outside))

    def _name(self, stem: str) -> str:
        return (MSTAR if self.kind == "mstar" else "") + stem + SUFFIXES[self.kind]

    def _add(self, name: str, pixels: np.ndarray, data: bytes) -> None:
        self.sound[name] = data, content_hash(pixels)

    def _write(self, folder: Path) -> Path:
        everything = {name: data for name, (data, _) in self.sound.items()} | self.must | self.may
        if not self.tarred:
            for name, data in everything.items():
                path = folder / "source" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            return folder / "source"
        names, raw = list(everything), []
        for name in [*names, names[0]]:  # the first one twice: the later stands for it
            info = tarfile.TarInfo(name)
            info.size = len(everything[name])
            head = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
            raw.append(head + everything[name] + bytes(-info.size % 512))
        self.rng.shuffle(raw)  # type: ignore[arg-type]
        for _, data in self.members:
            raw.insert(int(self.rng.integers(len(raw) + 1)), data)
        (folder / "source.tar").write_bytes(b"".join(raw) + bytes(1024))
        return folder / "source.tar"

    def _compare(self, out: Path, catalog: Any) -> Counter[str]:
        lines = [json.loads(line) for line in (out / REJECTED).read_text(encoding="utf-8").split("\n")[:-1]]
        listed = {line["file"].partition("@")[0] for line in lines}
        assert all(line["reason"].strip() for line in lines)
        table = catalog.table(["from", "sha256"])
        packed = dict(zip(table["sha256"].to_pylist(), table["from"].to_pylist(), strict=True))
        origins = {name.partition("@")[0] for name in table["from"].to_pylist()}
        lost = {name for name, (_, sha256) in self.sound.items() if sha256 not in packed}
        assert not lost, f"lost: {sorted(lost)}; {[line for line in lines if line['file'] in lost]}"
        assert not origins - set(self.sound) - set(self.may), origins - set(self.sound) - set(self.may)
        unsaid = {_text(name) for name in [*self.must, *self.may]} - listed - {_text(name) for name in origins}
        assert not unsaid, f"left out without a word: {sorted(unsaid)}"
        refusals = [line for line in lines if "archive" in line["reason"]]
        assert len(refusals) == len(self.members) + self.tarred, [line["file"] for line in refusals]
        catalog.verify()
        reader = Reader(catalog)
        natives = [reader.native(i) for i in range(len(reader))]
        assert {content_hash(p[0] if len(p) == 1 else p) for p in natives} == set(packed)
        assert {p.suffix for p in out.iterdir()} == {".json", ".jsonl", ".tar", ".idx", ".parquet"}
        taken = len(origins & set(self.may))
        return Counter({
            "sound files packed": len(self.sound), "damaged files still valid": taken,
            "hostile files refused": len(self.must) + len(self.may) - taken, "members refused": len(refusals),
        })  # fmt: skip


def _text(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()


def snapshot(folder: Path) -> dict[str, Any]:
    """Everything in a folder but `out`: content, link target and time of change."""
    found: dict[str, Any] = {}
    for root, folders, names in os.walk(folder):
        if Path(root) == folder and "out" in folders:
            folders.remove("out")
        for name in [*folders, *names]:
            path = Path(root) / name
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            changed = path.lstat().st_mtime_ns if path.name != "tmp" else 0
            found[str(path)] = path.lstat().st_mode, content, changed
    return found
