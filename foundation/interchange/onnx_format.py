"""The encoder as an ONNX graph: images of one size, any batch; checked with onnxruntime."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foundation.errors import CheckpointError, ConfigError
from foundation.interchange.source import Source, pooled, with_backend
from foundation.models.vit import ViT

GRAPH, OPSET = "model.onnx", 18
_ONE_FILE = 1_500_000_000  # bytes; protobuf ends at 2 GiB


class Outputs(nn.Module):
    """Images [B, C, S, S] → features [B, dim] and patch tokens [B, N, dim]."""

    def __init__(self, encoder: ViT, pool: str) -> None:
        super().__init__()
        self.encoder, self.pool = encoder, pool

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Both, after the final norm."""
        return pooled(self.encoder, self.encoder.forward_features(images), self.pool)


def need_onnx() -> Any:
    """onnxruntime, where all that an export needs is installed. Raises ConfigError otherwise."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"this needs onnx: {error}", do="pip install 'sar-foundation[export]'") from error
    return onnxruntime


def write_onnx(source: Source, folder: Path, example: Tensor) -> Path:
    """Trace the encoder on images like `example`, opset 18; more than 1.5 GB of weights lie in a file beside the graph.

    Raises CheckpointError when the encoder cannot be traced.
    """
    need_onnx()
    size = sum(p.numel() * p.element_size() for p in source.encoder.parameters())
    path = folder / GRAPH
    with_backend(source.encoder, "reference")  # plain products and look-ups, the same in every batch
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the exporter reports its steps
            program = torch.onnx.export(
                Outputs(source.encoder, source.pool).eval(),
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=["features", "patch_tokens"],
                dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
                verbose=False,
            )
        assert program is not None
        program.save(str(path), external_data=size > _ONE_FILE)
    except (RuntimeError, ValueError) as error:
        what = f"this encoder cannot be traced: {str(error).splitlines()[0]}"
        raise CheckpointError(what, do="export with --format torch") from error
    finally:
        with_backend(source.encoder, "auto")
    return path


def onnx_features(folder: Path, x: Tensor) -> tuple[Tensor, ...]:
    """What onnxruntime gives on the CPU for images `x`: features and patch tokens."""
    session = need_onnx().InferenceSession(str(folder / GRAPH), providers=["CPUExecutionProvider"])
    return tuple(torch.from_numpy(value) for value in session.run(None, {"images": x.numpy()}))


LOADING = f"""import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/{GRAPH}")  # opset {OPSET}, any batch, images of one size
features, patch_tokens = session.run(None, {{"images": images}})  # NumPy fp32 [B, C, S, S]"""
