"""The documentation: what the guide shows runs as it stands, and every command line anywhere in it is one."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml

from foundation import cli
from foundation.config import describe
from foundation.objectives.registry import OBJECTIVES
from shards.sources import corpora

ROOT = Path(__file__).resolve().parents[2]
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
GUIDE = [ROOT / "docs" / page for part in SITE["nav"] for each in part.get("Guide", ()) for page in each.values()]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
KEYS = {row.path for row in describe()}


class Block(NamedTuple):
    """A fenced block: its language ("" without one), its text, and the page and line where the text begins."""

    language: str
    text: str
    page: Path
    line: int

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.M | re.S):
        yield Block(found[1], found[2], page, text.count("\n", 0, found.start(2)) + 1)


def lines(text: str) -> list[str]:
    """The command lines of a block: those that end with a backslash go on, comments are left out."""
    joined = re.sub(r"\\\n\s*", "", text).splitlines()
    return [line for line in joined if line.strip() and not line.lstrip().startswith("#")]


def words(line: str) -> list[str]:
    """The words behind `foundation` in a command line, [] when it is another command."""
    try:
        split = shlex.split(line, comments=True)
    except ValueError:  # no shell: a table, a tree of folders
        return []
    while split and re.fullmatch(r"[A-Z_]+=.*", split[0]):
        split = split[1:]
    if "foundation" in split and (split[0] == "foundation" or split[split.index("foundation") - 1] == "-m"):
        return split[split.index("foundation") + 1 :]
    return []


@cache
def tree() -> Any:
    cli.extend()
    return typer.main.get_command(cli.app)


def resolve(arguments: list[str]) -> tuple[Any, list[str]]:
    """The command that these words name, and what is left for it."""
    command = tree()
    while arguments and hasattr(command, "commands") and not arguments[0].startswith("-"):
        assert arguments[0] in command.commands, f"there is no command {arguments[0]}"
        command, arguments = command.commands[arguments[0]], arguments[1:]
    return command, arguments


def shown(inline: bool) -> list[Any]:
    """Every line that names a command of `foundation`: of fenced blocks, or of code between words."""
    found = []
    for page in PAGES:
        if inline:
            prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
            found += [(page, " ".join(code.split())) for code in re.findall(r"`(foundation [a-z][^`]*)`", prose)]
        else:
            found += [
                (page, line) for block in blocks(page) if block.language != "python" for line in lines(block.text)
            ]
    return [pytest.param(line, id=f"{page.stem}: {line[:70]}") for page, line in dict.fromkeys(found) if words(line)]


@pytest.mark.parametrize("line", shown(inline=False))
def test_a_command_line_that_is_shown_can_be_typed(line: str) -> None:
    command, rest = resolve(words(line))
    if "--help" in rest:
        return
    try:
        with command.make_context("foundation", list(rest)) as context:
            changed = [change.partition("=")[0] for change in context.params.get("overrides") or ()]
    except Exception as error:  # of click, which some versions of typer carry within
        pytest.fail(f"{line}\n{getattr(error, 'message', error)}")
    assert set(changed) <= KEYS, f"no such key: {set(changed) - KEYS}"


@pytest.mark.parametrize("line", shown(inline=True))
def test_a_command_that_is_spoken_of_exists_with_its_options(line: str) -> None:
    command, rest = resolve(words(line))
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in rest if word.startswith("--")} <= known | {"--help"}


def test_a_command_line_that_cannot_be_typed_is_found() -> None:
    with pytest.raises(AssertionError, match="there is no command trian"):
        resolve(words("foundation trian CONFIG"))
    for wrong in (
        "foundation evaluate RUN --dat corpus",
        "torchrun -m foundation train C optim.lrr=1",
        "foundation shards",
    ):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            test_a_command_line_that_is_shown_can_be_typed(wrong)
    with pytest.raises(AssertionError):
        test_a_command_that_is_spoken_of_exists_with_its_options("foundation paired A B --protocl knn")


@pytest.fixture
def registries() -> Iterator[None]:
    """What pages add to registries is gone afterwards."""
    before = [(each, dict(each)) for each in (OBJECTIVES, corpora())]
    yield
    for registry, rows in before:
        registry.clear()
        registry.update(rows)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.usefixtures("registries", "reported")
def test_the_guide_runs_as_it_stands(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Page after page in one folder beside `configs`, `launch`, `tests`; other commands than ours are given to bash."""
    for name in ("configs", "launch", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    ran = 0
    for page in GUIDE:
        names: dict[str, Any] = {"__name__": page.stem}
        for block in blocks(page):
            if block.language == "python":
                code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
                exec(code, names)
            for line in lines(block.text) if block.language == "bash" else ():
                if ours := words(line):
                    outcome = command(*ours)
                    assert outcome.code == 0, f"{block.where}: {line}\n{outcome.out}{outcome.err}"
                else:
                    subprocess.run(["bash", "-ceu", line], check=True)
            ran += block.language in ("python", "bash")
    assert ran >= 24
    for made in ("runs/demo/report.html", "mine/contact-sheet.png", "mine/audit.html", "curves.png"):
        assert (tmp_path / made).stat().st_size > 1000


def test_the_site_shows_every_page(tmp_path: Path) -> None:
    """`make docs`: no dead link or anchor, and no page outside of the navigation."""
    pytest.importorskip("material", reason="pip install 'sar-foundation[docs]'")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "guide" / "five-minutes" / "index.html").exists()
