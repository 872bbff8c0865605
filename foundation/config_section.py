"""What sections of the configuration are made of."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from shards.redaction import tells

Unit = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """Base of all sections: strict types, no unknown keys, no changes after construction."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _from_yaml(cls, value: object, info: ValidationInfo) -> object:
        """What YAML writes differently: lists for tuples, 1e6 for a whole number, an empty section. No secrets."""
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, list):
            value = tuple(value)
        if any(isinstance(one, str) and tells(one) for one in (value if isinstance(value, tuple) else [value])):
            # It is saved, reported and passed around.
            raise ValueError("a URL without user name or query; credentials come from the environment")
        if isinstance(value, float) and value.is_integer() and kind in (int, int | None):
            return int(value)
        if value is None and isinstance(kind, type) and issubclass(kind, Section):
            return {}
        return value


def one_of(value: str, known: Sequence[str]) -> str:
    """The value itself; raises ValueError with the known ones, and the nearest, when it is none of them."""
    if value in known:
        return value
    near = difflib.get_close_matches(value, known, n=1)
    raise ValueError(f"one of {', '.join(known)}" + (f" (did you mean {near[0]}?)" if near else ""))
