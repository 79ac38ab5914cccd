"""The journal: one small file per model that says where its update is, replaced durably at each step.

After any kill the next start reads it and goes on (machine.Event.RESTARTED). A journal that cannot be
read is set aside and reported; what serves is on the disk as a symlink and does not depend on it.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from edge_agent import files
from edge_agent.layout import Layout
from edge_agent.stats import VersionStats
from edge_agent.update.machine import State
from edge_contract import canonical
from edge_contract.errors import Reason
from edge_contract.manifest import Digest, Name, Version
from edge_contract.wire import Outcome


class Ref(Struct, frozen=True, forbid_unknown_fields=True):
    """A version and the digest of its manifest."""

    version: Version
    digest: Digest


class Permissions(Struct, frozen=True, forbid_unknown_fields=True):
    """What the operator's signed desired state allows this target; see wire.DesiredModel."""

    downgrade: bool = False
    interface_change: bool = False


NO_PERMISSIONS = Permissions()


class Entry(Struct, frozen=True, forbid_unknown_fields=True):
    """Where the update of one model is.

    `target` is what is being tried or was tried last, under `permissions`; `base` is what served when the
    attempt began (what a revert goes back to); `older` is what `previous` named then. `settled_generation`
    is the desired generation whose attempt has ended, so that one generation is not tried forever.
    """

    schema: Literal[1]
    name: Name
    state: State = State.IDLE
    generation: int = 0
    settled_generation: int = 0
    target: Ref | None = None
    base: Ref | None = None
    older: Ref | None = None
    permissions: Permissions = NO_PERMISSIONS
    attempts: int = 0
    retry_at_ms: int = 0
    probation_since_ms: int = 0
    baseline: VersionStats | None = None
    outcome: Outcome = "none"
    reason: Reason = Reason.OK
    detail: str = ""
    since_ms: int = 0


def load(layout: Layout, name: str, now_ms: int) -> tuple[Entry, str]:
    """The entry of `name` and what was wrong with its file (empty when nothing was)."""
    path = layout.journal_file(name)
    data = files.read(path)
    if data is None:
        return Entry(schema=1, name=name, since_ms=now_ms), ""
    try:
        return canonical.from_bytes(data, Entry), ""
    except canonical.DecodeFault as e:
        aside = files.set_aside(path, now_ms)
        problem = f"journal of {name} was damaged ({e}) and set aside as {aside.name}"
        return Entry(schema=1, name=name, since_ms=now_ms), problem


def save(layout: Layout, entry: Entry) -> None:
    """Make the entry durable. Raises StorageFault and leaves the entry before."""
    files.write(layout.journal_file(entry.name), canonical.to_bytes(entry))


def names(layout: Layout) -> list[str]:
    """Models that have a journal."""
    return sorted(p.stem for p in layout.journal.glob("*.json"))
