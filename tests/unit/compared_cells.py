"""What the tests of comparisons share: marks of cells as if they had been run."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from foundation.comparing.cells import MARK, judged
from foundation.comparing.plan import Comparison
from foundation.evaluation.scores import score


def scored(comparison: Comparison, values: dict[str, list[float]], **settings: Any) -> None:
    """Write the marks and scores of cells as if they had been run: one value per seed, of 100 test images."""
    import torch

    y = torch.zeros(100, dtype=torch.int64)
    for c in comparison.cells:
        value = values[c.row][comparison.spec.seeds.index(c.seed)]
        wrong = torch.arange(100) >= round(100 * value)
        controls = {"random-init": 0.10 + c.seed / 100, "background only": 0.2}
        scores = [score("pretrained", "knn", "accuracy", y, [wrong.long()], (0,), settings)]
        scores += [
            score(n, "knn", "accuracy", y, [(torch.arange(100) >= round(100 * v)).long()], (0,), settings)
            for n, v in controls.items()
        ]
        c.config.run_folder.mkdir(parents=True, exist_ok=True)
        mark = judged(comparison, c) | {"scores": [asdict(s) for s in scores]}
        (c.config.run_folder / MARK).write_text(json.dumps(mark))
