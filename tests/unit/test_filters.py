"""A filter selects what plain Python would, leaves nulls out, and refuses whatever is not a filter."""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import DataError
from shards.filters import compile_filter, unknown_columns
from shards.pack import SourceSpec, pack
from shards.schema import Record

COLUMNS = {"band": str, "spacing": float, "height": int, "class": str, "flag": bool}
TYPES = {str: pa.string(), float: pa.float64(), int: pa.int64(), bool: pa.bool_()}
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "band": st.sampled_from(["X", "C", "Ku", ""]),
    "spacing": st.sampled_from([0.25, 1.0, -3.5, 2.0]),
    "height": st.sampled_from([0, 1, 2, -7, 2**53 - 1]),
    "class": st.sampled_from(["T72", "class", "schöner Bus"]),
    "flag": st.booleans(),
}
NUMBERS = st.one_of(VALUES["spacing"], VALUES["height"])


def select(text: str, rows: list[dict[str, Any]]) -> list[int]:
    table = pa.table({name: pa.array([row[name] for row in rows], TYPES[kind]) for name, kind in COLUMNS.items()})
    numbered = table.append_column("number", pa.array(range(len(rows)), pa.int64()))
    return numbered.filter(compile_filter(text, COLUMNS))["number"].to_pylist()


def rows(null: bool) -> st.SearchStrategy[list[dict[str, Any]]]:
    values = {name: st.none() | each if null else each for name, each in VALUES.items()}
    return st.lists(st.fixed_dictionaries(values), max_size=8)


OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "in": lambda value, values: value in values,
    "not in": lambda value, values: value not in values,
}
Condition = tuple[str, Callable[[dict[str, Any]], bool | None]]  # a text, and what it means for a row (None: unknown)


def both(left: bool | None, right: bool | None) -> bool | None:
    return False if left is False or right is False else None if left is None or right is None else True


def negated(value: bool | None) -> bool | None:
    return None if value is None else not value


@st.composite
def comparisons(draw: st.DrawFn) -> Condition:
    name = draw(st.sampled_from(["band", "spacing", "height", "class"]))
    number = COLUMNS[name] in (int, float)
    constants = NUMBERS if number else VALUES[name]
    form = draw(st.sampled_from([*OPERATORS, "chain", "columns"]))
    if form == "chain":
        low, high = draw(constants), draw(constants)
        return f"{low!r} <= {name} < {high!r}", lambda row: None if row[name] is None else low <= row[name] < high
    if form == "columns":
        one, two = ("spacing", "height") if number else ("band", "class")
        return f"{one} < {two}", lambda row: None if None in (row[one], row[two]) else row[one] < row[two]
    value = draw(st.lists(constants, min_size=1, max_size=3)) if "in" in form else draw(constants)
    return f"{name} {form} {value!r}", lambda row: None if row[name] is None else OPERATORS[form](row[name], value)


