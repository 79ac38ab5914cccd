"""Run by every Python process that has this folder in its path: the wall clock is what a file says.

libfaketime cannot do this: with real monotonic clocks its clock_nanosleep fails (0.9.10), and without them
it moves what must not move. Monotonic clocks and the times of files stay as they are.
"""

from __future__ import annotations

import datetime
import os
import time

_FILE = os.environ["EDGEWARD_TEST_CLOCK"]
_real_ns = time.time_ns
_started_ns = _real_ns()


def _now_ns() -> int:
    """`+N` and `-N` are seconds to the real time; `@N` is a time at which each process starts."""
    with open(_FILE) as file:
        text = file.read()
    if text.startswith("@"):
        return int(text[1:]) * 1_000_000_000 + _real_ns() - _started_ns
    return _real_ns() + int(text) * 1_000_000_000


class _DateTime(datetime.datetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> _DateTime:
        return cls.fromtimestamp(_now_ns() / 1e9, tz)


time.time_ns = _now_ns
time.time = lambda: _now_ns() / 1e9
datetime.datetime = _DateTime  # type: ignore[misc]
