"""What is learned and how a run goes. Importing it registers the encoders with timm and imports neither."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foundation.timm_registry import register

register()


def load_export(folder: Path | str) -> tuple[Any, dict[str, Any]]:
    """The encoder that `foundation export` wrote, and facts of its weights; see `interchange.export`."""
    from foundation.interchange.export import load_export as load

    return load(folder)
