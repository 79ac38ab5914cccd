"""Asks the inference process to load again what it should have in memory and has not.

That is a model that the disk names and that is not loaded, and one that is loaded from a prepared form that
has decayed on the disk: such a form is removed, and the original takes its place. Nothing is chosen here:
what serves is still what the links name.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial

from edge_agent import files
from edge_agent.inference import InferenceClient, Loaded
from edge_agent.layout import Layout
from edge_contract.errors import EdgewardError

log = logging.getLogger("edge_agent.update")

_PAUSE_S, _PAUSE_MAX_S = 5.0, 600.0
_LOAD_TIMEOUT_S = 120.0
_PREPARED = "prepared"
_MOST_DOUBLINGS = 12


class Reload:
    """Owned by the control loop's thread; at most one thread of its own, for one request."""

    def __init__(self, layout: Layout, inference: InferenceClient) -> None:
        self._layout, self._inference = layout, inference
        self._decayed: set[str] = set()
        self._asked: dict[str, tuple[int, float]] = {}
        self._thread: threading.Thread | None = None

    def decayed(self, digest: str) -> None:
        """The prepared forms of a version are not what they were."""
        self._decayed.add(digest)

    def hurry(self) -> None:
        """Somebody has ordered something: no pause is kept."""
        self._asked.clear()

    def notice(self, loaded: Iterable[Loaded], unserved: Iterable[str]) -> None:
        """Ask for what is missing, each model after growing pauses. `unserved`: models that are not loaded.

        Raises StorageFault when a form that has decayed cannot be removed; then it is asked for again.
        """
        wishes: dict[str, Callable[[], None]] = {
            e.name: partial(self._inference.load, e.name, e.digest, _LOAD_TIMEOUT_S, original=True)
            for e in loaded
            if e.ready and e.form == _PREPARED and e.digest in self._decayed
        }
        wishes |= {name: partial(self._inference.load, name, None, _LOAD_TIMEOUT_S) for name in unserved}
        self._asked = {name: asked for name, asked in self._asked.items() if name in wishes}
        for digest in sorted(self._decayed):
            files.remove_tree(self._layout.prepared / digest)
        self._decayed &= {e.digest for e in loaded if e.form == _PREPARED}
        for name, ask in wishes.items():
            self._ask(name, ask)

    def _ask(self, name: str, ask: Callable[[], None]) -> None:
        times, next_s = self._asked.get(name, (0, 0.0))
        busy = self._thread is not None and self._thread.is_alive()
        if busy or time.monotonic() < next_s:
            return
        pause_s = min(_PAUSE_MAX_S, _PAUSE_S * 2 ** min(times, _MOST_DOUBLINGS))
        self._asked[name] = (times + 1, time.monotonic() + pause_s)
        self._thread = threading.Thread(target=_try, args=(name, ask), daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # Python's word for "too many tasks": another time
            self._thread = None


def _try(name: str, ask: Callable[[], None]) -> None:
    try:
        ask()
    except EdgewardError as e:
        log.error("%s is not loaded again: %s", name, e.what)
    else:
        log.info("%s was loaded again", name)
