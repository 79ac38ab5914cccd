"""What this disk holds of one model: which versions its links name, and which of them are damaged.

It looks and remembers; the only thing that it changes is a link to a version before that leads nowhere. What
is done about damage is driver.py's: a step of the machine that it offers as `damage`.
"""

from __future__ import annotations

import time

from edge_agent import files
from edge_agent.layout import Layout
from edge_agent.update import changes
from edge_agent.update.changes import Step
from edge_agent.update.journal import Entry, Ref
from edge_agent.update.machine import Event, State, Transition
from edge_agent.update.store import Store
from edge_contract.errors import Reason


class Holdings:
    """Owned by the driver of its model. Every look raises StorageFault when the disk does not say."""

    def __init__(self, layout: Layout, store: Store, name: str) -> None:
        self._layout, self._store, self._name = layout, store, name
        self.current: Ref | None = None
        self.previous: Ref | None = None
        self.damage: Step | None = None
        self.damaged: Ref | None = None
        self._beyond_repair = ""
        self._settled_s = 0.0

    def learn(self) -> None:
        """Read both links, and the manifests they lead to."""
        self.current = self._store.current(self._name)
        self.previous = self._store.previous(self._name)

    def inspect(self, entry: Entry, wanted: Ref | None, found: str = "") -> None:
        """Look whether an idle model's links lead to what the journal says; `found` says what does not."""
        named, _ = self._store.named(self._name)
        expected = changes.should_serve(entry)
        if entry.state is not State.IDLE or (named is None and expected is None):
            return
        if not found and named is not None and self.current is not None:
            return
        what = found or ("its manifest is damaged or missing" if named else "the link to it is gone")
        refs = (self.current, wanted, entry.target, entry.base, entry.older)
        known = next((ref for ref in refs if ref is not None and ref.digest == named), None)
        ref = known or expected
        if ref is not None:
            self.damaged = ref
            detail = f"{ref.version} is damaged here: {what}"
            self.damage = Step(Event.DAMAGED, Reason.DIGEST_MISMATCH, detail)
        elif self.previous is not None:
            # Nobody remembers which version it was, so it cannot be asked for.
            detail = f"{(named or '')[:12]} is lost here: {what}"
            self.damage = Step(Event.ROLLBACK, Reason.DIGEST_MISMATCH, detail)

    def found_damaged(self, entry: Entry, digest: str, what: str, begun_s: float) -> str:
        """A look that began then found a stored version damaged. Returns what is to be told."""
        stale = begun_s <= self._settled_s
        if stale or entry.state is not State.IDLE or digest == self._beyond_repair:
            return ""
        current, previous = self._store.named(self._name)
        if digest == current:
            self.inspect(entry, None, what)
            return what
        if digest != previous:
            return ""
        files.remove_link(self._layout.previous(self._name))
        self.learn()
        return f"no way back any more: {what}"

    @property
    def repairable(self) -> bool:
        """Whether a repair of what serves has not failed already."""
        return self.current is None or self.current.digest != self._beyond_repair

    def after(self, entry: Entry, transition: Transition) -> None:
        """The journal has made a step: damage is being seen to, or was."""
        if transition.state is not State.IDLE or transition.outcome is not None:
            self.damage = None
        if transition.outcome == "failed" and self.damaged is not None and entry.target == self.damaged:
            self._beyond_repair = self.damaged.digest
        if transition.outcome is not None:
            self._settled_s = time.monotonic()
