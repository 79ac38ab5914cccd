"""Pure: results of commands, so that a command is done once: the same id again gets the same answer.

Held in memory beside the database, whichever that is at the moment, so that no fault of the disk forgets one.
A result is kept until its command has expired and room is needed; an expired command is refused anyway.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

_MAX_RESULTS, _MAX_BYTES = 1000, 2 << 20


class Result(NamedTuple):
    """The answer to a command, and until when (Unix milliseconds) the command could come again."""

    id: str
    expires_ms: int
    body: bytes


class Results:
    """Bounded: beyond 1,000 or 2 MiB those are forgotten whose commands expire first."""

    def __init__(self) -> None:
        self._all: dict[str, Result] = {}
        self._bytes = 0
        self._new: dict[str, Result] = {}
        self._forgotten: set[str] = set()

    def get(self, command_id: str) -> bytes | None:
        """The body."""
        found = self._all.get(command_id)
        return None if found is None else found.body

    def all(self) -> list[Result]:
        """Everything that is kept."""
        return list(self._all.values())

    def learn(self, stored: Iterable[Result]) -> None:
        """What a database holds; what is known already stays."""
        for result in stored:
            self._keep(result)
        self._bound()

    def add(self, result: Result) -> None:
        """A new one; `changes` names it."""
        self._keep(result)
        self._new[result.id] = self._all[result.id]
        self._bound()

    def changes(self) -> tuple[list[Result], list[str]]:
        """(what is to be stored, ids to be forgotten) since the last `stored`."""
        return list(self._new.values()), sorted(self._forgotten)

    def stored(self) -> None:
        """The changes are in the database."""
        self._new.clear()
        self._forgotten.clear()

    def _keep(self, result: Result) -> None:
        if result.id not in self._all:
            self._all[result.id] = result
            self._bytes += len(result.body)

    def _bound(self) -> None:
        by_expiry: list[Result] = []
        while len(self._all) > _MAX_RESULTS or (self._bytes > _MAX_BYTES and len(self._all) > 1):
            by_expiry = by_expiry or sorted(self._all.values(), key=lambda r: r.expires_ms, reverse=True)
            first = by_expiry.pop()
            del self._all[first.id]
            self._bytes -= len(first.body)
            self._new.pop(first.id, None)
            self._forgotten.add(first.id)
