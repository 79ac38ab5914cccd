"""How the long-running commands end: SIGTERM and SIGINT are a normal end, not a failure."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def until_signalled() -> Iterator[Event]:
    """An event that is set by the first SIGTERM or SIGINT; a second one acts as it did before."""
    asked = Event()
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def ask(_number: int, _frame: FrameType | None) -> None:
        asked.set()
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in _SIGNALS:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
