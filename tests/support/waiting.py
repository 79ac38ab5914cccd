"""Waiting for something to become true, with a deadline instead of a sleep."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(look: Callable[[], T], what: str, *, timeout_s: float = 20.0, every_s: float = 0.03) -> T:
    """The first true value of `look`. Fails with `what` and the last value when there is none in time."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := look()):
        if time.monotonic() > deadline_s:
            raise AssertionError(f"waited {timeout_s:g} s in vain for {what}; last: {found!r}")
        time.sleep(every_s)
    return found
