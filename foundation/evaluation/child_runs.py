"""Evaluations in MLflow: each is a run below that of the training, the same one when it is made again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from foundation.evaluation import predictions
from foundation.evaluation.scores import Score, to_json
from foundation.training.mlflow_sink import MlflowSink
from foundation.training.mlflow_store import child, set_parameters, usable


def send_evaluations(sink: MlflowSink, run: Path, scores: Sequence[Score]) -> None:
    """Queue one child run for each protocol and measurement among the scores of a run."""
    groups: dict[tuple[str, str], list[Score]] = {}
    for score in scores:
        facts = score.settings
        text = facts.get("measurement") or f"{facts.get('weights')}, {facts.get('data')}"
        groups.setdefault((score.protocol, text), []).append(score)
    for (protocol, text), group in groups.items():
        sink.job(partial(_send, run, protocol, text, group), f"all of the evaluation {protocol}: {text}")


def _send(run: Path, protocol: str, text: str, scores: Sequence[Score], client: Any, parent: str) -> None:
    """Bring the child up to date: what has not changed is not recorded twice."""
    key = hashlib.sha256(f"{protocol}\n{text}".encode()).hexdigest()[:32]
    found = child(client, parent, key, f"{protocol}: {text}", "foundation evaluate")
    run_id = found.info.run_id
    for name, value in metrics(scores).items():
        if found.data.metrics.get(name) != value:
            client.log_metric(run_id, name, value)
    wanted = parameters(scores[0])
    set_parameters(client, run_id, {name: wanted[name] for name in wanted.keys() - found.data.params.keys()})
    client.set_terminated(run_id, "FINISHED")  # before files, for which the store may have no room
    client.log_text(run_id, to_json(scores), "scores.json")
    files: dict[Path, str | None] = {
        run / score.settings["split_file"]: None for score in scores if "split_file" in score.settings
    }
    files |= {predictions.place(run, score.encoder, protocol, text): predictions.FOLDER for score in scores}
    for file, folder in files.items():
        if file.is_file():
            client.log_artifact(run_id, str(file), folder)


def metrics(scores: Sequence[Score]) -> dict[str, float]:
    """`ENCODER/METRIC` and the ends of its interval, in [0, 1]; the paired test against the untrained encoder."""
    found: dict[str, float] = {}
    for score in scores:
        name = usable(f"{score.encoder}/{score.metric}")
        found |= {name: score.mean, f"{name}_low": score.low, f"{name}_high": score.high}
        if paired := score.settings.get("paired"):
            found |= {f"{name}_gain": paired["difference"], f"{name}_gain_p": paired["p"]}
    return found


def parameters(score: Score) -> dict[str, object]:
    """The settings that are one value or a list; the others are in scores.json."""
    settings = {"protocol": score.protocol, "seeds": score.seeds, "test_images": score.n_test, **score.settings}
    return {usable(name): value for name, value in settings.items() if not isinstance(value, dict)}
