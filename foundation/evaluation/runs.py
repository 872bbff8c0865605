"""Scores of a run or checkpoint: load it, evaluate beside its controls, keep the scores, redraw the report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from foundation.config import Config
from foundation.errors import CheckpointError, ConfigError, DataError
from foundation.evaluation import leakage, predictions
from foundation.evaluation.artifacts import figures, publish
from foundation.evaluation.panels import SCORES, read_scores, write_run_report
from foundation.evaluation.protocols import RANDOM, Options, Report, Task
from foundation.evaluation.scores import Score, to_json, to_markdown
from foundation.evaluation.sides import Chosen, choose
from foundation.evaluation.suite import measure
from foundation.files import write_whole
from foundation.interchange import load_encoder, random_encoder
from foundation.training import checkpoint
from foundation.training.data import training_catalog
from shards.catalog import Catalog
from shards.redaction import bare

FOREIGN = (".pth", ".pt", ".ckpt", ".safetensors", ".bin")


def evaluate_run(path: Path, data: str, protocol: str, options: Options | None = None, **how: Any) -> list[Score]:
    """`judge_run`, after which all scores of the run are returned: those that were there, and the new ones."""
    judge_run(path, data, protocol, options, **how)
    return read_scores(run_folder(path))


def judge_run(
    path: Path,
    data: str,
    protocol: str,
    options: Options | None = None,
    *,
    test: str | None = None,
    split: Path | None = None,
    allow_shared_groups: bool = False,
    crop: int | None = None,
    device: str = "cpu",
    averaged: bool = False,
    best: bool = False,
    controls: bool = True,
    report: bool = True,
    progress: Report | None = None,
) -> list[Score]:
    """Judge the encoder at `path` (run folder or checkpoint) on the catalog `data`, train split against test split.

    `split` names a split file that says which images of the catalogs these are; `averaged` takes the running average of
    the weights, `best` the checkpoint that the probe found best instead of the newest. Every score records its weights
    (samples seen), data, split and whether the encoder was pretrained on test images. The scores join those in the
    run's `scores.json` and `.md`, replacing the same measurement, the answers those in `predictions`; the run's report
    (if `report`) is brought up to date and so is, below its run in MLflow, one for each protocol. Without `controls`
    only the untrained encoder stands beside. Returns the new scores.
    """
    options = options or Options()
    refuse_foreign(path)
    place = checkpoint.resolve(path, best)
    encoder, config = load_encoder(place, device, averaged)
    state = checkpoint.load(place, None)
    chosen = choose(data, test, config.data, split, allow_shared_groups=allow_shared_groups)
    pictures, run = training_data(config), run_folder(path)
    _, draws = chosen.keep(run)
    task = Task(chosen.train, chosen.test, config.data.image_size, crop, device=device, report=progress, draws=draws)
    found = measure(
        {"pretrained": encoder, RANDOM: random_encoder(config, config.seed, device)},
        task,
        protocol,
        options,
        controls=controls,
    )
    origin = {
        **provenance(run, state, chosen, data, split, pictures, averaged=averaged, allowed=allow_shared_groups),
        "random_init": f"one initialisation, seed {config.seed}; the interval does not cover it",
    }
    facts: tuple[object, ...] = (origin["weights"], origin["data"], f"train {chosen.train_data[:8]}", f"crop {crop}")
    facts += (f"{config.data.image_size} px", *([f"{options.epochs} epochs"] if protocol == "finetune" else []))
    text = ", ".join(map(str, facts))
    added = {**origin, "measurement": text}
    new = [replace(one, settings={**one.settings, **added}) for each in found for one in each.scores]
    predictions.write(run, [replace(each.predictions, measurement=text) for each in found])
    files = keep(run, new)
    bring_up_to_date(run, config, state.get("run_id"), files, new, (pictures, chosen.tested) if report else None)
    return new


def provenance(
    run: Path,
    state: Mapping[str, Any],
    chosen: Chosen,
    data: str,
    split: Path | None,
    learnt: Catalog | None,
    *,
    averaged: bool,
    allowed: bool,
) -> dict[str, Any]:
    """What every result on `chosen` images says of its weights, data and split, and of what makes it worthless."""
    return {
        "weights": f"{state['position']:,} samples" + ", averaged" * averaged,
        "data": named(data, chosen.tested.fingerprint) if split is None else named(split, chosen.split.sha256),
        "train_data": chosen.train_data,
        "split": chosen.split.sha256,
        "split_file": str(chosen.file(run).relative_to(run)),
        "shared_groups": len(chosen.split.shared_groups()),
        "allow_shared_groups": allowed,
        **leaked(run, learnt, chosen.tested, state.get("fingerprint")),
    }


def bring_up_to_date(
    run: Path,
    config: Config,
    run_id: str | None,
    files: Sequence[Path],
    scores: Sequence[Score] = (),
    report: tuple[Catalog | None, Catalog] | None = None,
) -> None:
    """Give new files and scores of a run to MLflow, with page and figures after the `report` was drawn again.

    `report` is what its pictures are of: images that were learnt (None: not at hand) and those that were tested.
    """
    pages = list(files)
    if report:
        learnt, tested = report
        pages += [write_run_report(run, learnt or tested, tested), *figures(run)]
    publish(run, config, run_id, pages, scores)


def refuse_foreign(path: Path) -> None:
    """Raise CheckpointError for a file, and for a folder of somebody else's weights."""
    others = [path] if path.is_file() else []
    if path.is_dir() and not (path / "checkpoints").is_dir():
        others = [file for suffix in FOREIGN for file in sorted(path.glob(f"*{suffix}"))]
    if others:
        raise CheckpointError(
            f"{others[0].name} is no run or checkpoint of this trainer",
            where=str(path),
            do="turn published weights into a run first: foundation import FILE RUN; then evaluate RUN",
        )


