"""PNG figures in one style: each function takes numbers, writes a file with the same bytes for the same numbers."""

from foundation.evaluation.figures.style import COLOURS, canvas, grid, plain, save

__all__ = ["COLOURS", "canvas", "grid", "plain", "save"]
