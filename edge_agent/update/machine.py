"""Pure: the update machine of one model as one table, (state, event) → (next state, actions).

Effects are in driver.py. ARCHITECTURE.md's diagram is generated from TABLE, and the kill tests are
parametrised over it, so a new state is documented and tested the day it is added.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from edge_contract.wire import Outcome


class State(StrEnum):
    """Where an update is. The names travel in wire.ModelState."""

    IDLE = "idle"
    WAITING = "waiting"
    RESOLVING = "resolving"
    DOWNLOADING = "downloading"
    PREFLIGHT = "preflight"
    ACTIVATING = "activating"
    PROBATION = "probation"
    REVERTING = "reverting"


class Event(StrEnum):
    """What can happen."""

    ALREADY = "already"  # the desired state names what serves
    UNWANTED = "unwanted"  # the desired state does not name this model any more
    TARGET = "target"  # the desired state names another version than the one that serves
    RESOLVED = "resolved"  # trust is fresh, the manifest is here and fits, the plan is made
    FETCHED = "fetched"  # every blob verified, the version is in the store
    PASSED = "passed"  # preflight found nothing wrong
    ACTIVATED = "activated"  # the version serves, and the disk says so
    HEALTHY = "healthy"  # probation is over without a finding
    UNHEALTHY = "unhealthy"  # probation found something, or an operator said so
    REJECTED = "rejected"  # the bundle is at fault: never this digest again
    UNFIT = "unfit"  # the device is at fault: not this generation
    INTERRUPTED = "interrupted"  # network, registry or disk: later again, for as long as it takes
    RETRY = "retry"  # the wait is over
    SUPERSEDED = "superseded"  # the desired state changed meanwhile
    REVERTED = "reverted"  # the version before serves, and the disk says so
    ROLLBACK = "rollback"  # an operator wants the version before
    DAMAGED = "damaged"  # what should serve is not whole on the disk, or its link is gone
    TORN = "torn"  # this process started, and the disk does not name what the journal has on probation
    RESTARTED = "restarted"  # this process started and found the journal here


class Action(StrEnum):
    """What the driver does on a transition, beside the journal. Long work is the job of a state."""

    CANCEL = "cancel"  # end the job of the state that is left
    REMEMBER_REJECTED = "remember_rejected"
    REMOVE = "remove"
    RAISE_RELEASE = "raise_release"  # from now on an older release is a downgrade
    COLLECT = "collect"  # after the journal: drop versions that nothing names


class Transition(NamedTuple):
    """Where to, what on the way, and how the attempt ended if it did."""

    state: State
    actions: tuple[Action, ...] = ()
    outcome: Outcome | None = None


class IllegalTransition(RuntimeError):
    """A programmer's mistake: this event cannot happen in this state."""


_S, _E = State, Event
_DROP = (Action.CANCEL,)
_UNFIT = Transition(State.IDLE, (Action.CANCEL, Action.COLLECT), "failed")
_REJECTED = Transition(State.IDLE, (Action.CANCEL, Action.REMEMBER_REJECTED, Action.COLLECT), "failed")

