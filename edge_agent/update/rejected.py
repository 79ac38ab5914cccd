"""Digests that this device has tried and thrown out. They are refused until an operator clears them."""

from __future__ import annotations

from msgspec import Struct

from edge_agent import files
from edge_agent.layout import Layout
from edge_contract import canonical
from edge_contract.errors import Reason
from edge_contract.manifest import Digest


class Rejection(Struct, frozen=True, forbid_unknown_fields=True):
    """Why and when."""

    reason: Reason
    detail: str
    at_ms: int


class Rejected:
    """The durable set of rejected digests."""

    def __init__(self, layout: Layout, now_ms: int) -> None:
        self._path = layout.rejected
        self.problem = ""
        self._entries: dict[str, Rejection] = {}
        data = files.read(self._path)
        if data is None:
            return
        try:
            self._entries = canonical.from_bytes(data, dict[Digest, Rejection])
        except canonical.DecodeFault as e:
            aside = files.set_aside(self._path, now_ms)
            self.problem = f"the list of rejected digests was damaged ({e}) and set aside as {aside.name}"

    def get(self, digest: str) -> Rejection | None:
        """Why `digest` was thrown out, or None."""
        return self._entries.get(digest)

    def digests(self) -> list[str]:
        """All of them, sorted."""
        return sorted(self._entries)

    def add(self, digest: str, reason: Reason, detail: str, now_ms: int) -> None:
        """Remember durably. Raises StorageFault and remembers nothing."""
        entries = {**self._entries, digest: Rejection(reason, detail, now_ms)}
        files.write(self._path, canonical.to_bytes(entries))
        self._entries = entries

    def clear(self) -> int:
        """Forget all, on an operator's word; returns how many."""
        count = len(self._entries)
        files.write(self._path, canonical.to_bytes({}))
        self._entries = {}
        return count
