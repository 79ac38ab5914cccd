"""What is shown while a run works."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from optimizer import progress
from optimizer.progress import Bars, Lines, Steps


def play(steps: Steps) -> None:
    steps.begin("measuring", 4)
    steps.reach(2)
    steps.reach(40)
    steps.end("4 models")
    steps.begin("writing", 1)
    steps.end("out")


def test_a_line_for_each_step_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Lines() as steps:
        play(steps)
    shown = capsys.readouterr()
    assert shown.err == "measuring: 4 models\nwriting: out\n"
    assert shown.out == ""


def test_bars_on_a_terminal() -> None:
    screen = io.StringIO()
    with Bars(Console(file=screen, force_terminal=True, width=120)) as steps:
        play(steps)
    shown = screen.getvalue()
    assert "━" in shown
    assert "measuring" in shown
    assert "4 models" in shown
    assert shown.rstrip().endswith("\x1b[?25h"), "the cursor comes back"


def test_an_overlong_step_is_not_shown_as_done() -> None:
    screen = io.StringIO()
    with Bars(Console(file=screen, force_terminal=True, width=120)) as steps:
        steps.begin("measuring", 4)
        steps.reach(40)
        assert not steps._progress.finished
        steps.end("")
        assert steps._progress.finished


def test_the_terminal_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(progress.for_terminal(), Lines)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert isinstance(progress.for_terminal(), Bars)
