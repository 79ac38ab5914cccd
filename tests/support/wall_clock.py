"""A wall clock for real processes that can be wrong, and set while they run."""

from __future__ import annotations

import os
from pathlib import Path


class WallClock:
    """Right at first. `environment` is what a process needs to go by it; see wrong_clock/sitecustomize.py."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "wall-clock"
        self.right()
        path = [str(Path(__file__).parent / "wrong_clock"), os.environ.get("PYTHONPATH", "")]
        self.environment = {
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "EDGEWARD_TEST_CLOCK": str(self._file),
        }

    def right(self) -> None:
        """The real time."""
        self._say("+0")

    def shift(self, days: float) -> None:
        """So many days ahead of the real time, or behind it."""
        self._say(f"{days * 86400:+.0f}")

    def start_of_1970(self) -> None:
        """A device without a battery: every process begins at the start of time."""
        self._say("@10")

    def _say(self, text: str) -> None:
        fresh = self._file.with_suffix(".new")
        fresh.write_text(text)
        fresh.replace(self._file)  # it is read at every look at the clock: never half of it
