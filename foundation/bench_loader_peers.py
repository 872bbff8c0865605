"""Other people's loaders, and how any loader is measured: the child process of `foundation bench loader`.

Runs as a script in any Python that has torch, Pillow, NumPy and the peer (`PYTHON bench_loader_peers.py NAME`), so it
imports nothing of this project. Every line on stdin is a task in JSON, every answer a line in JSON on stdout.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

BATCH = 64
SHARDS = 8  # tars of the plain WebDataset: enough for every worker to have some
Batches = Iterable[Sequence[Tensor] | Tensor]


def augmented(image: Image.Image, size: int) -> Tensor:
    """The usual augmentation with Pillow: fp32 [1, size, size]; size 0: the chip itself, uint8 [1, H, W]."""
    if size:
        width, height = image.size
        for _ in range(10):
            area, ratio = random.uniform(0.2, 1) * width * height, np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
            wide, high = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if wide <= width and high <= height:
                break
        else:
            wide, high = width, height
        left, top = random.randint(0, width - wide), random.randint(0, height - high)
        image = image.crop((left, top, left + wide, top + high)).resize((size, size), Image.Resampling.BICUBIC)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = ImageEnhance.Contrast(image).enhance(random.uniform(0.5, 1.5))
    pixels = torch.from_numpy(np.array(image))[None]
    return pixels.float().div_(255) if size else pixels


def opened(data: bytes) -> Image.Image:
    """The image in the bytes of a PNG file."""
    return Image.open(io.BytesIO(data)).convert("L")


class Folder(Dataset[Tensor]):
    """A file per chip, in a folder per class."""

    def __init__(self, root: Path, size: int) -> None:
        self.files, self.size = [str(p) for p in sorted(root.rglob("*.png"))], size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Tensor:
        with Image.open(self.files[number]) as image:
            return augmented(image.convert("L"), self.size)


def folder(root: Path, workers: int, size: int) -> Batches:
    """DataLoader over files, shuffled."""
    return DataLoader(Folder(root, size), BATCH, shuffle=True, num_workers=workers)


def webdataset(root: Path, workers: int, size: int) -> Batches:
    """WebDataset's usual pipeline: shards shuffled, samples through a buffer of 1,000."""
    wds = importlib.import_module("webdataset")
    files = [str(p) for p in sorted(root.glob("*.tar"))]
    samples = wds.WebDataset(files, shardshuffle=len(files), seed=0).shuffle(1000)
    chips = samples.map(lambda sample: augmented(opened(sample["png"]), size))
    return wds.WebLoader(chips.batched(BATCH, collation_fn=torch.stack), batch_size=None, num_workers=workers)


def streaming(root: Path, workers: int, size: int) -> Batches:
    """MosaicML streaming, PNG or raw arrays."""
    mosaic = importlib.import_module("streaming")
    mosaic.base.util.clean_stale_shared_memory()
    chips = mosaic.StreamingDataset(local=str(root), shuffle=True, batch_size=BATCH, num_canonical_nodes=1)
    together = partial(stacked, size=size)
    return mosaic.StreamingDataLoader(chips, batch_size=BATCH, num_workers=workers, collate_fn=together)


def litdata(root: Path, workers: int, size: int) -> Batches:
    """LitData, PNG bytes or raw tensors."""
    lit = importlib.import_module("litdata")
    chips = lit.StreamingDataset(str(root), shuffle=True)
    together = partial(stacked, size=size)
    return lit.StreamingDataLoader(chips, batch_size=BATCH, num_workers=workers, collate_fn=together)


def stacked(found: list[Any], size: int) -> Tensor:
    """A batch from what a format stored."""
    return torch.stack([chip(one["image"] if isinstance(one, dict) else one, size) for one in found])


def chip(found: Any, size: int) -> Tensor:
    """What a format stored → the chip: PNG bytes, an image, an array or a tensor."""
    if isinstance(found, bytes | memoryview):
        return augmented(opened(bytes(found)), size)
    if isinstance(found, Image.Image):
        return augmented(found, size)
    found = found if isinstance(found, Tensor) else torch.from_numpy(found)
    return augmented(Image.fromarray(found[0].numpy()), size) if size else found


def write_webdataset(files: list[Path], root: Path) -> None:
    """Plain WebDataset tars of the PNG files and their classes."""
    wds = importlib.import_module("webdataset")
    for number in range(SHARDS):
        with wds.TarWriter(str(root / f"{number:03d}.tar")) as tar:
            for file in files[number::SHARDS]:
                label = file.parent.name
                tar.write({"__key__": f"{label}-{file.stem}", "png": file.read_bytes(), "cls": label})


def write_streaming(files: list[Path], root: Path, raw: bool) -> None:
    """MDS shards."""
    height, width = np.array(Image.open(files[0])).shape
    kind = f"ndarray:uint8:1,{height},{width}" if raw else "png"
    with importlib.import_module("streaming").MDSWriter(out=str(root), columns={"image": kind, "class": "str"}) as out:
        for file in files:
            image = Image.open(file)
            out.write({"image": np.array(image)[None] if raw else image, "class": file.parent.name})


def stored(file: Path, raw: bool) -> Any:
    """What LitData keeps of a file."""
    return torch.from_numpy(np.array(Image.open(file))[None]) if raw else file.read_bytes()


def write_litdata(files: list[Path], root: Path, raw: bool) -> None:
    """LitData chunks."""
    cache = importlib.import_module("litdata.streaming.cache").Cache(str(root), chunk_bytes=64 << 20)
    for number, file in enumerate(files):
        cache[number] = stored(file, raw)
    cache.done()
    cache.merge()


