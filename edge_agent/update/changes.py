"""Pure: how an event changes the journal's entry. Where it leads is machine.py's table."""

from __future__ import annotations

from typing import NamedTuple

from msgspec.structs import replace

from edge_agent.stats import VersionStats
from edge_agent.update.journal import NO_PERMISSIONS, Entry, Permissions, Ref
from edge_agent.update.machine import Event, State, Transition
from edge_contract.errors import Reason

_RETRY_CAP_S = 3600.0


class Step(NamedTuple):
    """An event with its reason code and one sentence."""

    event: Event
    reason: Reason = Reason.OK
    detail: str = ""


class Situation(NamedTuple):
    """What an event may depend on besides the entry."""

    now_ms: int
    wanted: Ref | None
    wanted_generation: int
    current: Ref | None
    previous: Ref | None
    baseline: VersionStats | None
    retry_s: float
    permissions: Permissions = NO_PERMISSIONS


def change(entry: Entry, step: Step, transition: Transition, here: Situation) -> Entry:
    """The entry after `step`."""
    moved = transition.state is not entry.state
    after = replace(
        _by_event(entry, step.event, here),
        state=transition.state,
        reason=step.reason,
        detail=step.detail,
        since_ms=here.now_ms if moved else entry.since_ms,
    )
    if transition.outcome is None:
        return after
    return replace(after, outcome=transition.outcome, settled_generation=after.generation, baseline=None)


def _by_event(entry: Entry, event: Event, here: Situation) -> Entry:
    match event:
        case Event.TARGET:
            return replace(
                entry,
                generation=here.wanted_generation,
                target=here.wanted,
                permissions=here.permissions,
                # Where `current` cannot be read, the version before is what a revert can still go to.
                base=here.current or here.previous,
                older=here.previous if here.current else None,
                attempts=1,
                baseline=None,
                outcome="none",
            )
        case Event.ALREADY:
            return replace(entry, generation=here.wanted_generation, target=here.wanted)
        case Event.UNWANTED:
            return replace(entry, generation=here.wanted_generation, target=None, base=None, older=None)
        case Event.INTERRUPTED:
            pause_s = min(_RETRY_CAP_S, here.retry_s * 2 ** (entry.attempts - 1))
            return replace(entry, retry_at_ms=here.now_ms + int(pause_s * 1000))
        case Event.RETRY:
            return replace(entry, attempts=entry.attempts + 1)
        case Event.PASSED:
            return replace(entry, attempts=1, baseline=here.baseline)
        case Event.ACTIVATED:
            return replace(entry, probation_since_ms=here.now_ms)
        case Event.ROLLBACK if entry.state is State.IDLE:
            return replace(entry, target=here.current, base=here.previous, older=None)
        case Event.RESTARTED if entry.state is State.ACTIVATING:
            return replace(entry, attempts=entry.attempts + 1)
        case _:
            return entry