def named(place: str | Path, fingerprint: str) -> str:
    """Last part of a path and the first digits of what it holds. Of a URL without its query: a key is no name."""
    place = bare(str(place)).partition("?")[0]
    return f"{os.path.basename(os.path.abspath(place))} {fingerprint[:8]}"


def keep(run: Path, new: Sequence[Score]) -> list[Path]:
    """Put scores among those of a run in place of the same measurements, one process at a time; the files written."""
    known = {measurement(score) for score in new}
    with FileLock(run / ".scores.lock"):
        scores = [*(s for s in read_scores(run) if measurement(s) not in known), *new]
        return [write_whole(run / SCORES, to_json(scores)), write_whole(run / "scores.md", to_markdown(scores))]


def training_data(config: Config) -> Catalog | None:
    """The catalog the encoder was trained on, if it is named and still there."""
    try:
        return training_catalog(config)
    except (ConfigError, DataError):
        return None


def leaked(run: Path, learnt: Catalog | None, tested: Catalog, fingerprint: str | None) -> dict[str, Any]:
    """Which test images were among the pretraining images; kept in the run's `leakage.json` and with its scores."""
    return leakage.record(run, leakage.find(learnt, tested, fingerprint), tested)


def measurement(score: Score) -> tuple[Any, ...]:
    """What makes two scores the same measurement."""
    keys = ("weights", "data", "train_data", "crop", "image_size", "epochs")
    return score.encoder, score.protocol, score.metric, *(score.settings.get(key) for key in keys)


def run_folder(path: Path) -> Path:
    """The run that a run folder, its checkpoints folder or one checkpoint belongs to."""
    for folder in (path, *path.resolve().parents):
        if (folder / "checkpoints").is_dir() or (folder / "config.yaml").is_file():  # they may be elsewhere
            return folder
    raise CheckpointError("this checkpoint lies in no run folder", where=str(path), do="name RUN or its checkpoint")
