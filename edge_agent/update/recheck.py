"""The slow look at what serves: are the stored versions still what they were when they were installed?

A thread at the lowest priority reads them at a low rate, so that a bit that flipped on the disk is found
before a restart would load it. It finds; what is done about it is driver.py's.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from edge_agent import forms, verified
from edge_agent.layout import Layout
from edge_contract.errors import BundleRejected, EdgewardError, Reason, StorageFault

_RATE_BYTES_PER_S = 8 << 20
_LOOK_AT_MOST_EVERY_S = 3600.0
_NICEST = 19


class Found(NamedTuple):
    """A version that is damaged, or that the disk does not give (`damaged` is False).

    `form`: not the version, but a prepared form of it. There the two are the same: it is made again.
    `begun_s`: when the look began, by the monotonic clock; what was repaired since is not meant.
    """

    digest: str
    damaged: bool
    detail: str
    begun_s: float
    form: bool = False


class Recheck:
    """Owned by the control loop's thread; at most one thread of its own."""

    def __init__(self, layout: Layout, recheck_s: float) -> None:
        self._layout = layout
        self._recheck_s = recheck_s
        self._next_s = 0.0
        self._first = True
        self._found: queue.SimpleQueue[Found] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._whole = True
        self._stop = threading.Event()

    def poll(self, digests: Iterable[str], now_ms: int) -> list[Found]:
        """What was found since the last call; begins a look at `digests` when it is time.

        The first look is a quick one, by records; later ones read what was not read for `recheck_s`.
        Raises StorageFault when the last look ended before it was through; the next comes in its time.
        """
        if self._thread is not None and self._thread.is_alive():
            return []
        self._thread = None
        if not self._whole and not self._stop.is_set():
            self._whole = True
            raise StorageFault(
                Reason.STORAGE_FAULT,
                "the look at the stored versions ended before it was through",
                "see the log of edge-agent.service; the next look comes in its time",
            )
        found = []
        while not self._found.empty():
            found.append(self._found.get())
        if time.monotonic() >= self._next_s:
            todo, quick = sorted(set(digests)), self._first
            self._first, self._next_s = False, time.monotonic() + min(self._recheck_s, _LOOK_AT_MOST_EVERY_S)
            self._thread = threading.Thread(target=self._run, args=(todo, quick, now_ms), daemon=True)
            self._whole = False
            try:
                self._thread.start()
            except RuntimeError:  # Python's word for "too many tasks": another time
                self._thread, self._whole = None, True
        return found

    def stop(self) -> None:
        """End the look, soon."""
        self._stop.set()

    def _run(self, digests: list[str], quick: bool, now_ms: int) -> None:
        """The thread. What nobody foresaw goes to the log and ends this look, and `poll` tells of it."""
        with suppress(OSError):  # a seccomp filter may refuse it; then the low rate has to do
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICEST)  # of this thread alone
        self._look(digests, quick, now_ms)
        self._whole = True

    def _look(self, digests: list[str], quick: bool, now_ms: int) -> None:
        begun_s = time.monotonic()
        for digest in digests:
            if self._stop.is_set():
                return
            try:
                if quick:
                    verified.check(self._layout, digest, now_ms)
                elif self._due(digest, now_ms):
                    self._look_at_forms(digest, begun_s)
                    verified.rehash(self._layout, digest, now_ms, self._pace)
            except EdgewardError as e:
                self._found.put(Found(digest, isinstance(e, BundleRejected), e.what, begun_s))

    def _look_at_forms(self, digest: str, begun_s: float) -> None:
        try:
            forms.rehash(self._layout, digest, self._pace)
        except EdgewardError as e:
            self._found.put(Found(digest, True, e.what, begun_s, form=True))

    def _due(self, digest: str, now_ms: int) -> bool:
        known = verified.record(self._layout, digest)
        # By a clock that is not sure: what was read in the future is read again.
        return known is None or not 0 <= now_ms - known.hashed_ms < self._recheck_s * 1000

    def _pace(self, size_bytes: int) -> None:
        self._stop.wait(size_bytes / _RATE_BYTES_PER_S)
