"""Annotation files from outside: XML and JSON, read without trust in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

from shards.errors import DataError

MAX_BYTES = 1 << 30  # the COCO file of 100,000 images is about 60 MB


class _RootReached(Exception):
    """The prologue of an XML file is read; it held no document type."""


def parse_xml(data: bytes, name: str) -> ElementTree.Element:
    """The root element of an XML file; raises DataError that names the file.

    A document type is refused before anything is expanded: entities are the only way a small file grows in memory, and
    no annotation needs one. The look is expat's, so no encoding hides it.
    """

    def refuse(*_: object) -> None:
        raise DataError("an XML file with a document type is not read", where=name, do="remove the DOCTYPE from it")

    def stop(*_: object) -> None:
        raise _RootReached

    _check_size(data, name)
    guard = expat.ParserCreate()
    guard.StartDoctypeDeclHandler, guard.StartElementHandler = refuse, stop
    try:
        with suppress(_RootReached):
            guard.Parse(data, True)
        return ElementTree.fromstring(data)  # noqa: S314 - without a document type there are no entities
    except (expat.ExpatError, ElementTree.ParseError, ValueError, LookupError) as error:
        raise DataError(f"{name} is not readable XML: {error}", where=name, do="fetch it again") from error


def parse_json(data: bytes, name: str) -> Any:
    """The value of a JSON file; raises DataError that names the file."""
    _check_size(data, name)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is not readable JSON: {error}", where=name, do="fetch it again") from error


def texts(root: ElementTree.Element, *tags: str) -> Iterator[str]:
    """The texts of all elements below `root` with one of these tags, whatever their case, namespace and depth."""
    wanted = {tag.lower() for tag in tags}
    for element in root.iter():
        text = (element.text or "").strip()
        if text and element.tag.rpartition("}")[2].lower() in wanted:
            yield text


def numbers(root: ElementTree.Element, *tags: str) -> list[float]:
    """The leading numbers of these texts, units left out: `0.15m` is 0.15."""
    found = (re.match(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text) for text in texts(root, *tags))
    return [float(match.group()) for match in found if match]


def known(**columns: Any) -> dict[str, Any]:
    """The columns whose value is known: not None and not empty."""
    return {name: value for name, value in columns.items() if value is not None and value != ""}


def _check_size(data: bytes, name: str) -> None:
    if len(data) > MAX_BYTES:
        raise DataError(f"an annotation of {len(data):,} bytes is not read", where=name, do="split it")
