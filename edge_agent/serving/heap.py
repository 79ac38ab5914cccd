"""Gives freed memory back to the kernel after large work: the C library would keep it for later.

A load uses up to twice the model for moments. Without this the process would hold that for its whole life.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

_trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_back() -> None:
    """A few milliseconds; nothing where the C library is another than glibc, which has no such call."""
    if _trim is not None:
        _trim(0)
