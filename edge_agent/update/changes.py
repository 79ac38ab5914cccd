"""Pure: how an event changes the journal's entry. Where it leads is machine.py's table."""

from __future__ import annotations

from typing import NamedTuple

from msgspec.structs import replace

from edge_agent.stats import VersionStats
from edge_agent.update.journal import NO_PERMISSIONS, Entry, Permissions, Ref
from edge_agent.update.machine import Event, State, Transition
from edge_contract.errors import Reason

# Doublings beyond this are over every cap; without a bound the power itself would grow for ever.
_MOST_DOUBLINGS = 24
# A kill in these may be the candidate's doing: it can take a box down, not only its own process.
_PERHAPS_ITS_DOING = frozenset({State.PREFLIGHT, State.ACTIVATING, State.PROBATION})
# What the store should hold whole is not: this disk is at fault, and not for ever.
STORE_AT_FAULT = frozenset({Reason.DIGEST_MISMATCH, Reason.BLOB_MISSING, Reason.NOT_FOUND, Reason.BAD_INPUT})

# A repair brings back what served already, whatever was released since.
_AS_IT_WAS = Permissions(downgrade=True, interface_change=True)


class Step(NamedTuple):
    """An event with its reason code and one sentence. `progressed`: bytes had come before it happened.

    `pause_s`: how long the other end, a window or a metered link asks to wait; 0 when nobody said.
    """

    event: Event
    reason: Reason = Reason.OK
    detail: str = ""
    progressed: bool = False
    pause_s: float = 0.0


class Situation(NamedTuple):
    """What an event may depend on besides the entry. `draw` is random, in [0, 1)."""

    now_ms: int
    wanted: Ref | None
    wanted_generation: int
    current: Ref | None
    previous: Ref | None
    baseline: VersionStats | None
    retry_s: float
    retry_max_s: float
    draw: float
    damaged: Ref | None = None
    permissions: Permissions = NO_PERMISSIONS


def change(entry: Entry, step: Step, transition: Transition, here: Situation) -> Entry:
    """The entry after `step`."""
    moved = transition.state is not entry.state
    after = _by_event(entry, step, here)
    after = replace(
        after,
        state=transition.state,
        reason=step.reason,
        detail=_told(after, step, here),
        since_ms=here.now_ms if moved else entry.since_ms,
    )
    if transition.outcome is None:
        return after
    return replace(after, outcome=transition.outcome, settled_generation=after.generation, baseline=None)


def _by_event(entry: Entry, step: Step, here: Situation) -> Entry:
    match step.event:
        case Event.TARGET:
            begun = _begun(entry, here, here.wanted)
            return replace(begun, generation=here.wanted_generation, permissions=here.permissions)
        case Event.DAMAGED:
            # With nothing before it, a revert stays with it: a repair must not take away what is there.
            stays = here._replace(current=here.previous or here.damaged, previous=None)
            return replace(_begun(entry, stays, here.damaged), permissions=_AS_IT_WAS)
        case Event.ALREADY:
            return replace(entry, generation=here.wanted_generation, target=here.wanted)
        case Event.UNWANTED:
            return replace(entry, generation=here.wanted_generation, target=None, base=None, older=None)
        case Event.INTERRUPTED:
            return _interrupted(entry, step, here)
        case Event.PASSED:
            return replace(entry, baseline=here.baseline)
        case Event.ACTIVATED:
            return replace(entry, probation_since_ms=here.now_ms)
        case Event.ROLLBACK if entry.state is State.IDLE:
            return replace(entry, target=here.current, base=here.previous, older=None, outcome="committed")
        case Event.RESTARTED | Event.TORN if entry.state in _PERHAPS_ITS_DOING:
            return replace(entry, attempts=entry.attempts + 1)
        case _:
            return entry


def _begun(entry: Entry, here: Situation, target: Ref | None) -> Entry:
    return replace(
        entry,
        target=target,
        # Where `current` cannot be served, the version before is what a revert can still go to.
        base=here.current or here.previous,
        older=here.previous if here.current else None,
        attempts=1,
        interruptions=0,
        baseline=None,
        outcome="none",
    )


def _interrupted(entry: Entry, step: Step, here: Situation) -> Entry:
    """Exponential backoff with full jitter (Brooker 2015), capped; it begins anew once bytes came.

    A pause that was asked for is kept, under the same cap, with a little jitter: a fleet shares its window.
    """
    count = 1 if step.progressed else entry.interruptions + 1
    ceiling_s = min(here.retry_max_s, here.retry_s * 2 ** min(count - 1, _MOST_DOUBLINGS))
    pause_s = here.draw * ceiling_s
    if step.pause_s:
        pause_s = min(here.retry_max_s, step.pause_s + here.draw * here.retry_s)
    return replace(
        entry,
        interruptions=count,
        attempts=entry.attempts + blames_device(entry.state, step),
        retry_at_ms=here.now_ms + int(pause_s * 1000),
    )


def _told(after: Entry, step: Step, here: Situation) -> str:
    """The sentence of a step; of an interruption, also the how manieth it is and when the next try comes."""
    if step.event is not Event.INTERRUPTED:
        return step.detail
    pause_s = (after.retry_at_ms - here.now_ms) / 1000
    return f"{step.detail} (interruption {after.interruptions}, tried again in {pause_s:.0f} s)"


def blames_device(state: State, step: Step) -> bool:
    """Whether an interruption counts against `max_attempts`: what had been verified was not whole later."""
    late = state in (State.PREFLIGHT, State.ACTIVATING)
    return late and step.event is Event.INTERRUPTED and step.reason in STORE_AT_FAULT


def bounded(entry: Entry, step: Step, max_attempts: int) -> Step:
    """One attempt too many becomes an end. Network, registry and a full disk never come to that."""
    counted = step.event is Event.RESTARTED and entry.state in _PERHAPS_ITS_DOING
    counted = counted or step.event is Event.TORN or blames_device(entry.state, step)
    if not counted or entry.attempts < max_attempts:
        return step
    end = Event.UNFIT if entry.state is State.PREFLIGHT else Event.UNHEALTHY
    if step.event is Event.INTERRUPTED:
        return Step(end, step.reason, f"{step.detail} (given up after {entry.attempts} attempts)")
    what = {State.PREFLIGHT: "preflight", State.ACTIVATING: "activation"}.get(entry.state, "probation")
    return Step(end, Reason.FAILED_STARTS, f"{what} was cut off {entry.attempts} times")


def uncounted(entry: Entry) -> Entry:
    """The entry at an orderly stop: the start that follows is nobody's fault."""
    if entry.state in _PERHAPS_ITS_DOING:
        return replace(entry, attempts=max(0, entry.attempts - 1))
    return entry


def pause_left_s(entry: Entry, now_ms: int, retry_max_s: float) -> float:
    """What is left of a pause at a start. A clock that was set meanwhile makes it none, never years."""
    left_s = (entry.retry_at_ms - now_ms) / 1000
    return left_s if now_ms >= entry.since_ms and 0 < left_s <= retry_max_s else 0.0


def should_serve(entry: Entry) -> Ref | None:
    """What an idle entry says is in service; None when it does not know."""
    if entry.state is not State.IDLE:
        return None
    return {"committed": entry.target, "failed": entry.base, "reverted": entry.base}.get(entry.outcome)
