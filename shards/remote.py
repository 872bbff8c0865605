"""Words for what goes wrong with a bucket: every library of a file system has exceptions of its own."""

from __future__ import annotations

from shards.errors import DataError
from shards.store import _refusal, redact


def explained(error: Exception, what: str, url: str, do: str) -> DataError:
    """`what` failed at `url`; `do` is the advice where the error itself gives none. Raise it `from None`.

    The messages of the libraries show whole URLs, so the cause is not to be chained.
    """
    text = redact(f"{type(error).__name__}: {error}".rstrip(": "))
    if isinstance(error, FileNotFoundError):
        return DataError(f"{what}: there is no such bucket or folder ({text})", where=redact(url), do=do)
    if type(error).__name__ == "ParamValidationError":
        return DataError(f"{what}: no possible name of a bucket ({text})", where=redact(url), do="correct the URL")
    if refusal := _refusal(error):
        return DataError(f"{what}: {refusal[0]} ({text})", where=redact(url), do=refusal[1])
    return DataError(f"{what}: {text}", where=redact(url), do=do)
