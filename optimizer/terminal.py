"""Where tables are printed: standard output, wide enough for reasons also where it is no terminal."""

from __future__ import annotations

import sys

from rich.console import Console

# rich assumes 80 columns where there is no terminal, too few for a row of figures and a reason.
_WIDTH = 140


def console() -> Console:
    """A console on standard output as it is now."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
