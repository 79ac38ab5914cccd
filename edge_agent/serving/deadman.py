"""Ends this process when it does not get on, also while a runtime hangs and holds the interpreter.

The timer is faulthandler's, whose thread needs no interpreter: it writes where every thread is to standard
error and ends the process with code 1. There is one timer in a process; a load that is under way has it.
"""

from __future__ import annotations

import faulthandler
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_STDERR = 2
_lock = threading.Lock()


class _State:
    """`alive_s`: how long the process may now stay silent, None before the first `alive` and after `rest`."""

    loading = False
    alive_s: float | None = None


@contextmanager
def loading(limit_s: float) -> Iterator[None]:
    """What happens inside ends within `limit_s`, or the process does. One at a time."""
    with _lock:
        _State.loading = True
        _arm(limit_s)
    try:
        yield
    finally:
        with _lock:
            _State.loading = False
            _arm(_State.alive_s)  # at once: the new version may hang before the next sign of life


def alive(limit_s: float) -> None:
    """The process gets on now; if this is not called again within `limit_s`, it ends."""
    _expect(limit_s)


def rest() -> None:
    """Nothing is expected any more."""
    _expect(None)


def _expect(limit_s: float | None) -> None:
    with _lock:
        _State.alive_s = limit_s
        if not _State.loading:
            _arm(limit_s)


def _arm(limit_s: float | None) -> None:
    if limit_s is None:
        faulthandler.cancel_dump_traceback_later()
    else:
        faulthandler.dump_traceback_later(limit_s, exit=True, file=_STDERR)
