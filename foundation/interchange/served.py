"""An exported folder as MLflow loads it (`mlflow.pyfunc.load_model`): nothing is unpickled and no code lies in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from foundation.interchange.onnx_format import GRAPH, need_onnx


class Features:
    """Images → features of an encoder that `foundation export` wrote as torch, timm, huggingface or onnx."""

    def __init__(self, folder: Path) -> None:
        self._session: Any = None
        if (folder / GRAPH).exists():
            self._session = need_onnx().InferenceSession(str(folder / GRAPH), providers=["CPUExecutionProvider"])
            return
        from foundation.interchange.export import load_export

        self._encoder, self._facts = load_export(folder)

    def predict(self, images: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
        """fp32 [B, C, H, W] in [0, 1] → fp32 [B, dim]; `params` is part of MLflow's interface and has no meaning."""
        from foundation.interchange.source import pooled

        if self._session is not None:
            features: np.ndarray = self._session.run(["features"], {"images": images})[0]
            return features
        with torch.no_grad():
            tokens = self._encoder.forward_features(torch.from_numpy(images))
            return pooled(self._encoder, tokens, self._facts["pool"])[0].numpy()


def _load_pyfunc(path: str) -> Features:
    """What MLflow calls, by this name."""
    return Features(Path(path))
