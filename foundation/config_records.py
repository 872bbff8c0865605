"""Sections about a run that watches itself: its updates, its features, and where its numbers go."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from foundation.config_section import Positive, Section


class MonitorConfig(Section):
    """What is looked at beside the loss: whether features collapse, and what labelled images say of them."""

    every: int | None = Field(
        default=None, ge=1, description="samples between two looks at the features; null: at every checkpoint"
    )
    images: int = Field(default=256, ge=0, description="images that are looked at, always the same: 2 or more, or 0")
    catalog: str | None = Field(
        default=None,
        min_length=1,
        description="catalog (folder or URL) of those images; null: the first ones of the run",
    )
    on_collapse: Literal["warn", "stop"] = Field(default="warn", description="one line, or the end of the run")
    min_feature_std: float = Field(
        default=0.005, ge=0, description="collapsed below: deviation of features over images, 1 on a sphere, 0 equal"
    )
    min_rankme: float = Field(default=1.05, ge=0, description="collapsed below: effective rank of the features")
    min_target_variance: float = Field(
        default=1e-8, ge=0, description="collapsed below: variance of the target over images and positions"
    )
    probe: str | None = Field(
        default=None,
        min_length=1,
        description="catalog whose labelled train split is to judge the features while they are learnt; null: none",
    )
    probe_every: int | None = Field(
        default=None,
        ge=1,
        description="samples between two probes; null: at every checkpoint, so that the best is kept",
    )
    probe_images: int = Field(
        default=1000, ge=2, description="labelled images to learn from, and as many others to be judged by"
    )
    probe_linear: bool = Field(default=False, description="a logistic regression beside the nearest neighbours")

    @field_validator("images")
    @classmethod
    def _some_differ(cls, value: int) -> int:
        if value == 1:
            raise ValueError("0 or at least 2: one image differs from none, as if features had collapsed")
        return value


class GuardConfig(Section):
    """When an update is not made, and when the run goes back to an earlier checkpoint."""

    window: int = Field(default=128, ge=8, description="updates that an update is compared with")
    loss_score: Positive | None = Field(
        default=20.0, description="a loss is a spike above the median + so many robust deviations; null: never"
    )
    update_score: Positive | None = Field(
        default=20.0, description="the same of the norm of Adam's step, which spikes before the loss does; null: never"
    )
    skips: int = Field(default=3, ge=0, description="updates of a window that may go wrong before the run goes back")
    rewinds: int = Field(default=2, ge=0, description="times that the run goes back (in 20 windows) before it stops")
    kept: int = Field(default=16, ge=0, description="batches of skipped updates that are written to the run folder")


class TrackingConfig(Section):
    """Where the numbers of a run go, beside metrics.jsonl."""

    mlflow: bool = Field(default=True, description="record the run in MLflow")
    uri: str | None = Field(
        default=None, description="MLflow server or store; null: MLFLOW_TRACKING_URI, or a sqlite file in the run root"
    )
    experiment: str = Field(default="foundation", min_length=1, description="MLflow experiment")
