"""The journal: one small file per model that says where its update is, replaced durably at each step.

After any kill the next start reads it and goes on (machine.Event.RESTARTED). A journal that cannot be
read is set aside and reported; what serves is on the disk as a symlink and does not depend on it.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from edge_agent import files, sealed
from edge_agent.layout import Layout
from edge_agent.stats import VersionStats
from edge_agent.update.machine import State
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
    is the desired generation whose attempt has ended, so that one generation is not tried forever. `attempts`
    counts what blames the device or the candidate, `interruptions` what network, registry and disk did.
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
    interruptions: int = 0
    retry_at_ms: int = 0
    probation_since_ms: int = 0
    baseline: VersionStats | None = None
    outcome: Outcome = "none"
    reason: Reason = Reason.OK
    detail: str = ""
    since_ms: int = 0


def load(layout: Layout, name: str, now_ms: int) -> tuple[Entry, str]:
    """The entry of `name` and what was wrong with its file (empty when nothing was).

    Raises StorageFault when the disk does not give it: then nobody knows where the update is.
    """
    found = sealed.read_or_set_aside(layout.journal_file(name), Entry, now_ms)
    fresh = Entry(schema=1, name=name, since_ms=now_ms)
    if isinstance(found, sealed.Damaged):
        return fresh, f"journal of {name} {found.what}"
    if found is not None and found.name != name:
        return fresh, f"journal of {name} is that of {found.name}, and is not used"
    return found or fresh, ""


def needed(layout: Layout, name: str) -> set[str]:
    """Digests of versions that the update under way may serve next. For other processes: changes nothing.

    Raises DecodeFault or StorageFault when the journal does not say.
    """
    entry = sealed.read(layout.journal_file(name), Entry)
    if entry is None or entry.state is State.IDLE:
        return set()
    return {ref.digest for ref in (entry.target, entry.base, entry.older) if ref is not None}


def save(layout: Layout, entry: Entry) -> None:
    """Make the entry durable. Raises StorageFault and leaves the entry before."""
    files.make_folder(layout.journal)
    sealed.write(layout.journal_file(entry.name), entry)


def names(layout: Layout) -> list[str]:
    """Models that have a journal. Raises StorageFault when the disk does not say."""
    suffix = ".json"
    return [n.removesuffix(suffix) for n in files.names(layout.journal) if n.endswith(suffix) and n[0] != "."]
