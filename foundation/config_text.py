"""The textual side of the configuration: YAML and overrides to a tree, and words for what is wrong with it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from foundation.errors import ConfigError
from shards.redaction import redact

_KINDS = {int: "whole number", float: "number", str: "text", bool: "true or false", NoneType: "null"}
_BOUNDS = {"gt": "> {}", "ge": ">= {}", "lt": "< {}", "le": "<= {}", "pattern": "matching {}"}


class Problem(NamedTuple):
    """One error: the dotted path, the given value (None with an empty path: a file or an argument), what is allowed."""

    path: str
    value: object
    text: str
    hint: str = ""
    others: tuple[str, ...] = ()
    """Dotted paths of the other keys that take part in a conflict."""

    def follows_from(self, problems: Sequence[Problem]) -> bool:
        """Whether a key that takes part is itself (or lies above or below) one of the keys at fault."""
        mine, theirs = (self.path, *self.others), [problem.path for problem in problems if problem.path]
        return any(f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.") for a in mine for b in theirs)

    def __str__(self) -> str:
        shown = redact(repr(list(self.value) if isinstance(self.value, tuple) else self.value))  # before it is cut
        given = f"{self.path} = {shown if len(shown) <= 60 else shown[:57] + '...'}: " if self.path else ""
        return redact(f"{given}{self.text}") + (f"; did you mean {self.hint}?" if self.hint else "")


class _Loader(yaml.SafeLoader):
    """Safe YAML which also reads 3e-4 as a number and records keys that appear twice."""

    duplicates: list[str]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for child, _ in node.value:
            # Plain keys only: merged ones (<<) may repeat, and super() refuses those that cannot be keys.
            if isinstance(child, yaml.ScalarNode) and child.tag != "tag:yaml.org,2002:merge":
                if child.value in seen:
                    self.duplicates.append(f"line {child.start_mark.line + 1}: {child.value!r} is given twice")
                seen.add(child.value)
        return {str(key): value for key, value in super().construct_mapping(node, deep).items()}


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def parse(text: str) -> tuple[Any, list[str]]:
    """YAML text → (value, what is wrong with it); the value is None when the text cannot be parsed."""
    try:
        loader = _Loader(text)
        loader.duplicates = []
        return loader.get_single_data(), loader.duplicates
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return None, ["not valid YAML: " + " ".join(str(error).split())]


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _read_file(path: Path, chain: tuple[Path, ...]) -> tuple[dict[str, Any], list[Problem]]:
    """The tree of one file over that of its `base:`."""

    def fail(text: str) -> tuple[dict[str, Any], list[Problem]]:
        return {}, [Problem("", None, f"{path}: {text}")]

    if path.resolve() in chain:
        return fail("`base:` leads back to this file")
    try:
        tree, wrong = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        return fail(f"cannot be read ({error.strerror})")
    except UnicodeDecodeError:
        return fail("is not UTF-8 text")
    problems = [Problem("", None, f"{path}: {text}") for text in wrong]
    if tree is None:
        return {}, problems
    if not isinstance(tree, dict):
        return fail(f"must be a mapping of keys to values, not {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is None:
        return tree, problems
    if not isinstance(base, str):
        return {}, [*problems, Problem("base", base, "path of a YAML file, relative to this one")]
    below, more = _read_file(path.parent / base, (*chain, path.resolve()))
    return _merge(below, tree), more + problems


def read_tree(path: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], list[Problem]]:
    """The tree of a file under its overrides `a.b=value` (values as in YAML), and every error met on the way."""
    tree, problems = _read_file(path, ())
    for override in overrides:
        key, equals, text = override.partition("=")
        value, wrong = parse(text)
        if not equals or not all(key.split(".")):
            wrong = ["must have the form section.key=value"]
        problems += [Problem("", None, f"override {override!r}: {text}") for text in wrong]
        if not wrong:
            for part in reversed(key.strip().split(".")):
                value = {part: value}
            tree = _merge(tree, value)
    return tree, problems


def known_paths(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Dotted path → field, sections included, in the order of the tree."""
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        found[prefix + name] = field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= known_paths(field.annotation, f"{prefix}{name}.")
    return found


