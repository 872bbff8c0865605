"""A corpus whose paths say what each file is: one pattern, and what a match means."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import ClassVar

from shards.schema import Rejected
from shards.sources.base import Corpus, Item


class Named(Corpus):
    """`pattern` is searched in every wanted path, `expected` tells a user what it stands for; `item` reads a match."""

    pattern: ClassVar[re.Pattern[str]]
    expected: ClassVar[str]

    def items(self) -> Iterator[Item | Rejected]:
        """Every file that the pattern explains; others as Rejected."""
        for name in self.files.names:
            if not self.wanted(name):
                continue
            match = self.pattern.search(name)
            if match is None:
                yield Rejected(name, "bad", f"not a file of {self.kind}; expected {self.expected}")
            else:
                yield self.item(name, match)

    def item(self, name: str, match: re.Match[str]) -> Item | Rejected:
        """What a path stands for."""
        raise NotImplementedError
