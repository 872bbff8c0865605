"""Filters over metadata columns: a small part of Python's expression grammar, read but never executed.

    band == "X" and spacing < 1 and not (polarisation in ["HH", "VV"])

Allowed are `and`, `or`, `not`, the comparisons == != < <= > >= in `not in` (also chained), column names, texts, numbers
and lists of these. Logic has three values, as in SQL: a comparison with a missing value is neither true nor false, its
negation too, and only samples for which the whole is true pass. So a null never passes a comparison.
"""

from __future__ import annotations

import ast
import difflib
import io
import keyword
import operator
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

from shards.errors import DataError

if TYPE_CHECKING:
    from shards.catalog import Catalog

MAX_LENGTH, MAX_DEPTH = 2000, 20
ALLOWED = 'write comparisons like spacing < 1 or band in ["X", "C"], joined by and, or, not and parentheses'
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_KINDS: dict[type, str] = {str: "text", int: "number", float: "number", bool: "truth value"}
_PREFIX = "column_"  # makes a name of a column that Python reserves, such as `class`
_GRAMMAR = {"and", "or", "not", "in", "is", "if", "else", "for", "lambda", "True", "False", "None"}


def compile_filter(text: str, columns: Mapping[str, type]) -> Any:
    """The filter as a pyarrow.compute.Expression over `columns` (name → str, int, float or bool).

    Raises DataError, which shows the text, for what is not allowed, an unknown column, a comparison of different types,
    a text longer than 2,000 characters and nesting deeper than 20.
    """
    line, tree = _parse(text, columns)
    return _Compiler(text, line, columns).condition(tree, 0)


def unknown_columns(catalog: Catalog, columns: Sequence[str]) -> str:
    """Which of these metadata columns not every sample knows, in words; nothing when all are known or none is given.

    `spacing is known for 0 of 8,333 samples; band is known for 12 of 8,333 samples`
    """
    known = dict.fromkeys(columns, 0)
    for table in catalog.tables(list(columns)) if columns else ():
        for name in columns:
            known[name] += len(table) - table[name].null_count
    total = catalog.samples
    return "; ".join(f"{name} is known for {n:,} of {total:,} samples" for name, n in known.items() if n < total)


def _parse(text: str, columns: Mapping[str, type]) -> tuple[str, ast.expr]:
    """What Python's parser was given, and the tree it made of it."""
    if len(text) > MAX_LENGTH:
        raise DataError(
            f"the filter has {len(text)} characters, at most {MAX_LENGTH} are read",
            where=text[:80] + "...",
            do="shorten it: `x in (a, b, c)` says what many `x == a or ...` do",
        )
    line = " ".join(text.split("\n")).strip()
    try:
        for start, end in reversed(list(_reserved(line, columns))):
            line = line[:start] + _PREFIX + line[start:end] + line[end:]
        return line, ast.parse(line, mode="eval").body
    except (SyntaxError, tokenize.TokenError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error.args[0] if error.args else "too deep")
        raise DataError(f"the filter cannot be read: {reason}", where=text or "(empty)", do=ALLOWED) from error


def _reserved(line: str, columns: Mapping[str, type]) -> Iterator[tuple[int, int]]:
    """Begin and end of every column name in the line that Python reserves for itself."""
    names = {name for name in columns if keyword.iskeyword(name)} - _GRAMMAR
    for token in tokenize.generate_tokens(io.StringIO(line).readline) if names else ():
        if token.type == tokenize.NAME and token.string in names:
            yield token.start[1], token.end[1]