TABLE: dict[tuple[State, Event], Transition] = {
    (_S.IDLE, _E.ALREADY): Transition(_S.IDLE, (Action.RAISE_RELEASE,), "committed"),
    (_S.IDLE, _E.UNWANTED): Transition(_S.IDLE, (Action.REMOVE, Action.COLLECT), "removed"),
    (_S.IDLE, _E.TARGET): Transition(_S.RESOLVING),
    (_S.IDLE, _E.ROLLBACK): Transition(_S.REVERTING),
    (_S.IDLE, _E.DAMAGED): Transition(_S.RESOLVING),
    (_S.IDLE, _E.RESTARTED): Transition(_S.IDLE),
    (_S.WAITING, _E.RETRY): Transition(_S.RESOLVING),
    (_S.WAITING, _E.SUPERSEDED): Transition(_S.IDLE),
    (_S.WAITING, _E.RESTARTED): Transition(_S.WAITING),
    (_S.RESOLVING, _E.RESOLVED): Transition(_S.DOWNLOADING),
    (_S.RESOLVING, _E.REJECTED): _REJECTED,
    (_S.RESOLVING, _E.UNFIT): _UNFIT,
    (_S.RESOLVING, _E.INTERRUPTED): Transition(_S.WAITING, _DROP),
    (_S.RESOLVING, _E.SUPERSEDED): Transition(_S.IDLE, _DROP),
    (_S.RESOLVING, _E.RESTARTED): Transition(_S.RESOLVING),
    (_S.DOWNLOADING, _E.FETCHED): Transition(_S.PREFLIGHT),
    (_S.DOWNLOADING, _E.REJECTED): _REJECTED,
    (_S.DOWNLOADING, _E.UNFIT): _UNFIT,
    (_S.DOWNLOADING, _E.INTERRUPTED): Transition(_S.WAITING, _DROP),
    (_S.DOWNLOADING, _E.SUPERSEDED): Transition(_S.IDLE, _DROP),
    (_S.DOWNLOADING, _E.RESTARTED): Transition(_S.RESOLVING),
    (_S.PREFLIGHT, _E.PASSED): Transition(_S.ACTIVATING),
    (_S.PREFLIGHT, _E.REJECTED): _REJECTED,
    (_S.PREFLIGHT, _E.UNFIT): _UNFIT,
    (_S.PREFLIGHT, _E.INTERRUPTED): Transition(_S.WAITING, _DROP),
    (_S.PREFLIGHT, _E.SUPERSEDED): Transition(_S.IDLE, _DROP),
    (_S.PREFLIGHT, _E.RESTARTED): Transition(_S.RESOLVING),
    (_S.ACTIVATING, _E.ACTIVATED): Transition(_S.PROBATION),
    (_S.ACTIVATING, _E.UNHEALTHY): Transition(_S.REVERTING),
    # The job has made the version before serve again, by the disk and by the inference process.
    (_S.ACTIVATING, _E.INTERRUPTED): Transition(_S.WAITING),
    (_S.ACTIVATING, _E.RESTARTED): Transition(_S.ACTIVATING),
    (_S.PROBATION, _E.HEALTHY): Transition(_S.IDLE, (Action.RAISE_RELEASE, Action.COLLECT), "committed"),
    (_S.PROBATION, _E.UNHEALTHY): Transition(_S.REVERTING),
    (_S.PROBATION, _E.ROLLBACK): Transition(_S.REVERTING, _DROP),
    (_S.PROBATION, _E.TORN): Transition(_S.ACTIVATING),
    (_S.PROBATION, _E.RESTARTED): Transition(_S.PROBATION),
    (_S.REVERTING, _E.REVERTED): Transition(_S.IDLE, (Action.REMEMBER_REJECTED, Action.COLLECT), "reverted"),
    (_S.REVERTING, _E.RESTARTED): Transition(_S.REVERTING),
}

# States in which nothing that serves has been touched, so the attempt can simply be dropped.
CANCELLABLE = frozenset(state for (state, event) in TABLE if event is Event.SUPERSEDED)


def advance(state: State, event: Event) -> Transition:
    """The transition of `event` in `state`. Raises IllegalTransition and changes nothing."""
    try:
        return TABLE[(state, event)]
    except KeyError:
        raise IllegalTransition(f"{event.value} cannot happen in state {state.value}") from None


def diagram() -> str:
    """The table as a Mermaid state diagram, for ARCHITECTURE.md."""
    lines = ["stateDiagram-v2", "    [*] --> idle"]
    merged: dict[tuple[State, State], list[str]] = {}
    for (state, event), transition in TABLE.items():
        merged.setdefault((state, transition.state), []).append(event.value)
    for (state, target), events in merged.items():
        lines.append(f"    {state.value} --> {target.value}: {', '.join(events)}")
    return "\n".join(lines) + "\n"
