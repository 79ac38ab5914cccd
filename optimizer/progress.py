"""What the user sees while a run works: bars on a terminal, one line a step elsewhere. Always on stderr."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Protocol, Self

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class Steps(Protocol):
    """Told about the steps of a run, one at a time."""

    def begin(self, label: str, total: float) -> None:
        """A step of `total` units begins."""
        ...

    def reach(self, done: float) -> None:
        """`done` units of the current step are behind us."""
        ...

    def end(self, detail: str) -> None:
        """The current step is over; `detail` says how it went."""
        ...


class Bars:
    """One bar for each step, the finished ones kept above the current one."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[detail]}"),
            console=console,
        )
        self._task: TaskID | None = None
        self._total = 1.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, label: str, total: float) -> None:
        """Add a bar."""
        self._total = max(total, 1e-9)
        self._task = self._progress.add_task(label, total=self._total, detail="")

    def reach(self, done: float) -> None:
        """Move it; it fills up only at the end, as totals are estimates."""
        if self._task is not None:
            self._progress.update(self._task, completed=min(done, 0.99 * self._total))

    def end(self, detail: str) -> None:
        """Fill it."""
        if self._task is not None:
            self._progress.update(self._task, completed=self._total, detail=detail)


class Lines:
    """One line when a step ends."""

    def __init__(self) -> None:
        self._label = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def begin(self, label: str, total: float) -> None:  # noqa: ARG002 - no bar, no total
        """Remember what it is about."""
        self._label = label

    def reach(self, done: float) -> None:
        """Nothing is shown in between."""

    def end(self, detail: str) -> None:
        """Print the line."""
        click.echo(f"{self._label}: {detail}", err=True)


def for_terminal() -> Bars | Lines:
    """Bars where standard error is a terminal."""
    return Bars(Console(stderr=True)) if sys.stderr.isatty() else Lines()
