"""An end to waiting for another machine: connections are shut at a set time, whoever reads from them then.

A socket's own timeout begins anew with every byte, so lines that come byte by byte outlast it. This knows
sockets and times only; what a bite means is for who waited.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import suppress

_NEVER_S = float("inf")


class Watchdog:
    """Used by one thread; one more runs between `begin` and `release`. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._watched: list[socket.socket] = []
        self._ends_s = _NEVER_S
        self._on_duty = self._running = False
        self.bitten = False

    def begin(self, ends_s: float) -> None:
        """A new request, which has until then. Raises RuntimeError when no thread can be made."""
        with self._changed:
            self._forget()
            self.bitten, self._ends_s, self._on_duty = False, ends_s, True
            self._changed.notify()
            if not self._running:
                threading.Thread(target=self._run, daemon=True).start()
                self._running = True

    def until(self, ends_s: float) -> None:
        """The same request has until then; for a pause, `rest`."""
        with self._changed:
            sooner, self._ends_s = ends_s < self._ends_s, ends_s
            if sooner:
                self._changed.notify()

    def rest(self) -> None:
        """Nobody waits for the other end now."""
        self.until(_NEVER_S)

    def watch(self, connected: socket.socket) -> None:
        """This connection belongs to the request. It is held by a descriptor of our own, so that TLS may wrap
        it and its owner may close it.
        """
        with self._changed:
            self._watched.append(socket.socket(fileno=os.dup(connected.fileno())))
            if self.bitten:
                self._bite()

    def release(self) -> None:
        """The request is over."""
        with self._changed:
            self._forget()
            self._on_duty = False
            self._changed.notify()

    def _forget(self) -> None:
        for one in self._watched:
            one.close()
        self._watched.clear()

    def _run(self) -> None:
        with self._changed:
            while self._on_duty:
                left_s = self._ends_s - time.monotonic()
                if left_s > 0:
                    self._changed.wait(None if left_s == _NEVER_S else left_s)
                    continue
                self._bite()
                self._ends_s = _NEVER_S
            self._running = False

    def _bite(self) -> None:
        self.bitten = True
        for one in self._watched:
            with suppress(OSError):  # the other end was quicker
                one.shutdown(socket.SHUT_RDWR)
