"""Makes prepared forms again that are gone, damaged or of another runtime, while nothing else is under way.

The inference process only reads them: it serves the model of the bundle then, and its index says so. What is
made here serves from the next load on; nothing is loaded anew for it. A version is tried once in the life of
this process, and again when its form decays.
"""

from __future__ import annotations

import logging

from edge_agent.config import Update
from edge_agent.inference import Loaded
from edge_agent.layout import Layout
from edge_agent.update.children import Child
from edge_agent.update.store import Store
from edge_agent.update.trials import preflight_child, preflight_limits
from edge_contract.errors import EdgewardError, StorageFault

log = logging.getLogger("edge_agent.update")

_ORIGINAL = "original"


class Remake:
    """Owned by the control loop's thread. One child at a time."""

    def __init__(self, layout: Layout, store: Store, config: Update) -> None:
        self._layout, self._store, self._config = layout, store, config
        self._tried: set[str] = set()
        self._waiting: list[str] = []
        self._child: Child | None = None

    def notice(self, loaded: list[Loaded]) -> None:
        """Queue what serves from its original although this device could have a form of it."""
        for entry in loaded:
            if entry.ready and entry.form == _ORIGINAL and entry.digest not in self._tried:
                self._tried.add(entry.digest)
                if self._can_have_a_form(entry.digest):
                    self._waiting.append(entry.digest)

    def again(self, digest: str) -> None:
        """Its form has decayed: make another, although one was made before."""
        self._tried.discard(digest)

    def tick(self, *, idle: bool) -> None:
        """Follow the child; start the next when the updater is idle, end it when it is not."""
        if self._child is not None:
            ended = self._child.ended()
            if ended is not None:
                self._child = None
                if ended.code != 0 or not ended.last.get("made"):
                    log.warning("no prepared form was made: %s", ended.last.get("what") or ended.failure()[1])
            elif not idle:
                self.stop()
        elif idle and self._waiting:
            digest = self._waiting.pop(0)
            try:
                limits = preflight_limits(self._layout, self._config)
                self._child = preflight_child(self._layout, digest, self._config, limits)
            except StorageFault as e:
                log.error("no prepared form of %s: %s", digest[:12], e)

    def stop(self) -> None:
        """End the child; its version may be tried again."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def _can_have_a_form(self, digest: str) -> bool:
        if not self._config.prepared_max_bytes:
            return False
        try:
            return self._store.manifest_of(digest).runtime == "onnxruntime"
        except EdgewardError:
            return False  # the updater repairs it; then it is another load
