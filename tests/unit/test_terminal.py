"""A terminal is told by a line that renews itself, a log by lines: no bar, no colour, no escape sequence in a file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import ROOT

from foundation import cli_text
from foundation.config import from_dict
from foundation.training.tracking import open_tracker

COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3|4|9|10)\d(?:;\d+)*m")


@contextmanager
def screen(monkeypatch: pytest.MonkeyPatch, **environment: str) -> Iterator[Callable[[], str]]:
    """stderr is a real terminal; gives what calls back what was printed on it, and closes it."""
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "120", **environment}.items():
        monkeypatch.setenv(name, value)
    ours, theirs = os.openpty()
    shown: list[bytes] = []

    def read() -> None:
        try:
            while part := os.read(ours, 1 << 16):
                shown.append(part)
        except OSError:  # how Linux says that the other side is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with open(theirs, "w", encoding="utf-8") as stderr, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stderr)

        def closed() -> str:
            stderr.close()
            reader.join(10)
            return b"".join(shown).decode()

        yield closed
    reader.join(10)
    os.close(ours)


def train(root: Path) -> None:
    """What a run prints: two moments of it, and a line between them."""
    tracker = open_tracker(from_dict({"name": "run", "run_root": str(root), "tracking": {"mlflow": False}}))
    tracker.log(300, {"loss": 0.5})
    tracker.note("skipped: something")
    tracker.log(600, {"loss": 0.25})
    tracker.close()


def test_a_terminal_gets_a_bar_in_colour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with screen(monkeypatch) as closed:
        train(tmp_path)
        shown = closed()
    assert "━" in shown
    assert COLOUR.search(shown)
    assert "600/28,432,800" in shown
    assert "skipped: something" in shown


def test_no_color_leaves_the_bar_and_takes_its_colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with screen(monkeypatch, NO_COLOR="1") as closed:
        train(tmp_path)
        shown = closed()
    assert "loss 0.2500" in shown
    assert not COLOUR.search(shown)


def test_a_terminal_that_cannot_renew_a_line_gets_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with screen(monkeypatch, TERM="dumb") as closed:
        train(tmp_path)
        with cli_text.working("packing x") as tell:
            tell("packing x: 7 samples read")
        shown = closed().replace("\r\n", "\n")
    assert re.search(r"^ +600/28,432,800 samples  loss 0.2500", shown, re.M)
    assert not re.search(r"[\x1b\r━]", shown)


def test_a_command_that_goes_on_says_so_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    with screen(monkeypatch) as closed:
        with cli_text.working("packing [x]") as tell:
            tell("packing [x]: 7 samples read")
        shown = closed()
    assert "packing [x]" in shown
    assert "\x1b[2K" in shown, "the line is taken away again"


def test_a_command_that_goes_on_writes_few_lines_into_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0
    monkeypatch.setattr(cli_text.time, "monotonic", lambda: now)
    with cli_text.working("packing [x]") as tell:
        for count in range(12):
            now += 7
            tell(f"packing [x]: {count} samples read")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [f"packing [x]: {n} samples read" for n in (4, 9)]


def test_what_a_command_prints_into_a_file_has_no_escape_sequence() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "COLUMNS")}
    found = subprocess.run(
        [sys.executable, "-m", "foundation", "train", "none.yaml"],
        env={**environment, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 2
    assert found.stderr.startswith("ConfigError: ")
    assert "\x1b" not in found.stdout + found.stderr
