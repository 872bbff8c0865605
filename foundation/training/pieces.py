"""The tensors of a checkpoint: a safetensors file per process, and an index of all; read and written by torch's DCP.

DCP decides who writes what and who reads which part of it. `index.json` says where everything is, so that nobody opens
files that hold nothing for him:

    {"files": [NAME, ...], "tensors": {NAME: [dtype, shape, [[file, offsets, shape of the piece, first byte], ...]]}}
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from foundation.training.places import Bytes, Place

# It is only read from.
warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
INDEX = "index.json"
DTYPES = {  # as safetensors calls them
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Piece(NamedTuple):
    """Where a part of a tensor is."""

    file: str
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""


class Writer(StorageWriter):
    """Writes what this process holds into one file of `folder`; `files` gets bytes and sha256 of all it wrote."""

    def __init__(self, folder: Place) -> None:
        self.folder, self.files = folder, dict[str, dict[str, Any]]()

    def reset(self, checkpoint_id: str | PathLike[str] | None = None) -> None:
        """A writer is for one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to prepare."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As planned."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """A name for each process's file."""
        name = f"-of-{len(plans):05d}.safetensors"
        return [dataclasses.replace(plan, storage_data=f"{rank:05d}{name}") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's file, unless nothing of any tensor is here."""
        rows = []
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            assert item.tensor_data is not None
            if tensor.numel() or not item.tensor_data.size.numel():  # a short tensor leaves some processes nothing
                rows.append((item.index, tensor.detach().cpu().contiguous()))
        rows.sort(key=lambda row: (-row[1].element_size(), row[0].fqn))  # keeps every piece aligned
        results = []
        if rows:
            header, starts = _header(rows)
            self._write(plan.storage_data, [header, *(_bytes(tensor) for _, tensor in rows)])
            for (index, tensor), start in zip(rows, starts, strict=True):
                data = (plan.storage_data, list(tensor.shape), start)
                results.append(WriteResult(index, tensor.nbytes, data))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, on the first process."""
        tensors: dict[str, Any] = {}
        for name, facts in metadata.state_dict_metadata.items():
            assert isinstance(facts, TensorStorageMetadata)
            tensors[name] = [NAMES[facts.properties.dtype], list(facts.size), []]
        files = sorted({result.storage_data[0] for each in results for result in each})
        for result in (result for each in results for result in each):
            file, shape, start = result.storage_data
            row = [files.index(file), list(result.index.offset or ()), shape, start]
            tensors[result.index.fqn][2].append(row)
        text = json.dumps({"files": files, "tensors": tensors}, separators=(",", ":"))
        self._write(INDEX, [text.encode()])

    def _write(self, name: str, parts: list[Bytes]) -> None:
        sha = hashlib.sha256()
        for part in parts:
            sha.update(part)
        (self.folder / name).write(parts)
        size = sum(len(part) for part in parts)
        self.files[name] = {"bytes": size, "sha256": sha.hexdigest()}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | PathLike[str]) -> bool:
        """Any place."""
        return True


def _header(rows: Iterable[tuple[MetadataIndex, Tensor]]) -> tuple[bytes, list[int]]:
    """The first bytes of a safetensors file, and where each tensor begins in it. Raises ValueError."""
    facts: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places, at = {}, 0
    for index, tensor in rows:
        if index.fqn in facts:
            raise ValueError(f"this process holds two pieces of {index.fqn}")
        if tensor.dtype not in NAMES:
            raise ValueError(f"{index.fqn} is of {tensor.dtype}, which checkpoints do not hold")
        span = [at, at + tensor.nbytes]
        facts[index.fqn] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        places[index.fqn] = {"saved_offsets": list(index.offset or ())}
        at = span[1]
    facts["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(places)  # torch's own reader of such files looks for it
    text = json.dumps(facts, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    starts = [8 + len(text) + each["data_offsets"][0] for name, each in facts.items() if name != "__metadata__"]
    return len(text).to_bytes(8, "little") + text, starts


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class Reader(StorageReader):
    """Reads from `folder` what this process needs, by parts of files."""

    def __init__(self, folder: Place) -> None:
        self.folder, self.pieces = folder, dict[MetadataIndex, Piece]()

    def reset(self, checkpoint_id: str | PathLike[str] | None = None) -> None:
        """A reader is for one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the index says. Raises OSError, DataError, ValueError, KeyError or TypeError."""
        index = json.loads((self.folder / INDEX).read())
        if any(not re.fullmatch(r"\d{5,}-of-\d{5,}\.safetensors", file) for file in index["files"]):
            raise ValueError("the index names files that no save writes")
        facts: dict[str, Any] = {}
        for name, (dtype, size, rows) in index["tensors"].items():
            chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape)) for _, offsets, shape, _ in rows]
            if sum(chunk.sizes.numel() for chunk in chunks) != torch.Size(size).numel():
                raise ValueError(f"the pieces of {name} do not make the whole")
            facts[name] = TensorStorageMetadata(TensorProperties(DTYPES[dtype]), torch.Size(size), chunks)
            for file, offsets, shape, start in rows:
                self.pieces[MetadataIndex(name, offsets)] = Piece(index["files"][file], tuple(shape), start)
        return Metadata(facts)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The index has been read."""
        self.facts: Mapping[str, Any] = metadata.state_dict_metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As planned."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As planned."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the tensors, file by file; of a piece only the rows that are needed are read."""
        files: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            files.setdefault(self.pieces[item.storage_index].file, []).append(item)
        for file, items in files.items():
            items.sort(key=lambda item: self.pieces[item.storage_index].start)
            data = (self.folder / file).spans([self._span(item) for item in items])
            for item, content in zip(items, data, strict=True):
                self._fill(item, content, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _span(self, item: ReadItem) -> tuple[int, int]:
        """The bytes of the rows that an item asks for."""
        piece = self.pieces[item.storage_index]
        width = self._dtype(item).itemsize * torch.Size(piece.shape[1:]).numel()
        first, count = (item.storage_offsets[0], item.lengths[0]) if piece.shape else (0, 1)
        return piece.start + first * width, piece.start + (first + count) * width

    def _fill(self, item: ReadItem, content: bytes, planner: LoadPlanner) -> None:
        target = planner.resolve_tensor(item).detach()
        if content:
            rest = self.pieces[item.storage_index].shape[1:]
            rows = torch.frombuffer(content, dtype=self._dtype(item)).view(-1, *rest)
            for dimension, length in enumerate(item.lengths[1:], start=1):
                rows = rows.narrow(dimension, item.storage_offsets[dimension], length)
            target.copy_(rows.reshape(target.shape))
        planner.commit_tensor(item, target)

    def _dtype(self, item: ReadItem) -> torch.dtype:
        dtype = self.facts[item.storage_index.fqn].properties.dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | PathLike[str]) -> bool:
        """Any place."""
        return True
