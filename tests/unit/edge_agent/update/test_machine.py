"""The update machine's table: every (state, event), reachability, and the diagram drawn from it."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest

from edge_agent.update.machine import (
    CANCELLABLE,
    TABLE,
    Action,
    Event,
    IllegalTransition,
    State,
    Transition,
    advance,
    diagram,
)
from edge_contract.wire import UpdateState

PAIRS = list(itertools.product(State, Event))
FETCHING = (State.RESOLVING, State.DOWNLOADING, State.PREFLIGHT)


@pytest.mark.parametrize(("state", "event"), PAIRS, ids=lambda v: v.value)
def test_every_pair_is_a_transition_or_refused(state: State, event: Event) -> None:
    before = dict(TABLE)
    if (state, event) in TABLE:
        assert advance(state, event) == TABLE[(state, event)]
    else:
        with pytest.raises(IllegalTransition, match=f"{event.value} cannot happen in state {state.value}"):
            advance(state, event)
    assert before == TABLE


# The transitions that a reader of the design expects, written down a second time on purpose.
@pytest.mark.parametrize(
    ("state", "event", "after", "outcome"),
    [
        (State.IDLE, Event.TARGET, State.RESOLVING, None),
        (State.IDLE, Event.ALREADY, State.IDLE, "committed"),
        (State.IDLE, Event.UNWANTED, State.IDLE, "removed"),
        (State.IDLE, Event.ROLLBACK, State.REVERTING, None),
        (State.RESOLVING, Event.RESOLVED, State.DOWNLOADING, None),
        (State.DOWNLOADING, Event.FETCHED, State.PREFLIGHT, None),
        (State.PREFLIGHT, Event.PASSED, State.ACTIVATING, None),
        (State.ACTIVATING, Event.ACTIVATED, State.PROBATION, None),
        (State.ACTIVATING, Event.UNHEALTHY, State.REVERTING, None),
        (State.PROBATION, Event.HEALTHY, State.IDLE, "committed"),
        (State.PROBATION, Event.UNHEALTHY, State.REVERTING, None),
        (State.REVERTING, Event.REVERTED, State.IDLE, "reverted"),
        *((state, Event.REJECTED, State.IDLE, "failed") for state in FETCHING),
        *((state, Event.UNFIT, State.IDLE, "failed") for state in FETCHING),
        *((state, Event.SUPERSEDED, State.IDLE, None) for state in (*FETCHING, State.WAITING)),
        *((state, Event.INTERRUPTED, State.WAITING, None) for state in (*FETCHING, State.ACTIVATING)),
        (State.IDLE, Event.DAMAGED, State.RESOLVING, None),
        (State.PROBATION, Event.TORN, State.ACTIVATING, None),
        (State.WAITING, Event.RETRY, State.RESOLVING, None),
    ],
)
def test_the_way_of_an_update(state: State, event: Event, after: State, outcome: str | None) -> None:
    transition = advance(state, event)
    assert (transition.state, transition.outcome) == (after, outcome)


def test_every_state_can_be_reached_and_left() -> None:
    reached = {State.IDLE}
    while True:
        more = {t.state for (state, _), t in TABLE.items() if state in reached} - reached
        if not more:
            break
        reached |= more
    assert reached == set(State)
    for state in State:
        assert _leads_to_idle(state), f"{state} has no way back to idle"


def _leads_to_idle(state: State) -> bool:
    seen, queue = {state}, [state]
    while queue:
        here = queue.pop()
        if here is State.IDLE:
            return True
        new = {t.state for (s, _), t in TABLE.items() if s is here} - seen
        seen |= new
        queue += new
    return False


@pytest.mark.parametrize("state", State)
def test_a_restart_is_legal_in_every_state_and_ends_no_attempt(state: State) -> None:
    transition = advance(state, Event.RESTARTED)
    assert transition.outcome is None
    assert transition.actions == ()


@pytest.mark.parametrize("state", [State.ACTIVATING, State.PROBATION, State.REVERTING])
def test_once_serving_was_touched_a_restart_goes_on_where_it_was(state: State) -> None:
    assert advance(state, Event.RESTARTED).state is state
    assert state not in CANCELLABLE


def test_an_attempt_can_be_dropped_before_and_only_before_serving_is_touched() -> None:
    assert set(CANCELLABLE) == {State.WAITING, State.RESOLVING, State.DOWNLOADING, State.PREFLIGHT}


def test_a_bundle_at_fault_is_remembered_and_a_device_at_fault_is_not() -> None:
    for (_, event), transition in TABLE.items():
        remembered = Action.REMEMBER_REJECTED in transition.actions
        assert remembered == (event in (Event.REJECTED, Event.REVERTED))


@pytest.mark.parametrize("state", FETCHING)
def test_leaving_a_state_with_a_child_early_ends_the_child(state: State) -> None:
    for (here, event), transition in TABLE.items():
        early = event in (Event.REJECTED, Event.UNFIT, Event.INTERRUPTED, Event.SUPERSEDED)
        if here is state and early:
            assert Action.CANCEL in transition.actions, event


def test_every_end_of_an_attempt_collects_what_it_left() -> None:
    kept = {Event.ALREADY}  # nothing was fetched
    for (_, event), transition in TABLE.items():
        if transition.outcome is not None and event not in kept:
            assert Action.COLLECT in transition.actions, event


def test_every_state_can_be_reported() -> None:
    assert {s.value for s in State} == set(get_args(UpdateState))


def test_the_diagram_has_every_transition_and_nothing_else() -> None:
    lines = diagram().splitlines()
    assert lines[:2] == ["stateDiagram-v2", "    [*] --> idle"]
    drawn = set()
    for line in lines[2:]:
        edge, _, events = line.strip().partition(": ")
        source, _, target = edge.partition(" --> ")
        drawn |= {(source, event, target) for event in events.split(", ")}
    assert drawn == {(s.value, e.value, t.state.value) for (s, e), t in TABLE.items()}


def test_transitions_are_values() -> None:
    assert Transition(State.IDLE) == Transition(State.IDLE, (), None)
