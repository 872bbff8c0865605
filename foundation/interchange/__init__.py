"""Encoders in and out: checkpoints of this trainer, published state dicts, other people's formats."""

from foundation.interchange.published import (
    FIXED,
    UNUSED,
    Model,
    by_channel,
    fixed_gap,
    from_published,
    import_published,
    is_linear,
    is_relative,
    load_encoder,
    model_of,
    random_encoder,
    rename,
)

__all__ = [
    "FIXED",
    "UNUSED",
    "Model",
    "by_channel",
    "fixed_gap",
    "from_published",
    "import_published",
    "is_linear",
    "is_relative",
    "load_encoder",
    "model_of",
    "random_encoder",
    "rename",
]