Open = Callable[[Path, int, int], Batches]
# name → (module it needs, opener, writer)
PEERS: dict[str, tuple[str, Open, Callable[[list[Path], Path], None] | None]] = {
    "folder": ("PIL", folder, None),
    "webdataset": ("webdataset", webdataset, write_webdataset),
    "streaming-png": ("streaming", streaming, lambda files, root: write_streaming(files, root, raw=False)),
    "streaming-raw": ("streaming", streaming, lambda files, root: write_streaming(files, root, raw=True)),
    "litdata-png": ("litdata", litdata, lambda files, root: write_litdata(files, root, raw=False)),
    "litdata-raw": ("litdata", litdata, lambda files, root: write_litdata(files, root, raw=True)),
}


def cpu_seconds() -> float:
    """CPU time of this process and of its children, those that have ended included."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    running = [file.read_text() for pid in children() for file in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return sum(u.ru_utime + u.ru_stime for u in used) + sum(int(line.split()[0]) for line in running) / 1e9


def one_pass(batches: Batches) -> dict[str, float]:
    """CPU and wall seconds from the first batch to the end of the last worker, and the samples that came between."""
    iterator = iter(batches)
    next(iterator)
    cpu, wall = cpu_seconds(), time.perf_counter()
    samples = sum(len(batch) for batch in iterator)
    del batches, iterator
    return {"samples": samples, "cpu": cpu_seconds() - cpu, "wall": time.perf_counter() - wall}


def content(batches: Batches) -> dict[str, Any]:
    """How many chips came and a hash of the multiset of their pixels."""
    found = sorted(hashlib.sha256(image.numpy().tobytes()).hexdigest() for batch in batches for image in batch)
    return {"samples": len(found), "digest": hashlib.sha256("".join(found).encode()).hexdigest()}


def kind(batches: Batches) -> dict[str, Any]:
    """Shape and dtype of the first batch."""
    first = next(iter(batches))
    first = first if isinstance(first, Tensor) else torch.stack(list(first))
    return {"shape": list(first.shape), "dtype": str(first.dtype)}


def memory(pid: int) -> dict[str, float]:
    """Megabytes of a process: private (uss), shared ones divided by their users (pss), and all that is resident."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    size = {line.split(":")[0]: int(line.split()[1]) * 1024 / 1e6 for line in lines}
    return {"uss": size["Private_Clean"] + size["Private_Dirty"], "pss": size["Pss"], "rss": size["Rss"]}


def children() -> list[int]:
    """Process ids of the children of this process."""
    return [int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]


def added_memory(open_batches: Callable[[], Batches], skip: int) -> float:
    """Megabytes that a loader adds to the memory of this process and its children together, after `skip` batches."""
    next(iter(open_batches()))  # imports are no part of it
    before = memory(os.getpid())["pss"]
    iterator = iter(open_batches())
    for _ in islice(iterator, skip):
        pass
    return sum(memory(pid)["pss"] for pid in (os.getpid(), *children())) - before


def resume(open_peer: Open, root: Path, position: int) -> dict[str, Any]:
    """Seconds from nothing to the batch at `position`: from a saved state or, without one, by reading up to it."""
    batches: Any = open_peer(root, 0, 0)
    seeks, skip = hasattr(batches, "load_state_dict"), position // BATCH
    iterator = iter(batches)
    for _ in range(skip if seeks else 0):
        next(iterator)
    state = batches.state_dict() if seeks else None
    del iterator
    start = time.perf_counter()
    batches = open_peer(root, 0, 0)
    if seeks:
        batches.load_state_dict(state)
    next(islice(iter(batches), 0 if seeks else skip, None))
    return {"how": "seeks" if seeks else "replays", "seconds": time.perf_counter() - start}


def answer(open_peer: Open, task: dict[str, Any]) -> dict[str, Any]:
    """Do one task."""
    root = Path(task["root"])
    what, workers, size = task["do"], task.get("workers", 0), task.get("size", 0)
    if what == "first":
        next(iter(open_peer(root, workers, size)))
        return {"seconds": time.time() - task["spawned"]}
    if what == "pass":
        return one_pass(open_peer(root, workers, size))
    if what == "content":
        return content(open_peer(root, workers, 0))
    if what == "kind":
        return kind(open_peer(root, workers, size))
    if what == "memory":
        return {"added": added_memory(lambda: open_peer(root, workers, size), task["skip"])}
    return resume(open_peer, root, task["position"])


def tasks() -> Iterator[tuple[dict[str, Any], Callable[[dict[str, Any]], None]]]:
    """The tasks on stdin, each with the function that answers it; what libraries print goes to stderr."""
    torch.set_num_threads(1)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(value: dict[str, Any]) -> None:
        out.write(json.dumps(value) + "\n")
        out.flush()

    for line in sys.stdin:
        yield json.loads(line), reply


def main() -> None:
    """Answer tasks for the peer that the first argument names."""
    module, open_peer, write = PEERS[sys.argv[1]]
    for task, reply in tasks():
        try:
            if task["do"] == "write":
                importlib.import_module(module)
                Path(task["root"]).mkdir(parents=True, exist_ok=True)
                if write:
                    write(sorted(Path(task["source"]).rglob("*.png")), Path(task["root"]))
                reply({})
            else:
                reply(answer(open_peer, task))
        except Exception as error:
            reply({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
