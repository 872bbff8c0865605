"""Words for what goes wrong with a bucket: every library of a file system has exceptions of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from shards.errors import DataError
from shards.store import Retry, _jitter, _refusal

T = TypeVar("T")


def explained(error: Exception, what: str, url: str, do: str) -> DataError:
    """`what` failed at `url`; `do` is the advice where the error itself gives none. Raise it `from None`.

    The messages of the libraries show whole URLs, so the cause is not to be chained.
    """
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    if isinstance(error, FileNotFoundError):
        return DataError(f"{what}: there is no such bucket or folder ({text})", where=url, do=do)
    if type(error).__name__ == "ParamValidationError":
        return DataError(f"{what}: no possible name of a bucket ({text})", where=url, do="correct the URL")
    if refusal := _refusal(error):
        return DataError(f"{what}: {refusal[0]} ({text})", where=url, do=refusal[1])
    return DataError(f"{what}: {text}", where=url, do=do)


def insist(action: Callable[[], T], what: str, url: str, retry: Retry | None = None) -> T:
    """The result of `action`, requests to the store at `url`; repeated from the start while that can help.

    Raises FileNotFoundError as it comes, and DataError, which says that `what` failed, when nothing helps.
    """
    retry, tries, began = retry or Retry(), 0, time.monotonic()
    while True:
        try:
            return action()
        except FileNotFoundError:
            raise
        except Exception as error:  # of fsspec's libraries, which are not all OSError
            tries += 1
            now = time.monotonic()
            began = now if tries == 1 else began
            wait = min(retry.longest, retry.first * 2 ** min(tries - 1, 30)) * _jitter.uniform(0.5, 1)
            if _refusal(error) or now + wait - began > retry.patience:
                where = f"{what}: given up after {tries} tries" if tries > 1 else what
                raise explained(error, where, url, "see whether it can be reached") from None
            time.sleep(wait)
