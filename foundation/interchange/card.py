"""The model card of an export: what it learned from what, how good it is beside its controls, how it is loaded."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from foundation.config import config_hash
from foundation.evaluation.scores import to_markdown
from foundation.interchange.source import Source

LEAKED = "pretrained_on_test_images"


def card(source: Source, title: str, loading: str, front: dict[str, Any] | None = None) -> str:
    """A README.md: `loading` is the code that loads the folder, `front` the YAML in front of a page of the hub."""
    import yaml

    head = ""
    if front is not None:
        head = f"---\n{yaml.safe_dump(front, sort_keys=False)}# license: not set; see below\n---\n\n"
    sections = {
        "Weights": _list(weights(source)),
        "Input": _input(source),
        "Loading": f"```python\n{loading.strip()}\n```",
        "Scores": _scores(source),
        "Leakage": _leakage(source),
        "Intended use": (
            "Features of SAR amplitude images for research: classification with few labels, retrieval, the backbone\n"
            "of a detector. Its data are those named above; what it does on other sensors, bands and resolutions has\n"
            "to be measured."
        ),
        "Licence": "Not set: whoever publishes these weights chooses it, within the terms of the training data.",
    }
    return f"{head}# {title}\n\n" + "\n\n".join(f"## {name}\n\n{text}" for name, text in sections.items()) + "\n"


def weights(source: Source) -> dict[str, str]:
    """The facts of the weights, as lines of the card."""
    from foundation.objectives.registry import OBJECTIVES

    config, state = source.config, source.state
    model, objective = config.model, config.objective.name
    facts = {
        "objective": f"`{objective}`, {OBJECTIVES[objective].description}",
        "encoder": f"ViT {model.size}/{model.patch}, {source.encoder.dim} wide, {source.encoder.depth} blocks, "
        f"{source.encoder.heads} heads, positions {model.positions}",
    }
    if "imported_from" in state:
        return facts | {"origin": f"published weights, imported from `{state['imported_from']}`"}
    names = ", ".join(f"`{PurePosixPath(root.rstrip('/')).name}`" for root in config.data.catalog)
    return facts | {
        "data": f"{names}, fingerprint `{state['fingerprint']}`",
        "samples seen": f"{state['position']:,} of {config.train.samples:,}, images of {source.image_size} px",
        "weights": "running average" if source.averaged else "those of the last update",
        "configuration": f"`{config.name}`, hash `{config_hash(config)}`",
    }


def _list(facts: dict[str, str]) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in facts.items())


def _input(source: Source) -> str:
    encoder, side = source.encoder, source.image_size
    vector = "the class token" if source.pool == "token" else "the mean of the patch tokens"
    return (
        f"fp32 `[B, {encoder.channels}, H, W]` in [0, 1]: amplitude by the rule of the catalog,\n"
        "`clip(a / scale, 0, 1)` or its logarithm; **no mean or standard deviation** is taken out. Channels: "
        f"{encoder.channels}. H and W are\nmultiples of {encoder.patch}; trained at {side} x {side}. "
        f"Features are {vector} after the final norm."
    )


def _scores(source: Source) -> str:
    if not source.scores:
        return "None were measured: run `foundation evaluate` on the run and export again."
    ours = f"{source.state['position']:,} samples" + ", averaged" * source.averaged
    others = all(score.settings.get("weights", ours) != ours for score in source.scores)
    note = f"**None is of the weights in this folder ({ours}).** " if others else ""
    return f"{note}With 95 % intervals, beside the controls.\n\n{to_markdown(source.scores).strip()}"


def _leakage(source: Source) -> str:
    report = source.leakage
    if report is not None:
        leaked = "**" if report.get("verdict") == "leaked" else ""
        return f"{leaked}{report['sentence']}{leaked}"
    counted = {str(s.settings[LEAKED]) for s in source.scores if LEAKED in s.settings}
    if counted:
        return f"Test images among the pretraining images, by content hash: {', '.join(sorted(counted))}."
    return "Not checked: the run has neither `leakage.json` nor scores."
