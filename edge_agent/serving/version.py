"""One loaded version and who is using it. It does not know which model points at it."""

from __future__ import annotations

import asyncio
import time

from edge_agent.serving.loader import Opened
from edge_agent.serving.metrics import VersionCounters


class Version:
    """Owned by the event loop; workers only call `model.run` and add to `counters`."""

    def __init__(self, opened: Opened) -> None:
        self.manifest = opened.manifest
        self.digest = opened.digest
        self.model = opened.model
        self.form = opened.form
        self.counters = VersionCounters(opened.manifest, opened.digest, int(time.time() * 1000))
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def label(self) -> str:
        """`name@version (digest…)`, for people."""
        return f"{self.manifest.name}@{self.manifest.version} ({self.digest[:12]})"

    def pin(self) -> None:
        """A request starts to use this version."""
        self._in_flight += 1
        self._idle.clear()

    def release(self) -> None:
        """A request no longer uses it."""
        self._in_flight -= 1
        if self._in_flight == 0:
            self._idle.set()

    async def drained(self, timeout_s: float) -> bool:
        """Wait until nobody uses it; False when that takes longer."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
