"""Who may sign desired states and commands: learnt from TUF by a child, cached on disk, refreshed.

The cache is this device's own file, written only after the metadata that names it was verified.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from edge_agent import files
from edge_agent.layout import Layout
from edge_agent.update.children import Child
from edge_contract import wire
from edge_contract.errors import EdgewardError, Reason, StorageFault

log = logging.getLogger("edge_agent.trust")

FILE = "operators.json"
_EVERY_MS = 3600_000
_AFTER_FAILURE_MS, _AFTER_FAILURES_MS = 10_000, 300_000
_AT_MOST_MS, _PATIENCE_MS = 5_000, 60_000
_TIMEOUT_S = 120.0


class OperatorKeys:
    """Owned by the control loop's thread. Times are monotonic milliseconds."""

    def __init__(
        self, config_path: Path, layout: Layout, tell: Callable[[str], None] = lambda _: None
    ) -> None:
        """`tell` hears once why the disk does not give the cache; that keeps nothing else from working."""
        self._tell = tell
        self._path = layout.trust / FILE
        self._config_path = config_path
        self._child: Child | None = None
        self._next_ms = 0
        self._asked_ms = 0
        self._pause_ms = _AT_MOST_MS
        self._failures = 0
        self._news = False
        self.asked = False  # whether the registry has been asked since this process started
        self.problem = "the registry has not been reached yet"
        self.reason = Reason.OK
        self._stamp: tuple[int, int, int] | None = None
        self._fault = ""
        self.keys: wire.Operators | None = None
        self.reload()
        self._news = False

    def ask(self, now_ms: int) -> None:
        """A message was signed by an unknown key: look again soon, but not at a stranger's pace.

        Each look that finds the same keys makes the next one wait longer, up to a minute.
        """
        self._next_ms = min(self._next_ms, max(now_ms, self._asked_ms + self._pause_ms))

    def tick(self, now_ms: int) -> bool:
        """Refresh when it is time; returns True when a refresh has just ended, well or not."""
        self.reload()
        if self._child is None:
            if now_ms >= self._next_ms:
                self._asked_ms = now_ms
                self._next_ms = now_ms + self._after_failure_ms()  # also when no child can be made now
                self._child = Child(["trust", "--config", str(self._config_path)], timeout_s=_TIMEOUT_S)
            return False
        ended = self._child.ended()
        if ended is None:
            return False
        self._child = None
        self.asked = True
        if ended.code != 0:
            before = self.problem
            self.reason, self.problem = ended.failure()
            if self.problem != before:
                log.warning("the operators' keys cannot be refreshed: %s", self.problem)
            self._failures += 1
            self._next_ms = now_ms + self._after_failure_ms()
        else:
            self.reason, self.problem = Reason.OK, ""
            self._failures = 0
            self._next_ms = now_ms + _EVERY_MS
            self.reload()
            self._pause_ms = _AT_MOST_MS if self._news else min(_PATIENCE_MS, 2 * self._pause_ms)
            self._news = False
        return True

    def _after_failure_ms(self) -> int:
        return min(_AFTER_FAILURES_MS, _AFTER_FAILURE_MS << min(self._failures, 16))

    def reload(self) -> bool:
        """Take what a child has cached, this one's or a fetch.

        Returns False while the disk does not give it: what was known stays, and the next call asks again.
        """
        stamp = files.stamp(self._path)
        if stamp == self._stamp:
            return True
        try:
            found = self._read()
        except StorageFault as e:
            if self._fault != str(e):
                self._fault = str(e)
                self._tell(f"the operators' keys cannot be read: {e}")
            return False
        self._news |= found != self.keys
        self.keys, self._stamp, self._fault = found, stamp, ""  # only now: a fault must not hide new keys
        return True

    def stop(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()

    def _read(self) -> wire.Operators | None:
        data = files.read(self._path)
        if data is None:
            return None
        try:
            return wire.decode(data, wire.Operators)
        except EdgewardError as e:
            self.problem = str(e)
            return None


def cached(path: Path) -> bytes | None:
    """What lies there, or None when it must be written anew; for children, under the lock of trust.

    A filesystem check may leave a folder in its place, or a file that cannot be read any more.
    """
    if path.is_dir() and not path.is_symlink():
        files.remove_tree(path)
    try:
        return files.read(path)
    except StorageFault:
        return None


def keep(path: Path, data: bytes) -> None:
    """Make `data` the cache, if it is not yet. Raises StorageFault."""
    if cached(path) != data:
        files.write(path, data)
