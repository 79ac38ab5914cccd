"""How the long-running commands end: SIGTERM and SIGINT are a normal end, not a failure."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Whether the end was asked for.

    A pipe and a flag, because a signal handler runs between any two bytecodes of the thread that waits:
    threading.Event would take its own lock twice there.
    """

    def __init__(self) -> None:
        self._asked = False
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def ask(self) -> None:
        """May be called from a signal handler, any number of times."""
        if not self._asked:
            self._asked = True
            os.write(self._write, b".")

    def is_set(self) -> bool:
        """Whether it was asked for."""
        return self._asked

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for it; whether it was asked for."""
        select.select([self._read], [], [], timeout_s)
        return self._asked

    def close(self) -> None:
        """Give the pipe back."""
        os.close(self._read)
        os.close(self._write)


@contextmanager
def until_signalled() -> Iterator[Stop]:
    """Set by SIGTERM and SIGINT; a second SIGINT interrupts, for people who lose patience."""
    stop = Stop()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(number: int, _frame: FrameType | None) -> None:
        stop.ask()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        stop.close()
