"""What goes wrong with buckets and servers: how long to insist, and words for the errors of every library."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from shards.errors import DataError

T = TypeVar("T")
_jitter = random.SystemRandom()  # forked children must not wait in step


@dataclass(frozen=True)
class Retry:
    """How long to insist. All in seconds.

    `patience`: without any progress until giving up; `first`, `longest`: waits between tries, which double;
    `connect`, `read`: time-outs of a request, `read` without a byte.
    """

    patience: float = 600
    first: float = 0.5
    longest: float = 30
    connect: float = 10
    read: float = 30

    def wait(self, failures: int) -> float:
        """How long before the next try, after so many without progress."""
        return min(self.longest, self.first * 2 ** min(failures - 1, 30)) * _jitter.uniform(0.5, 1)


class ChangedError(Exception):
    """The server has other bytes than the catalog says."""


class Attempts:
    """The tries for one file: waits between them, and the DataError that ends them."""

    def __init__(self, retry: Retry, where: str) -> None:
        self.retry, self.where = retry, where
        self.since: float | None = None  # when progress stopped
        self.tries = self.failures = self.best = 0
        self.sign: object = None

    def reached(self, done: int) -> None:
        """Note progress: more bytes than ever before."""
        if done > self.best:
            self.best, self.since, self.failures = done, None, 0

    def idle(self, sign: object) -> None:
        """Wait a moment for another process, which shows progress by new values of `sign`."""
        now = time.monotonic()
        if self.since is None or sign != self.sign:
            self.since, self.sign = now, sign
        if now - self.since > self.retry.patience:
            what = f"another process of this node has been at it for {now - self.since:.0f} s without progress"
            raise DataError(what, where=self.where, do="see what that process reports, or give the cache more room")
        time.sleep(0.02 + 0.1 * _jitter.random())

    def failed(self, error: Exception, *, final: bool = False) -> None:
        """Wait before the next try, or raise DataError when there is no point in one."""
        self.tries, self.failures = self.tries + 1, self.failures + 1
        now = time.monotonic()
        self.since = now if self.since is None else self.since
        text = f"{type(error).__name__}: {error}".rstrip(": ")
        # Not chained: the messages of the libraries show whole URLs.
        if isinstance(error, ChangedError) and final:
            what = f"changed on the server: {error}"
            raise DataError(what, where=self.where, do="load the catalog again, or restore the file it lists") from None
        if refused := refusal(error):
            raise DataError(f"{refused[0]} ({text})", where=self.where, do=refused[1]) from None
        wait = self.retry.wait(self.failures)
        if final or now + wait - self.since > self.retry.patience:
            what = f"cannot be fetched: given up after {self.tries} tries and {now - self.since:.0f} s without progress"
            raise DataError(
                f"{what}; the last one: {text}", where=self.where, do="see whether it can be reached"
            ) from None
        time.sleep(wait)


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
            wait = retry.wait(tries)
            if refusal(error) or now + wait - began > retry.patience:
                where = f"{what}: given up after {tries} tries" if tries > 1 else what
                raise explained(error, where, url, "see whether it can be reached") from None
            time.sleep(wait)


def explained(error: Exception, what: str, url: str, do: str) -> DataError:
    """`what` failed at `url`; `do` is the advice where the error itself gives none. Raise it `from None`.

    The messages of the libraries show whole URLs, so the cause is not to be chained.
    """
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    if isinstance(error, FileNotFoundError):
        return DataError(f"{what}: there is no such bucket or folder ({text})", where=url, do=do)
    if type(error).__name__ == "ParamValidationError":
        return DataError(f"{what}: no possible name of a bucket ({text})", where=url, do="correct the URL")
    if refused := refusal(error):
        return DataError(f"{what}: {refused[0]} ({text})", where=url, do=refused[1])
    return DataError(f"{what}: {text}", where=url, do=do)


def refusal(error: BaseException) -> tuple[str, str] | None:
    """What happened and what to do, for errors that no further try can cure."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    status = _status(error)
    if kinds & {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError"}:
        return "no credentials", "set those of the provider in the environment (AWS_PROFILE, AWS_ACCESS_KEY_ID, ...)"
    if isinstance(error, TimeoutError):
        return None
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return "there is no such file", "check the root, and that the upload of the catalog was complete"
    if isinstance(error, PermissionError) or status in (401, 403) or str(error).startswith("Forbidden"):
        return "access denied", "check the credentials in the environment and the rights on the file"
    if status == 416 or "satisfiable" in str(error):
        return "changed on the server: the file is shorter than the catalog says", "load the catalog again"
    own = isinstance(error, (TypeError, ValueError, AttributeError, LookupError, NotImplementedError, ImportError))
    if own or kinds & {"ParamValidationError"} or (status and 400 <= status < 500 and status not in (408, 425, 429)):
        return "the request was refused", "check the root and the endpoint"
    return None


def _status(error: BaseException | None) -> int:
    """The HTTP status that an error of s3fs (botocore), gcsfs or aiohttp carries, 0 without one."""
    cause = error.__cause__ if error else None
    response = getattr(error, "response", None) or getattr(cause, "response", None)
    if isinstance(response, dict):
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    value = str(getattr(error, "status", None) or getattr(error, "code", None))
    return int(value) if value.isdigit() else 0
