"""How each event changes a journal entry."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from edge_agent.stats import VersionStats, empty_latency
from edge_agent.update.changes import Situation, Step, change
from edge_agent.update.journal import Entry, Permissions, Ref
from edge_agent.update.machine import TABLE, Event, State, advance
from edge_contract.errors import Reason

V1, V2, V3 = (Ref(f"{n}.0.0", str(n) * 64) for n in (1, 2, 3))
STATS = VersionStats("tiny", "1.0.0", V1.digest, 5, 10, 0, 0, empty_latency(), {})
HERE = Situation(
    now_ms=1_000_000,
    wanted=V3,
    wanted_generation=7,
    current=V2,
    previous=V1,
    baseline=None,
    retry_s=30.0,
)
ENTRY = Entry(schema=1, name="tiny", generation=6, settled_generation=6, since_ms=500)


def after(entry: Entry, event: Event, here: Situation = HERE, reason: Reason = Reason.OK) -> Entry:
    return change(entry, Step(event, reason, "a sentence"), advance(entry.state, event), here)


def in_state(state: State, **fields: object) -> Entry:
    return replace(ENTRY, **{"state": state, "generation": 7, "target": V3, "base": V2, "older": V1} | fields)


def test_a_new_target_remembers_what_served() -> None:
    entry = after(replace(ENTRY, attempts=3, outcome="failed", baseline=STATS), Event.TARGET)
    assert (entry.target, entry.base, entry.older) == (V3, V2, V1)
    assert (entry.generation, entry.attempts, entry.outcome, entry.baseline) == (7, 1, "none", None)
    assert entry.settled_generation == 6  # not before it has ended
    assert (entry.state, entry.since_ms, entry.detail) == (State.RESOLVING, 1_000_000, "a sentence")


def test_a_new_target_comes_with_its_permissions_and_the_next_without_them() -> None:
    allowed = Permissions(interface_change=True)
    entry = after(ENTRY, Event.TARGET, HERE._replace(permissions=allowed))
    assert entry.permissions == allowed
    assert after(entry, Event.RESOLVED).permissions == allowed
    assert after(replace(entry, state=State.IDLE), Event.TARGET).permissions == Permissions()


def test_already_there_settles_the_generation_without_an_attempt() -> None:
    entry = after(ENTRY, Event.ALREADY)
    assert (entry.state, entry.outcome, entry.settled_generation, entry.target) == (
        State.IDLE,
        "committed",
        7,
        V3,
    )
    assert entry.since_ms == ENTRY.since_ms


def test_unwanted_forgets_all_versions() -> None:
    entry = after(replace(ENTRY, target=V2, base=V1), Event.UNWANTED)
    assert (entry.target, entry.base, entry.older) == (None, None, None)
    assert (entry.outcome, entry.settled_generation) == ("removed", 7)


@pytest.mark.parametrize(("attempts", "pause_s"), [(1, 30), (2, 60), (3, 120), (8, 3600), (300, 3600)])
def test_each_interruption_waits_twice_as_long_up_to_an_hour(attempts: int, pause_s: int) -> None:
    entry = after(in_state(State.DOWNLOADING, attempts=attempts), Event.INTERRUPTED)
    assert entry.retry_at_ms == HERE.now_ms + pause_s * 1000
    assert (entry.state, entry.outcome, entry.settled_generation) == (State.WAITING, "none", 6)


def test_a_retry_counts_as_an_attempt() -> None:
    assert after(in_state(State.WAITING, attempts=1), Event.RETRY).attempts == 2


def test_passing_preflight_takes_the_baseline_and_counts_activations_anew() -> None:
    entry = after(in_state(State.PREFLIGHT, attempts=3), Event.PASSED, HERE._replace(baseline=STATS))
    assert (entry.baseline, entry.attempts) == (STATS, 1)


def test_activation_starts_the_clock_of_probation() -> None:
    assert after(in_state(State.ACTIVATING), Event.ACTIVATED).probation_since_ms == HERE.now_ms


def test_a_restart_in_activation_counts_and_elsewhere_does_not() -> None:
    assert after(in_state(State.ACTIVATING, attempts=1), Event.RESTARTED).attempts == 2
    for state in set(State) - {State.ACTIVATING}:
        assert after(in_state(state, attempts=1), Event.RESTARTED).attempts == 1


def test_a_restart_in_probation_keeps_its_clock_and_baseline() -> None:
    entry = in_state(State.PROBATION, probation_since_ms=123, baseline=STATS)
    changed = after(entry, Event.RESTARTED)
    assert (changed.probation_since_ms, changed.baseline, changed.since_ms) == (123, STATS, 500)


def test_rollback_when_idle_makes_the_version_before_the_base() -> None:
    entry = after(replace(ENTRY, target=V3, base=V3), Event.ROLLBACK, reason=Reason.OPERATOR_ROLLBACK)
    assert (entry.target, entry.base, entry.older) == (V2, V1, None)
    assert (entry.state, entry.reason) == (State.REVERTING, Reason.OPERATOR_ROLLBACK)


def test_rollback_in_probation_goes_back_to_the_base_of_the_attempt() -> None:
    entry = after(in_state(State.PROBATION), Event.ROLLBACK)
    assert (entry.target, entry.base, entry.older) == (V3, V2, V1)


@pytest.mark.parametrize(("state", "event"), sorted(TABLE))
def test_an_outcome_settles_the_generation_and_drops_the_baseline(state: State, event: Event) -> None:
    entry = in_state(state, baseline=STATS, settled_generation=3, outcome="none")
    changed = after(entry, event)
    outcome = TABLE[(state, event)].outcome
    if outcome is None:
        assert (changed.settled_generation, changed.outcome) == (3, "none")
    else:
        assert changed.outcome == outcome
        assert changed.settled_generation == changed.generation == 7
        assert changed.baseline is None


@pytest.mark.parametrize(("state", "event"), sorted(TABLE))
def test_every_change_carries_its_reason_and_dates_a_move(state: State, event: Event) -> None:
    changed = after(in_state(state), event, reason=Reason.TOO_SLOW)
    assert (changed.reason, changed.detail) == (Reason.TOO_SLOW, "a sentence")
    assert changed.state is TABLE[(state, event)].state
    assert changed.since_ms == (HERE.now_ms if changed.state is not state else 500)
    assert changed.name == "tiny"
