"""The drop folder between `edge-agent import` and the control process, which may or may not be running.

Whoever may write the state folder may drop here; nothing in it is believed for that. A desired state is
checked like one from the broker.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from edge_agent import files
from edge_agent.layout import Layout
from edge_contract import wire

_DESIRED, _BLOBS = "desired.json", "blobs"


class Arrived(NamedTuple):
    """What lies here: an envelope (empty without one), and its files."""

    desired: bytes
    names: tuple[str, ...]


class Inbox:
    """One device's drop folder."""

    def __init__(self, layout: Layout) -> None:
        self._folder = layout.inbox

    def drop(self, desired: bytes | None) -> None:
        """Say that blobs came, and perhaps what is wanted now. Raises StorageFault."""
        files.make_folder(self._folder)
        if desired is not None:
            files.write(self._folder / _DESIRED, desired)
        files.write(self._folder / _BLOBS, f"{time.time():.0f}\n".encode())

    def look(self) -> Arrived | None:
        """What has been dropped since. Raises StorageFault."""
        names = tuple(n for n in (_DESIRED, _BLOBS) if (self._folder / n).exists())
        if not names:
            return None
        desired = files.read(self._folder / _DESIRED) or b""
        return Arrived(desired[: wire.LIMIT_BYTES + 1], names)

    def done(self, arrived: Arrived) -> None:
        """It has been taken or refused."""
        for name in arrived.names:
            files.remove_link(self._folder / name)
