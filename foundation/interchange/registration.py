"""An export in MLflow's model registry: with a signature and its card, loaded back from there and compared."""

from __future__ import annotations

import hashlib
import importlib
import re
import tempfile
import warnings
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from foundation.errors import CheckpointError, ConfigError, StorageError
from foundation.interchange.export import CONFIG, TOLERANCE
from foundation.interchange.onnx_format import GRAPH
from foundation.interchange.source import Source, features, images, open_source
from foundation.training.mlflow_store import address, attach, code, mlflow_client, short
from foundation.training.standing import Standing

LOADER = "foundation.interchange.served"
SERVED = ("torch", "timm", "huggingface", "onnx")
CARD = 5000  # characters of a description that every database behind MLflow takes


class Registered(NamedTuple):
    """A version of a model in a registry, and the largest difference of its features from those of the run."""

    name: str
    version: str
    gap: float


def check(form: str, name: str) -> None:
    """Raise ConfigError for a format that a registry could not give back as a model, or a name it does not take."""
    if form not in SERVED:
        raise ConfigError(f"--register does not take the format {form}", do=f"choose {', '.join(SERVED)}")
    if not re.fullmatch(r"\w[\w .-]*", name):
        raise ConfigError(f"{name!r} is no name of a model", where="--register", do="use letters, digits, . - _")


def register(
    run: Path, exported: Path, name: str, *, averaged: bool = False, best: bool = False, pool: str | None = None
) -> Registered:
    """Register what `export` wrote of this run, as a new version of `name` or the one that has the same bytes.

    Raises ConfigError without MLflow, StorageError for a store that fails, CheckpointError when the model that the
    registry gives back has other features: the version is then taken back.
    """
    from foundation.evaluation.runs import run_folder

    source, home = open_source(run, averaged, best, pool), run_folder(run)
    try:
        client_class, errors = mlflow_client()
    except ImportError as error:
        raise ConfigError(f"--register needs MLflow: {error}", do="pip install 'sar-foundation[mlflow]'") from error
    uri = address(source.config, home)
    try:
        client = client_class(tracking_uri=uri)
        run_id = attach(client, uri, source.config, Standing(home, source.state.get("run_id")), False)
        digest = _digest(exported)
        known = [v for v in client.search_model_versions(f"name = '{name}'") if v.tags.get("sha256") == digest]
        made = known[0] if known else _version(client, run_id, name, exported, source, digest)
        gap = _returned(client, uri, made, source)
        if not gap < TOLERANCE:
            client.delete_model_version(name, made.version)
    except errors as error:
        what = f"the model was not registered: {short(error)}"
        do = "start or correct the store and run this again; the export is complete"
        raise StorageError(what, where=uri, do=do) from error
    if not gap < TOLERANCE:
        what = f"features of the registered model differ by {gap:.1e}, allowed is {TOLERANCE:.0e}; it was taken back"
        raise CheckpointError(what, where=f"--register {name}", do="report this with the configuration of the run")
    return Registered(name, str(made.version), gap)


def _version(client: Any, run_id: str, name: str, exported: Path, source: Source, digest: str) -> Any:
    """Upload the model below the artifacts of its run, and make a version of it."""
    exceptions = importlib.import_module("mlflow.exceptions")
    place = f"models/{name}-{digest[:12]}"
    with tempfile.TemporaryDirectory() as folder:
        _save(Path(folder) / "model", exported, source)
        client.log_artifacts(run_id, str(Path(folder) / "model"), place)
    try:
        client.create_registered_model(name)
    except exceptions.MlflowException as error:
        if code(error) != "RESOURCE_ALREADY_EXISTS":
            raise
    where = f"{client.get_run(run_id).info.artifact_uri.rstrip('/')}/{place}"
    facts = source.facts()
    tags = {key: str(facts[key]) for key in ("samples", "averaged", "pool", "config_hash", "fingerprint")}
    card = (exported / "README.md").read_text(encoding="utf-8")
    return client.create_model_version(name, where, run_id, {"sha256": digest, **tags}, description=card[:CARD])


def _save(path: Path, exported: Path, source: Source) -> None:
    """The folder that MLflow loads: the export, the name of what reads it, and its signature."""
    pyfunc, models = importlib.import_module("mlflow.pyfunc"), importlib.import_module("mlflow.models")
    types = importlib.import_module("mlflow.types")
    side = source.image_size if (exported / GRAPH).exists() else -1  # a graph takes images of one size
    given, got = (-1, source.encoder.channels, side, side), (-1, source.encoder.dim)
    kind = np.dtype("float32")
    inputs, outputs = types.TensorSpec(kind, given), types.TensorSpec(kind, got)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*input example was not provided")  # the signature says it
        pyfunc.save_model(
            str(path),
            loader_module=LOADER,
            data_path=str(exported),
            signature=models.ModelSignature(types.Schema([inputs]), types.Schema([outputs])),
            pip_requirements=[f"sar-foundation=={installed('sar-foundation')}"],
        )


def _returned(client: Any, uri: str, made: Any, source: Source) -> float:
    """The largest difference of the features of the model that the registry gives back."""
    artifacts, pyfunc = importlib.import_module("mlflow.artifacts"), importlib.import_module("mlflow.pyfunc")
    x = images(source, 2)
    with tempfile.TemporaryDirectory() as folder:
        where = client.get_model_version_download_uri(made.name, made.version)
        model = pyfunc.load_model(_ours(Path(artifacts.download_artifacts(where, dst_path=folder, tracking_uri=uri))))
        theirs = torch.from_numpy(model.predict(x.numpy()))
    return float((features(source, x)[0] - theirs).abs().max())


def _ours(folder: Path) -> str:
    """A downloaded model, as `_save` writes one; CheckpointError for any other: loading it runs what it names."""
    flavor = yaml.safe_load((folder / "MLmodel").read_text(encoding="utf-8"))["flavors"]["python_function"]
    if flavor["loader_module"] != LOADER or flavor.get("code"):
        do = "see who writes to this registry; delete the version"
        raise CheckpointError("the registry gave a model back that brings code of its own", where=str(folder), do=do)
    return str(folder)


def _digest(folder: Path) -> str:
    """Of the tensors and what says how they are read; a card may change."""
    found = hashlib.sha256((folder / CONFIG).read_bytes())
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".onnx", ".data"):
            with file.open("rb") as content:
                found.update(hashlib.file_digest(content, "sha256").digest())
    return found.hexdigest()
