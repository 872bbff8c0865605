"""The model card of an export: what it learned from what, how good it is beside its controls, how it is loaded."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from foundation.config import config_hash
from foundation.evaluation.scores import to_markdown
from foundation.interchange.source import Source

LEAKED = "pretrained_on_test_images"


def card(source: Source, title: str, loading: str, front: dict[str, Any] | None = None) -> str:
    """A README.md from `card.md.j2`: `loading` is the code that loads the folder, `front` the YAML in front of a page
    of the hub."""
    import yaml
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # noqa: S701  (Markdown)
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return pages.get_template("card.md.j2").render(
        front=None if front is None else yaml.safe_dump(front, sort_keys=False),
        title=title,
        weights=weights(source),
        encoder=source.encoder,
        side=source.image_size,
        vector="the class token" if source.pool == "token" else "the mean of the patch tokens",
        loading=loading.strip(),
        scores=_scores(source),
        leakage=_leakage(source),
    )


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
