"""The shard side of the campaign (tests/hostile.py): a small catalog, lies about it, and what reading says to them."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hostile_files import EDGES, Rng, mutated, noise

from shards import catalog as catalogs
from shards import index as indexes
from shards import metadata
from shards.catalog import FILE_NAME
from shards.errors import DataError
from shards.pack import Record, SourceSpec, pack
from shards.reader import CorruptSample, Reader
from shards.stream import Stream

Case = tuple[str, Callable[[], Counter[str]]]
LIES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 10**30, 0.5, 1e308, float("nan"), float("inf"), "", "x", "../x", "/etc/passwd",
    "\0", "\ud800", [], [None], [[1]], {}, {"x": 1}, "9" * 5000,
)  # fmt: skip


class Packed:
    """A catalog of three sources (8-bit with classes, zstd complex, pairs), known sample by sample."""

    def __init__(self, folder: Path) -> None:
        self.folder, rng = folder, np.random.default_rng(7)

        def records(dtype: str, count: int, classes: str = "") -> list[Record]:
            labels = [classes[i % len(classes)] if classes else None for i in range(count)]
            return [
                Record(noise(rng, dtype, 10), f"{i}.png", label, {"band": "X", "spacing": 0.5, "note": "n" * i})
                for i, label in enumerate(labels)
            ]

        specs = [
            SourceSpec("one", split="train", records=records("uint8", 14, "abc")),
            SourceSpec("two", records=records("complex64", 10), codec="zstd"),
            SourceSpec("three", records=records("int16", 9)),
        ]
        pack(folder, specs, shard_bytes=3000)
        self.catalog = catalogs.load(folder)
        self.value = json.loads((folder / FILE_NAME).read_bytes())
        self.files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        self.shard_of: dict[str, str] = {}
        reader, self.samples, number = Reader(self.catalog), {}, 0
        for source in self.catalog.sources:
            for shard in source.shards:
                for _ in range(shard.samples):
                    sample = reader[number]
                    label = self.catalog.classes[sample.label] if sample.label >= 0 else None
                    self.samples[sample.key] = (sample.pixels, label)
                    self.shard_of[sample.key] = Path(shard.name).stem
                    number += 1
        self.tables = {s.name: self.catalog.table(metadata.schema().names, s) for s in self.catalog.sources}

    # What must hold

    def check(self, changes: dict[str, bytes], told: bool = False) -> Counter[str]:
        """Read everything after these changes; `told`: hashes were made to agree, so that other pixels are no error."""
        changes = {name: data for name, data in changes.items() if data != self.files[name]}
        for name, data in changes.items():
            (self.folder / name).write_bytes(data)
        try:
            return Counter({self._read(set(changes), told): 1})
        finally:
            for name in changes:
                (self.folder / name).write_bytes(self.files[name])

    def _read(self, changed: set[str], told: bool) -> str:
        lied = told or FILE_NAME in changed
        try:
            catalog = catalogs.load(self.folder)
        except DataError as error:
            return self._refused("catalog", error)
        outcome = self._samples(catalog, changed, told)
        self._stream(catalog, told)
        self._tables(catalog, lied)
        try:
            catalog.verify()
            assert lied or not changed, f"verify finds nothing wrong with {sorted(changed)}"
        except DataError as error:
            self._refused("verify", error)
        return outcome

    def _samples(self, catalog: catalogs.Catalog, changed: set[str], told: bool) -> str:
        try:
            reader = Reader(catalog)
        except DataError as error:
            return self._refused("open", error)
        valid: set[str] = set()
        found: Counter[str] = Counter()
        for number in range(min(len(reader), 100)):
            try:
                sample = reader[number]
            except DataError as error:
                found[self._refused("sample" if isinstance(error, CorruptSample) else "shard", error)] += 1
                continue
            self._same(sample.pixels, sample.key, told)
            if not told and FILE_NAME not in changed:
                label = catalog.classes[sample.label] if sample.label >= 0 else None
                assert label == self.samples[sample.key][1], f"{sample.key} has become {label}"
            valid.add(sample.key)
        if FILE_NAME not in changed:
            whole = {key for key, shard in self.shard_of.items() if not any(name.startswith(shard) for name in changed)}
            assert whole <= valid, f"{sorted(whole - valid)} lost, although their shard is whole"
        return f"{min(found)}, others valid" if found and valid else min(found, default="all samples valid")

    def _same(self, pixels: np.ndarray, key: str, told: bool) -> None:
        if told:
            return
        assert key in self.samples, f"a sample {key} that was never packed"
        known = self.samples[key][0]
        assert (pixels.dtype, pixels.shape) == (known.dtype, known.shape), f"{key} has another shape"
        assert pixels.tobytes() == known.tobytes(), f"{key} has other pixels"

    def _stream(self, catalog: catalogs.Catalog, told: bool) -> None:
        try:
            stream = Stream(catalog, seed=0, lanes=2, block_shards=2, global_batch=4, micro_batch=4, stop=24)
            for batch in stream:
                for pixels, number in zip(batch.pixels, batch.sample_id.tolist(), strict=True):
                    self._same(pixels.numpy(), stream.reader[number].key, told)
        except DataError as error:
            self._refused("stream", error)

    def _tables(self, catalog: catalogs.Catalog, lied: bool) -> None:
        for source in catalog.sources:
            try:
                table = catalog.table(metadata.schema().names, source)
            except DataError as error:
                self._refused("table", error)
            else:
                assert lied or table.equals(self.tables[source.name]), f"other metadata of {source.name}"

    def _refused(self, where: str, error: DataError) -> str:
        assert error.what.strip(), f"no reason given ({where})"
        return f"refused at {where}"

    # What is done to it

    def by_hand(self, rng: Rng) -> Iterator[Case]:
        """Every kind of lie once."""
        yield "shard: none", lambda: self.check({})
        tars = [name for name in self.files if name.endswith(".tar")]
        for suffix in (".tar", ".idx", ".parquet"):
            names = [name for name in self.files if name.endswith(suffix)]
            pairs = zip(names, [*names[1:], names[0]], strict=True)
            for first, second in pairs:
                yield f"shard: {first} for {second}", lambda a=first, b=second: self.check({b: self.files[a]})
        for first, second in pairwise(tars):
            yield (
                f"shard: {first} and its index for {second}",
                lambda a=first, b=second: self.check({n: self.files[m] for m, n in ((a, b), (_idx(a), _idx(b)))}),
            )
        for name in self.files:
            yield f"shard: {name} empty", lambda name=name: self.check({name: b""})
            yield f"shard: {name} cut", lambda name=name: self.check({name: self.files[name][:-1]})
            yield f"shard: {name} longer", lambda name=name: self.check({name: self.files[name] + b"\0"})
        for tar in tars[::2]:
            for at in range(3):  # header of the first array, of its pixels, of its JSON
                yield f"shard: {tar} header {at}", lambda tar=tar, at=at: self.lie_in_tar(rng, tar, at)
        for name in indexes.row_dtype(16).names or ():
            for told in (False, True):
                yield f"shard: index {name}", lambda name=name, told=told: self.lie_in_index(rng, name, told)
        for path in self._leaves(self.value):
            for _ in range(2):
                yield f"shard: catalog {path}", lambda path=path: self.lie_in_catalog(rng, path)
        for what in ("rows", "column", "type", "order", "nothing"):
            for told in (False, True):
                yield f"shard: metadata {what}", lambda what=what, told=told: self.lie_in_metadata(rng, what, told)

    def random(self, rng: Rng) -> Counter[str]:
        """One case of damage or of a lie."""
        names = sorted(self.files)
        name, told = names[int(rng.integers(len(names)))], bool(rng.random() < 0.5)
        if rng.random() < 0.5:
            _, data = mutated(self.files[name], rng, self.files[names[int(rng.integers(len(names)))]])
            if rng.random() < 0.5:  # of the old size, which is the first thing that is compared
                data = data[: len(self.files[name])].ljust(len(self.files[name]), b"\0")
            changes = {name: data}
            return self.check(self._told(changes) if told else changes, told)
        if name.endswith(".tar"):
            return self.lie_in_tar(rng, name, int(rng.integers(6)), told)
        if name.endswith(".idx"):
            fields = indexes.row_dtype(16).names or ()
            return self.lie_in_index(rng, fields[int(rng.integers(len(fields)))], told)
        if name.endswith(".parquet"):
            what = str(rng.choice(["rows", "column", "type", "order", "nothing"]))
            return self.lie_in_metadata(rng, what, told)
        paths = self._leaves(self.value)
        return self.lie_in_catalog(rng, paths[int(rng.integers(len(paths)))])

    def lie_in_tar(self, rng: Rng, tar: str, member: int, told: bool = False) -> Counter[str]:
        """Another size, type, name or content of a member, with a header whose checksum is right."""
        data = bytearray(self.files[tar])
        with tarfile.open(fileobj=io.BytesIO(bytes(data))) as archive:
            infos = archive.getmembers()
        info = infos[member % len(infos)]
        at, block = info.offset, bytearray(data[info.offset : info.offset + 512])
        what = int(rng.integers(5))
        if what == 0:
            value = int(rng.choice([0, 1, 511, 512, 513, 10**6, 2**33 - 1]))
            block[124:136] = b"%011o\0" % value if rng.random() < 0.7 else (2**96 - 1 - value).to_bytes(12, "big")
        elif what == 1:
            block[156:157] = bytes([rng.choice([*b"123456xgLKSV7"])])
        elif what == 2:
            block[:100] = [b"../x.npy", b"/x.npy", b"x" * 100, b"", infos[0].name.encode()][
                int(rng.integers(5))
            ].ljust(100, b"\0")  # fmt: skip
        else:
            start, size = info.offset_data, max(info.size, 1)
            _, body = mutated(bytes(data[start : start + size]), rng)
            data[start : start + size] = body[:size].ljust(size, b" ")
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        data[at : at + 512] = block
        changes = {tar: bytes(data)}
        if told:  # the index of what now stands there, if anything does
            (self.folder / "told.tar").write_bytes(data)
            try:
                rows = indexes.build(self.folder / "told.tar", ["a", "b", "c"])
                changes[_idx(tar)] = indexes.encode(rows)
            except DataError:
                pass
            finally:
                (self.folder / "told.tar").unlink()
        return self.check(self._told(changes) if told else changes, told)

    def lie_in_index(self, rng: Rng, field: str, told: bool) -> Counter[str]:
        """A row that says something else."""
        names = [name for name in self.files if name.endswith(".idx")]
        name = names[int(rng.integers(len(names)))]
        rows = indexes.read(self.folder / name).copy()
        row = int(rng.integers(len(rows)))
        if field == "key":
            rows[field][row] = [b"", b"../../x", b"a.b", b"\xff", rows["key"][0]][int(rng.integers(5))]
        elif rng.random() < 0.3:
            rows[field][row] = rows[field][(row + 1) % len(rows)]
        else:
            kind = rows[field].dtype
            low = np.iinfo(kind).min
            value = EDGES[int(rng.integers(len(EDGES)))] % (int(np.iinfo(kind).max) + 1)
            rows[field][row] = low if rng.random() < 0.1 else value
        changes = {name: indexes.encode(rows)}
        return self.check(self._told(changes) if told else changes, told)

    def lie_in_catalog(self, rng: Rng, path: tuple[Any, ...]) -> Counter[str]:
        """Another value, none, or one more, at a place of `catalog.json`."""
        value = copy.deepcopy(self.value)
        place = value
        for step in path[:-1]:
            place = place[step]
        what = rng.random()
        if what < 0.1:
            del place[path[-1]]
        elif what < 0.15 and isinstance(place, dict):
            place[str(rng.choice(["root", "rows", "x", "__class__"]))] = 1
        else:
            place[path[-1]] = LIES[int(rng.integers(len(LIES)))]
        return self.check({FILE_NAME: json.dumps(value).encode()})

    def lie_in_metadata(self, rng: Rng, what: str, told: bool) -> Counter[str]:
        """A Parquet file that is sound but another one."""
        names = [name for name in self.files if name.endswith(".parquet")]
        name = names[int(rng.integers(len(names)))]
        table = pq.read_table(self.folder / name)
        if what == "rows":
            table = pa.concat_tables([table, table])
        elif what == "column":
            table = table.drop_columns([table.column_names[int(rng.integers(table.num_columns))]])
        elif what == "type":
            at = int(rng.integers(table.num_columns))
            values = pa.array([[b"\xff"]] * len(table)) if rng.random() < 0.5 else pa.array(range(len(table)))
            table = table.set_column(at, table.column_names[at], values)
        elif what == "order":
            table = table.take(np.arange(len(table))[::-1].copy())
        else:
            table = table.slice(0, 0)
        with pq.ParquetFile(self.folder / name) as file:
            size = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        buffer = io.BytesIO()
        with pq.ParquetWriter(buffer, table.schema) as writer:
            at = 0
            for rows in size if len(table) else ():
                writer.write_table(table.slice(at, rows))
                at += rows
        changes = {name: buffer.getvalue()}
        return self.check(self._told(changes) if told else changes, told)

    def _told(self, changes: dict[str, bytes]) -> dict[str, bytes]:
        """The same changes, and a catalog that states their sizes and hashes."""
        value = copy.deepcopy(self.value)

        def tell(entry: dict[str, Any], name: str, prefix: str = "") -> None:
            if name in changes:
                entry[f"{prefix}bytes"] = len(changes[name])
                entry[f"{prefix}sha256"] = hashlib.sha256(changes[name]).hexdigest()

        for source in value["sources"]:
            tell(source["metadata"], source["metadata"]["name"])
            for shard in source["shards"]:
                tell(shard, shard["name"])
                tell(shard, _idx(shard["name"]), "index_")
        return {FILE_NAME: json.dumps(value).encode(), **changes}

    def _leaves(self, value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """Every place of `catalog.json`; of lists the first two."""
        found = [path] if path else []
        pairs = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
        for step, inner in pairs:
            found += self._leaves(inner, (*path, step))
        return found


def _idx(tar: str) -> str:
    return str(Path(tar).with_suffix(".idx"))
