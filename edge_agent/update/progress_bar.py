"""A bar for people who wait: on a terminal, on standard error, and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

# Called with the bytes done and the bytes there are.
Show = Callable[[int, int], None]


@contextmanager
def shown(*, quiet: bool) -> Iterator[Show]:
    """Something to report to for the length of a block."""
    if quiet or not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    with click.progressbar(length=1, label="importing", file=sys.stderr) as bar:

        def show(done: int, total: int) -> None:
            bar.length = total
            bar.update(done - bar.pos)

        yield show
