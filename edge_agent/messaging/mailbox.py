"""What the MQTT thread tells the control loop: a queue that knows how many bytes wait in it.

It refuses nothing; whoever fills it looks at `full` and waits.
"""

from __future__ import annotations

import queue
import threading
from typing import Any

MAX_EVENTS, MAX_BYTES = 500, 4 << 20


class Mailbox:
    """Filled by one thread and emptied by another."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Any, int]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._bytes = 0

    @property
    def full(self) -> bool:
        """Whether more waits than memory should be spent on."""
        return self._queue.qsize() > MAX_EVENTS or self._bytes > MAX_BYTES

    @property
    def bytes(self) -> int:
        """What waits, as `put` was told."""
        return self._bytes

    def put(self, event: Any, size_bytes: int = 0) -> None:
        """Append an event that holds so many bytes."""
        with self._lock:
            self._bytes += size_bytes
        self._queue.put((event, size_bytes))

    def get(self, timeout: float | None = None) -> Any:
        """The oldest event. Raises queue.Empty when there was none within `timeout` seconds."""
        event, size_bytes = self._queue.get(timeout=timeout)
        with self._lock:
            self._bytes -= size_bytes
        return event

    def empty(self) -> bool:
        """Whether nothing waits."""
        return self._queue.empty()

    def qsize(self) -> int:
        """How many events wait."""
        return self._queue.qsize()
