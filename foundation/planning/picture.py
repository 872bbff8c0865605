"""A plan as a picture: the learning rate over the run, and the memory of a process by engine."""

from __future__ import annotations

from pathlib import Path

from foundation.config import Config
from foundation.errors import StorageError
from foundation.planning.cluster import GPUS, Cluster
from foundation.planning.engines import GB
from foundation.planning.plan import Plan
from foundation.training.optim import lr_at

TERMS = ("parameters", "gradients", "optimizer", "ema", "copies", "buffers", "activations", "batch", "margin")


def draw(config: Config, cluster: Cluster, plan: Plan, path: Path) -> Path:
    """Write a PNG. Raises StorageError when it cannot be written."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    drawing, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    at = [config.train.samples * i / 400 for i in range(401)]
    left.plot([p / 1e6 for p in at], [lr_at(config, p) for p in at])
    left.axvline(config.optim.warmup_samples / 1e6, color="grey", linewidth=0.8, linestyle=":")
    left.set(xlabel="million samples", ylabel="learning rate", xlim=(0, at[-1] / 1e6), ylim=0)
    left.set_title(f"{config.name}: global batch {config.train.global_batch}", fontsize=10)

    names = [c.engine + (" *" if c.engine == plan.engine else "") for c in plan.candidates]
    before = [0.0] * len(names)
    for term, colour in zip(TERMS, plt.get_cmap("tab10").colors, strict=False):  # type: ignore[attr-defined]
        values = [getattr(c.memory, term) / GB for c in plan.candidates]
        if any(values):
            right.barh(names, values, left=before, label=term, color=colour)
            before = [a + b for a, b in zip(before, values, strict=True)]
    room = GPUS[cluster.gpu].memory / GB
    right.axvline(room, color="black", linewidth=0.8, linestyle=":", label=f"{cluster.gpu}: {room:.0f} GB")
    right.invert_yaxis()
    right.set(xlabel="GB per process")
    right.set_title(f"{config.model.size}, {cluster.world} processes, * planned", fontsize=10)
    right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    try:
        drawing.savefig(path, dpi=130, format="png")
    except OSError as error:
        what = f"cannot be written: {error.strerror}"
        raise StorageError(what, where=str(path), do="choose another --figure") from error
    finally:
        plt.close(drawing)
    return path
