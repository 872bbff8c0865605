"""The errors a user meets; each says what happened, where, and what to do."""

from __future__ import annotations

from shards.errors import DataError, ExplainedError

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ExplainedError",
    "LaunchError",
    "NumericsError",
    "StorageError",
]


class ConfigError(ExplainedError):
    """The configuration cannot be used; lists every error at once."""


class CheckpointError(ExplainedError):
    """A checkpoint is missing, unfinished, damaged, of another model, or could not be written."""


class NumericsError(ExplainedError):
    """A loss or gradient is not finite."""


class LaunchError(ExplainedError):
    """The processes that were started do not form the run that was asked for."""


class StorageError(ExplainedError):
    """A file of a run could not be written or read."""
