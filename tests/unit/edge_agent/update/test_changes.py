"""How each event changes a journal entry."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from edge_agent.stats import VersionStats, empty_latency
from edge_agent.update.changes import (
    Situation,
    Step,
    bounded,
    change,
    pause_left_s,
    should_serve,
    uncounted,
)
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
    retry_max_s=3600.0,
    draw=1.0,
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


@pytest.mark.parametrize(("count", "ceiling_s"), [(0, 30), (1, 60), (2, 120), (7, 3600), (10**6, 3600)])
@pytest.mark.parametrize("draw", [0.0, 0.5, 1.0])
def test_the_ceiling_of_pauses_doubles_up_to_a_cap_and_the_pause_is_drawn_below(
    count: int, ceiling_s: int, draw: float
) -> None:
    before = in_state(State.DOWNLOADING, interruptions=count)
    entry = after(before, Event.INTERRUPTED, HERE._replace(draw=draw))
    assert entry.retry_at_ms == HERE.now_ms + draw * ceiling_s * 1000
    assert (entry.state, entry.outcome, entry.settled_generation) == (State.WAITING, "none", 6)
    assert (entry.interruptions, entry.attempts) == (count + 1, 0)
    told = f"a sentence (interruption {count + 1}, tried again in {draw * ceiling_s:.0f} s)"
    assert entry.detail == told


def test_pauses_begin_anew_once_bytes_have_come() -> None:
    step = Step(Event.INTERRUPTED, Reason.REGISTRY_UNREACHABLE, "", progressed=True)
    before = in_state(State.DOWNLOADING, interruptions=9)
    entry = change(before, step, TABLE[(State.DOWNLOADING, step.event)], HERE)
    assert (entry.interruptions, entry.retry_at_ms) == (1, HERE.now_ms + 30_000)


def test_a_retry_is_no_attempt() -> None:
    assert after(in_state(State.WAITING, attempts=1, interruptions=4), Event.RETRY).attempts == 1


def test_a_target_counts_anew_and_keeps_its_permissions_and_a_repair_needs_none() -> None:
    worn = replace(ENTRY, attempts=3, interruptions=8)
    entry = after(worn, Event.TARGET)
    assert (entry.attempts, entry.interruptions, entry.permissions.downgrade) == (1, 0, False)
    entry = after(worn, Event.DAMAGED, HERE._replace(damaged=V2))
    assert (entry.target, entry.base, entry.older) == (V2, V1, None)
    assert (entry.attempts, entry.interruptions, entry.outcome) == (1, 0, "none")
    assert entry.permissions.downgrade
    assert entry.permissions.interface_change
    assert entry.generation == ENTRY.generation  # a newer wish goes before it


def test_a_repair_of_the_only_version_can_go_back_to_nothing_else() -> None:
    entry = after(ENTRY, Event.DAMAGED, HERE._replace(damaged=V2, previous=None))
    assert (entry.target, entry.base) == (V2, V2)


# what is bounded, and what never is

NEVER = (Reason.REGISTRY_UNREACHABLE, Reason.DISK_FULL, Reason.STORAGE_FAULT, Reason.NOT_PUBLISHED)


@pytest.mark.parametrize("state", [s for s, e in TABLE if e is Event.INTERRUPTED])
@pytest.mark.parametrize("reason", NEVER)
def test_network_registry_and_full_disks_exhaust_nothing(state: State, reason: Reason) -> None:
    entry = in_state(state, attempts=3, interruptions=500)
    step = Step(Event.INTERRUPTED, reason, "later")
    assert bounded(entry, step, 3) == step
    assert after(entry, Event.INTERRUPTED, reason=reason).attempts == 3


@pytest.mark.parametrize(
    ("state", "end"), [(State.PREFLIGHT, Event.UNFIT), (State.ACTIVATING, Event.UNHEALTHY)]
)
def test_a_store_that_is_damaged_again_and_again_comes_to_an_end(state: State, end: Event) -> None:
    entry, step = in_state(state, attempts=1), Step(Event.INTERRUPTED, Reason.DIGEST_MISMATCH, "damaged")
    for _ in range(2):
        assert bounded(entry, step, 3) == step
        entry = replace(after(entry, Event.INTERRUPTED, reason=step.reason), state=state)
    assert bounded(entry, step, 3) == Step(end, step.reason, "damaged (given up after 3 attempts)")


@pytest.mark.parametrize(
    ("state", "end", "what"),
    [
        (State.PREFLIGHT, Event.UNFIT, "preflight"),
        (State.ACTIVATING, Event.UNHEALTHY, "activation"),
        (State.PROBATION, Event.UNHEALTHY, "probation"),
    ],
)
def test_what_is_cut_off_again_and_again_comes_to_an_end(state: State, end: Event, what: str) -> None:
    entry, step = in_state(state, attempts=1), Step(Event.RESTARTED)
    for _ in range(2):
        assert bounded(entry, step, 3) == step
        entry = replace(after(entry, Event.RESTARTED), state=state)
    assert bounded(entry, step, 3) == Step(end, Reason.FAILED_STARTS, f"{what} was cut off 3 times")


@pytest.mark.parametrize("state", State)
def test_an_orderly_stop_takes_the_start_that_follows_back(state: State) -> None:
    entry = in_state(state, attempts=2)
    again = after(uncounted(entry), Event.RESTARTED)
    assert again.attempts == entry.attempts


UNCOUNTED = [State.WAITING, State.RESOLVING, State.DOWNLOADING, State.REVERTING, State.IDLE]


@pytest.mark.parametrize("state", UNCOUNTED)
def test_a_restart_where_the_candidate_does_not_run_is_never_counted(state: State) -> None:
    entry = in_state(state, attempts=99)
    assert bounded(entry, Step(Event.RESTARTED), 3) == Step(Event.RESTARTED)
    assert after(entry, Event.RESTARTED).attempts == 99


# clocks

YEAR_MS = 365 * 86_400_000


@pytest.mark.parametrize(
    ("now_ms", "left_s"),
    [
        (HERE.now_ms, 40.0),
        (HERE.now_ms + 30_000, 10.0),
        (HERE.now_ms + 50_000, 0.0),  # over while nobody ran
        (HERE.now_ms + 56 * YEAR_MS, 0.0),  # 1970, and the network came
        (HERE.now_ms - 1, 0.0),  # set back: nobody knows how long it was
        (0, 0.0),
    ],
)
def test_a_pause_over_a_restart_is_never_longer_than_it_was(now_ms: int, left_s: float) -> None:
    entry = in_state(State.WAITING, retry_at_ms=HERE.now_ms + 40_000, since_ms=HERE.now_ms)
    assert pause_left_s(entry, now_ms, retry_max_s=3600.0) == left_s


def test_a_pause_longer_than_any_can_be_is_none() -> None:
    entry = in_state(State.WAITING, retry_at_ms=HERE.now_ms + 10 * YEAR_MS, since_ms=0)
    assert pause_left_s(entry, HERE.now_ms, retry_max_s=3600.0) == 0.0


# what a journal says that serves

SERVES = [("none", None), ("committed", V3), ("failed", V2), ("reverted", V2), ("removed", None)]


@pytest.mark.parametrize(("outcome", "ref"), SERVES)
def test_an_idle_entry_says_what_should_serve(outcome: str, ref: Ref | None) -> None:
    assert should_serve(in_state(State.IDLE, outcome=outcome)) == ref


@pytest.mark.parametrize("state", sorted(set(State) - {State.IDLE}))
def test_an_entry_under_way_does_not_say_what_should_serve(state: State) -> None:
    assert should_serve(in_state(state, outcome="committed")) is None


def test_passing_preflight_takes_the_baseline() -> None:
    entry = after(in_state(State.PREFLIGHT), Event.PASSED, HERE._replace(baseline=STATS))
    assert entry.baseline == STATS


@pytest.mark.parametrize(("state", "event"), sorted(TABLE))
def test_only_a_new_target_forgets_attempts(state: State, event: Event) -> None:
    """Or an attempt could come through the same states for ever."""
    entry = after(in_state(state, attempts=2), event)
    assert entry.attempts >= 2 or event in (Event.TARGET, Event.DAMAGED)


def test_activation_starts_the_clock_of_probation() -> None:
    assert after(in_state(State.ACTIVATING), Event.ACTIVATED).probation_since_ms == HERE.now_ms


def test_a_restart_counts_where_the_candidate_runs() -> None:
    for state in State:
        counts = state in (State.PREFLIGHT, State.ACTIVATING, State.PROBATION)
        assert after(in_state(state, attempts=1), Event.RESTARTED).attempts == 1 + counts


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
        # What an idle device goes back from had been committed, however the last attempt ended.
        left = "committed" if (state, event) == (State.IDLE, Event.ROLLBACK) else "none"
        assert (changed.settled_generation, changed.outcome) == (3, left)
    else:
        assert changed.outcome == outcome
        assert changed.settled_generation == changed.generation == 7
        assert changed.baseline is None


@pytest.mark.parametrize(("state", "event"), sorted(TABLE))
def test_every_change_carries_its_reason_and_dates_a_move(state: State, event: Event) -> None:
    changed = after(in_state(state), event, reason=Reason.TOO_SLOW)
    assert changed.reason is Reason.TOO_SLOW
    assert changed.detail.startswith("a sentence")
    assert changed.state is TABLE[(state, event)].state
    assert changed.since_ms == (HERE.now_ms if changed.state is not state else 500)
    assert changed.name == "tiny"
