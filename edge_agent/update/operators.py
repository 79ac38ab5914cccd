"""Who may sign desired states and commands: learnt from TUF by a child, cached on disk, refreshed.

The cache is this device's own file, written only after the metadata that names it was verified.
"""

from __future__ import annotations

import logging
from pathlib import Path

from edge_agent import files
from edge_agent.layout import Layout
from edge_agent.update.children import Child
from edge_contract import wire
from edge_contract.errors import EdgewardError, Reason

log = logging.getLogger("edge_agent.trust")

FILE = "operators.json"
_EVERY_MS = 3600_000
_AFTER_FAILURE_MS = 10_000
_AT_MOST_MS = 5_000
_TIMEOUT_S = 120.0


class OperatorKeys:
    """Owned by the control loop's thread."""

    def __init__(self, config_path: Path, layout: Layout) -> None:
        self._path = layout.trust / FILE
        self._config_path = config_path
        self._child: Child | None = None
        self._next_ms = 0
        self._asked_ms = 0
        self.asked = False  # whether the registry has been asked since this process started
        self.problem = "the registry has not been reached yet"
        self.reason = Reason.OK
        self.keys = self._read()

    def ask(self, now_ms: int) -> None:
        """A message was signed by an unknown key: look again soon, but not at a stranger's pace."""
        self._next_ms = min(self._next_ms, max(now_ms, self._asked_ms + _AT_MOST_MS))

    def tick(self, now_ms: int) -> bool:
        """Refresh when it is time; returns True when a refresh has just ended, well or not."""
        if self._child is None:
            if now_ms >= self._next_ms:
                self._asked_ms = now_ms
                self._next_ms = now_ms + _AFTER_FAILURE_MS  # also when no child can be made now
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
            self._next_ms = now_ms + _AFTER_FAILURE_MS
        else:
            self.reason, self.problem = Reason.OK, ""
            self._next_ms = now_ms + _EVERY_MS
            self.keys = self._read()
        return True

    def reload(self) -> None:
        """Another child (a fetch) may have refreshed the cache."""
        self.keys = self._read()

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
