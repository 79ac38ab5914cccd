"""Digests that this device has tried and thrown out. They are refused until an operator clears them."""

from __future__ import annotations

from msgspec import Struct

from edge_agent import sealed
from edge_agent.layout import Layout
from edge_contract.errors import Reason, StorageFault
from edge_contract.manifest import Digest


class Rejection(Struct, frozen=True, forbid_unknown_fields=True):
    """Why and when."""

    reason: Reason
    detail: str
    at_ms: int


class Rejected:
    """The durable set of rejected digests.

    While the disk does not give the list, nothing is known to be allowed: `get` and `add` raise
    StorageFault until it does.
    """

    def __init__(self, layout: Layout, now_ms: int) -> None:
        self._path = layout.rejected
        self._now_ms = now_ms
        self.problem = ""
        self._entries: dict[str, Rejection] | None = None
        try:
            self._known()
        except StorageFault as e:
            self.problem = f"the list of rejected digests: {e.what}"

    def get(self, digest: str) -> Rejection | None:
        """Why `digest` was thrown out, or None. Raises StorageFault when nobody can say."""
        return self._known().get(digest)

    def digests(self) -> list[str]:
        """All that are known, sorted."""
        return sorted(self._entries or ())

    def add(self, digest: str, reason: Reason, detail: str, now_ms: int) -> None:
        """Remember durably. Raises StorageFault and remembers nothing."""
        entries = {**self._known(), digest: Rejection(reason, detail, now_ms)}
        sealed.write(self._path, entries)
        self._entries = entries

    def clear(self) -> int:
        """Forget all, on an operator's word; returns how many."""
        count = len(self._entries or ())
        sealed.write(self._path, {})
        self._entries = {}
        return count

    def _known(self) -> dict[str, Rejection]:
        if self._entries is None:
            found = sealed.read_or_set_aside(self._path, dict[Digest, Rejection], self._now_ms)
            if isinstance(found, sealed.Damaged):
                self.problem = f"the list of rejected digests {found.what}"
                found = None
            self._entries = found or {}
        return self._entries
