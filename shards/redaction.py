"""Text for people, files and servers without secrets: the one place that takes them out.

A configuration refuses them, so they come from the environment and the command line. What `ExplainedError` says, the
lines and events of a run and its parameters and tags pass here; under the command line so does all that is printed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any, TextIO, cast
from urllib.parse import unquote

SHORTEST = 6  # characters: a shorter value of the environment would be found in ordinary words
_USER = re.compile(r"(\w://)(?:[^/\s\":]*:[^\s\"]*|[^/\s\"]*)@")  # people leave a slash in a password as it is
_END = r"[^\s\"]*?(?=['\"]?[),;:\]}>]*(?:\s|$)|\")"
_QUERY = re.compile(rf"(\w://[^\s\"?#]*)[?#]{_END}")
_BELOW = re.compile(rf"\?[\w.%~+-]+={_END}")  # some libraries name the path and query of a URL alone
_HEADER = re.compile(r"\b(Basic|Bearer)\s+[\w.~+/=-]+")
_NAMED = re.compile(
    r"(?i)(password|passwd|secret(?:_access_key)?|api_?key|(?:access|auth)_token)(['\"]?\s*[=:]\s*['\"]?)[^\s'\",;&)]+"
)
_VARIABLE = re.compile(r"(PASSWORD|PASSWD|SECRET|TOKEN|KEY|KEY_ID)$")
_PASSWORD = re.compile(r"\w://[^/\s:@]*:(\S+)@")


def redact(text: str) -> str:
    """`text` without user names, passwords and queries of URLs, credentials of headers, and secrets of the environment.

    What is doubtful is taken out.
    """
    for value in sorted(_known(), key=len, reverse=True):
        text = text.replace(value, "***")
    return _NAMED.sub(r"\1\2***", _HEADER.sub(r"\1 ***", _BELOW.sub("?***", bare(text))))


def bare(url: str) -> str:
    """The URL, or a text with URLs, without user names, passwords, queries and fragments: the same for everybody."""
    return _QUERY.sub(r"\1?***", _USER.sub(r"\1***@", url))


def tells(url: str) -> bool:
    """Whether a URL has a user name, a password or a query; a file of SQLite may."""
    return not url.startswith("sqlite:") and bool(_USER.search(url) or re.search(r"\w://\S*\?", url))


def redacted(stream: TextIO) -> TextIO:
    """The stream, of which everything written passes `redact`."""
    return cast(TextIO, _Redacted(stream))


class _Redacted:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(redact(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _known() -> Iterator[str]:
    """Values of variables that are named like secrets, and passwords in the URLs of all, as they stand and decoded."""
    for name, value in os.environ.items():
        for secret in [*_PASSWORD.findall(value), *([value.strip()] if _VARIABLE.search(name) else [])]:
            yield from (each for each in {secret, unquote(secret)} if len(each) >= SHORTEST)