def suggestion(path: str, known: Sequence[str]) -> str:
    """The known path nearest to a misspelt or misplaced one, or nothing."""
    leaf = path.rpartition(".")[2]

    def nearest(paths: list[str]) -> str:
        return max(paths, key=lambda p: difflib.SequenceMatcher(None, p, path).ratio())

    by_leaf: dict[str, list[str]] = {}
    for candidate in known:
        by_leaf.setdefault(candidate.rpartition(".")[2], []).append(candidate)
    # A right name in a wrong section first, then a slip in the path, then a slip in the name in a wrong section.
    if leaf in by_leaf:
        return nearest(by_leaf[leaf])
    same_section = [p for p in known if p.rpartition(".")[0] == path.rpartition(".")[0]]
    for candidates, cutoff in ((same_section, 0.7), (list(known), 0.8)):
        names = {p.rpartition(".")[2] for p in candidates}
        if close := difflib.get_close_matches(leaf, sorted(names), 1, cutoff):
            return nearest([p for p in candidates if p.rpartition(".")[2] == close[0]])
    return next(iter(difflib.get_close_matches(path, known, 1, 0.75)), "")


def field_problems(error: ValidationError, known: Mapping[str, FieldInfo]) -> Iterator[Problem]:
    """One problem per key that pydantic refused, in its order."""
    for item in error.errors():
        keys = [str(key) for key in item["loc"]]
        path = ".".join(keys)
        if item["type"] == "extra_forbidden":
            yield Problem(path, item["input"], "no such key", suggestion(path, list(known)))
        elif item["type"] == "value_error":
            yield Problem(path, item["input"], str(item["ctx"]["error"]))
        elif item["type"] == "missing":  # of a named section: every other key has a default
            text = f"needs {keys[-1]}, a {allowed(_field(keys, known))}"
            yield Problem(".".join(keys[:-1]), item["input"], text)
        else:
            yield Problem(path, item["input"], allowed(_field(keys, known)))


def _above(keys: Sequence[str], known: Mapping[str, FieldInfo]) -> int:
    """How many of the keys make up the nearest known path: an item of a list is described by its list."""
    return next((n for n in range(len(keys), 0, -1) if ".".join(keys[:n]) in known), len(keys) - 1)


def _field(keys: Sequence[str], known: Mapping[str, FieldInfo]) -> FieldInfo:
    """The field of the nearest known path, or of a key of a named section (`data.amplitude.NAME.scale`)."""
    n = _above(keys, known)
    field = known[".".join(keys[:n])]
    inner = get_args(field.annotation)[1:]
    named = get_origin(field.annotation) is dict and isinstance(inner[0], type) and issubclass(inner[0], BaseModel)
    return inner[0].model_fields.get(keys[-1], field) if named and len(keys) == n + 2 else field


def without_errors(tree: Mapping[str, Any], error: ValidationError, known: Mapping[str, FieldInfo]) -> dict[str, Any]:
    """A copy of the tree without every key that pydantic refused, so that its default stands.

    An entry of a `known` key with names of the user's goes as a whole: what is left of it may lack what has no default.
    """

    def without(branch: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
        head, inner = keys[0], branch.get(keys[0])
        if len(keys) > 1 and isinstance(inner, Mapping):
            return {**branch, head: without(inner, keys[1:])}
        return {key: value for key, value in branch.items() if key != head}

    rest = dict(tree)
    for item in error.errors():
        keys = [str(key) for key in item["loc"]]
        rest = without(rest, keys[: _above(keys, known) + 1])
    return rest


def summary(problems: Sequence[Problem], where: str) -> ConfigError:
    """The one error that lists them all."""
    count = f"{len(problems)} error" + "s" * (len(problems) != 1)
    return ConfigError(
        "\n".join([f"Found {count} in {where}:", *(f"  {problem}" for problem in problems)]),
        do="correct these keys; `foundation list config` shows every key with its range, default and unit",
    )


def allowed(field: FieldInfo) -> str:
    """What a key accepts, in words: type, choices, range."""
    return _words(field.annotation, field.metadata)


def _words(kind: Any, metadata: Sequence[Any] = ()) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _words(args[0], [m for item in args[1:] for m in getattr(item, "metadata", [item])])
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (Union, UnionType):
        bounded, *others = args
        return " or ".join([_words(bounded, metadata), *map(_words, others)])
    if origin is dict:
        return f"name: {_words(args[1])}, ..."
    if origin is tuple:
        least = next((f"at least {n} times " for m in metadata if (n := getattr(m, "min_length", None) or 0) > 1), "")
        return f"list of {least}{_words(args[0])}" if args[-1] is ... else f"list [{'; '.join(map(_words, args))}]"
    bounds = [
        text.format(value)
        for item in metadata
        for name, text in _BOUNDS.items()
        if (value := getattr(item, name, None)) is not None
    ]
    return " ".join([_KINDS.get(kind, "a section of keys"), " and ".join(bounds)]).strip()