class _Compiler:
    """Turns the nodes it knows into an Arrow expression and refuses all others."""

    def __init__(self, text: str, line: str, columns: Mapping[str, type]) -> None:
        self.text, self.line, self.columns = text, line, columns

    def refuse(self, what: str, do: str = ALLOWED) -> DataError:
        return DataError(what, where=self.text, do=do)

    def source(self, node: ast.AST) -> str:
        segment = (ast.get_source_segment(self.line, node) or "").replace(_PREFIX, "")
        return segment if len(segment) <= 60 else f"{segment[:60]}..."

    def condition(self, node: ast.expr, depth: int) -> Any:
        """The truth of a node: logic, a comparison, or a column of truth values."""
        if depth > MAX_DEPTH:
            raise self.refuse(f"the filter is nested more than {MAX_DEPTH} deep", do="write it with fewer parentheses")
        match node:
            case ast.BoolOp(op=ast.And(), values=values):
                return reduce(operator.and_, [self.condition(value, depth + 1) for value in values])
            case ast.BoolOp(op=ast.Or(), values=values):
                return reduce(operator.or_, [self.condition(value, depth + 1) for value in values])
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return ~self.condition(operand, depth + 1)
            case ast.Compare(left=left, ops=ops, comparators=rights):
                pairs = zip([left, *rights[:-1]], ops, rights, strict=True)
                return reduce(operator.and_, [self.compare(*pair) for pair in pairs])
            case ast.Name() if self.kind(node) == "truth value":
                return self.value(node)
        raise self.refuse(f"{self.source(node)} is no condition that a filter knows")

    def compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Any:
        if isinstance(op, ast.In | ast.NotIn):
            if not isinstance(right, ast.List | ast.Tuple | ast.Set) or not right.elts:
                raise self.refuse(f"{self.source(right)} after `in` is no list of values")
            # Comparisons joined by `or`, unlike Arrow's is_in, leave a null undecided.
            found = reduce(operator.or_, [self.compare(left, ast.Eq(), each) for each in right.elts])
            return found if isinstance(op, ast.In) else ~found
        if type(op) not in _COMPARE:
            raise self.refuse("`is` is no comparison that a filter knows", do="use == or !=")
        kinds = self.kind(left), self.kind(right)
        if not isinstance(left, ast.Name) and not isinstance(right, ast.Name):
            raise self.refuse(f"{self.source(left)} and {self.source(right)} are compared, but neither is a column")
        if kinds[0] != kinds[1]:
            raise self.refuse(
                f"{self.source(left)} is a {kinds[0]} and {self.source(right)} a {kinds[1]}",
                do='compare what is alike; a text stands in quotes: band == "X"',
            )
        mixed = {self.holds(left), self.holds(right)} == {int, float}
        return _COMPARE[type(op)](self.value(left, mixed), self.value(right, mixed))

    def holds(self, node: ast.expr) -> type:
        return self.columns[self.column(node)] if isinstance(node, ast.Name) else type(self.constant(node))

    def kind(self, node: ast.expr) -> str:
        """What a column or a constant holds: text, number or truth value."""
        return _KINDS[self.holds(node)]

    def value(self, node: ast.expr, as_float: bool = False) -> Any:
        """The Arrow expression of a column or a constant; Arrow itself would meet integers and floats at float32."""
        import pyarrow
        import pyarrow.compute as pc

        if isinstance(node, ast.Name):
            column = pc.field(self.column(node))
            return column.cast(pyarrow.float64(), safe=False) if as_float else column
        value = self.constant(node)
        return pc.scalar(float(value) if as_float else value)

    def column(self, node: ast.Name) -> str:
        name = node.id.removeprefix(_PREFIX)
        if name not in self.columns:
            near = difflib.get_close_matches(name, self.columns, n=1)
            known = f"the columns: {', '.join(self.columns)}; a text stands in quotes"
            raise self.refuse(f"there is no column {name}", do=f"did you mean {near[0]}?" if near else known)
        return name

    def constant(self, node: ast.expr) -> str | int | float | bool:
        match node:
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)) if (
                type(number) is not bool
            ):
                return self.fits(-number)
            case ast.Constant(value=str() | int() | float() as value):
                return self.fits(value)
        if isinstance(node, ast.Constant) and node.value is None:
            raise self.refuse("None cannot be compared", do="a missing value passes no comparison: leave it out")
        raise self.refuse(f"{self.source(node)} is neither a column nor a text nor a number")

    def fits(self, value: Any) -> Any:
        """The constant when Arrow can hold it: 64-bit integers, valid Unicode."""
        if type(value) is int and not -(2**63) <= value < 2**63:
            raise self.refuse(f"{value} does not fit 64 bits")
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise self.refuse(f"{value!r} is not valid Unicode") from None
        return value
