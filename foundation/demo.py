"""Synthetic corpus → pretrain → probe → report, on a laptop CPU in a few minutes."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from foundation.cli_text import working
from foundation.config import load
from foundation.evaluation.protocols import Options
from foundation.evaluation.runs import evaluate_run
from foundation.evaluation.scores import Score, to_table
from foundation.training.run import train
from shards import synthetic

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"


def demo(root: Path, console: Console) -> bool:
    """Run everything under `root`; whether the linear probe beats the untrained encoder."""
    corpus = root / "demo-corpus"
    if not (corpus / "catalog.json").exists():
        with working("writing the synthetic corpus"):
            synthetic.write(corpus)
    run = train(load(CONFIG, [f"data.catalog={json.dumps(str(corpus))}", f"run_root={json.dumps(str(root))}"]))
    scores: list[Score] = []
    for protocol in ("knn", "linear", "fewshot"):
        with working(f"evaluating: {protocol}"):
            scores = evaluate_run(run, str(corpus), protocol, Options(shots=(10, 40)))
    console.print(to_table(scores))
    store = f"sqlite:///{(root / 'mlflow.db').resolve()}"
    lines = {
        "corpus": str(corpus),
        "run": str(run),
        "report": str(run / "report.html"),
        "MLflow": f"{root / 'mlflow.db'}  (look: mlflow ui --backend-store-uri {store})",
    }
    for name, value in lines.items():
        console.print(f"{name:<8}{value}", soft_wrap=True, markup=False, highlight=False)
    probe = {s.encoder: s.mean for s in scores if s.protocol == "linear" and s.metric == "accuracy"}
    won = probe["pretrained"] > probe["random-init"]
    ours, untrained = (f"{100 * probe[name]:.1f} %" for name in ("pretrained", "random-init"))
    console.print(f"linear probe: pretrained {ours} {'beats' if won else 'DOES NOT BEAT'} random-init {untrained}")
    return won