CONDITIONS = st.recursive(
    comparisons() | st.just(("flag", lambda row: row["flag"])),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(
            lambda t: (f"({t[0][0]}) and ({t[1][0]})", lambda row: both(t[0][1](row), t[1][1](row)))
        ),
        st.tuples(inner, inner).map(
            lambda t: (
                f"({t[0][0]}) or ({t[1][0]})",
                lambda row: negated(both(negated(t[0][1](row)), negated(t[1][1](row)))),
            )
        ),
        inner.map(lambda c: (f"not ({c[0]})", lambda row: negated(c[1](row)))),
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(CONDITIONS, rows(null=False))
def test_a_filter_selects_what_plain_python_would(condition: Condition, table: list[dict[str, Any]]) -> None:
    text, meaning = condition
    assert select(text, table) == [number for number, row in enumerate(table) if meaning(row)]


@settings(max_examples=150, deadline=None)
@given(CONDITIONS, rows(null=True))
def test_an_unknown_value_decides_nothing_and_passes_no_comparison(condition: Condition, table: Any) -> None:
    text, meaning = condition
    assert select(text, table) == [number for number, row in enumerate(table) if meaning(row) is True]


def test_the_example_of_the_documentation() -> None:
    table = [
        dict(zip(COLUMNS, values, strict=True))
        for values in [("X", 0.5, 1, "a", True), ("X", 0.5, 1, "T72", True), ("C", 0.5, 1, "a", True)]
    ] + [dict.fromkeys(COLUMNS)]
    assert select('band == "X" and spacing < 1 and not (class in ["T72", "BMP2"])', table) == [0]
    assert select('  band == "X"\n  and class\n  == "T72" ', table) == [1]
    assert select("band not in ('X',) and height == 1.0 and flag == True and spacing > -1e999", table) == [2]
    assert select("band == 'class '", table) == []


HOSTILE = [
    "__import__('os').system('true')",
    "().__class__.__bases__[0].__subclasses__()",
    "band.__class__ == 'X'",
    "band[0] == 'X'",
    "(lambda: flag)()",
    "[x for x in (1, 2)]",
    "f'{flag}' == band",
    "(x := flag)",
    "flag if flag else flag",
    "flag & flag",
    "height ** 9 ** 9 > 1",
    "height + 1 > 1",
    "- - 1 < height",
    "height in [*band]",
    "height in [[1]]",
    "height in range(9)",
    "band in 'XC'",
    "band in []",
    "band is 'X'",
    "band == b'X'",
    "height < 1j",
    "band == ...",
    "await flag",
    "(yield)",
    "lambda class: 1",
    "1 < 2",
    "True",
    "band",
    "class",
    "spacing",
    "not 1",
    "-flag",
    "height < -True",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_not_a_filter_is_refused_with_the_text_and_the_grammar(text: str) -> None:
    with pytest.raises(DataError) as caught:
        compile_filter(text, COLUMNS)
    assert caught.value.where == text
    assert "==" in caught.value.do or "comparisons like" in caught.value.do


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bnd == 'X'", r"no column bnd[\s\S]*did you mean band\?"),
        ("quality > 1", r"no column quality[\s\S]*the columns: band, spacing"),
        ("band == X", r"no column X[\s\S]*stands in quotes"),
        ("band == 1", r"band is a text and 1 a number[\s\S]*band == \"X\""),
        ("spacing in ['1']", "spacing is a number and '1' a text"),
        ("flag == 1", "flag is a truth value and 1 a number"),
        ("band < height", "band is a text and height a number"),
        ("band == None", r"None cannot be compared[\s\S]*missing value passes no comparison"),
        ("band = 'X'", r"cannot be read[\s\S]*band = 'X'[\s\S]*comparisons like"),
        ("band == 'X'; import os", "cannot be read"),
        ("band == 'X' )", "cannot be read"),
        ("band == 'X", "cannot be read"),
        ("band == '\0'", "cannot be read"),
        ("band == '\ud800'", "cannot be read"),
        ("band == '\\ud800'", "not valid Unicode"),
        ("", r"cannot be read[\s\S]*\(empty\)"),
        ("height < " + "9" * 30, "does not fit 64 bits"),
        ("flag" + " and flag" * 300, "2704 characters, at most 2000"),
        ("not " * 400 + "flag", "nested more than 20 deep"),
        ("not (" * 25 + "flag" + ")" * 25, "nested more than 20 deep"),
        ("(" * 300 + "flag" + ")" * 300, "cannot be read: too many nested"),
        ("-" * 1900 + "1 < height", "neither a column nor"),
    ],
)
def test_a_mistake_is_explained(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        compile_filter(text, COLUMNS)


@settings(max_examples=100, deadline=None)
@given(
    st.text(max_size=40) | st.lists(st.sampled_from([*COLUMNS, *OPERATORS, "(", ")", "1", "'X'", "not"])).map(" ".join)
)
def test_any_text_either_compiles_or_is_refused_with_an_explanation(text: str) -> None:
    where = ""
    try:
        assert type(compile_filter(text, COLUMNS)).__name__ == "Expression"
    except DataError as error:
        where = error.where
    assert where in ("", "(empty)") or text.startswith(where[:80])


def test_the_longest_lists_and_chains_are_evaluated() -> None:
    table = [dict.fromkeys(COLUMNS) | {"height": height, "flag": True} for height in (1, 2)]
    assert select("height in [" + "7," * 900 + "2]", table) == [1]
    assert select(" and ".join(["flag"] * 200), table) == [0, 1]


def test_columns_that_not_every_sample_knows_are_counted(tmp_path: Path) -> None:
    chips = [Record(np.full((8, 8), i + 1, np.uint8), str(i), meta={"band": "X"} if i else {}) for i in range(3)]
    catalog = pack(tmp_path, [SourceSpec("s", records=chips)])
    found = unknown_columns(catalog, ["band", "spacing", "height"])
    assert found == "band is known for 2 of 3 samples; spacing is known for 0 of 3 samples"
    assert unknown_columns(catalog, ["height"]) == unknown_columns(catalog, []) == ""
