"""What is asked of a device, and how its reports are read."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from edge_contract import wire
from edge_contract.errors import MessageRejected, Reason
from fleet.rollout import KEYS_SETTLE_S, Ended, Goal, Underway, current_set, judge, next_desired

OLD, OURS, OTHER = "a" * 64, "b" * 64, "c" * 64
ENVELOPE = "e" * 64
WANTED = wire.DesiredModel("fashion", "2", OURS)
IDLE = wire.ModelState("fashion", "idle", version="1", digest=OLD, since_ms=100)


def state(*models: wire.ModelState, generation: int = 4, **changes: Any) -> wire.State:
    base = wire.State(
        schema=1, generation=generation, serving=True, models=list(models), rejected=[], at_ms=1000
    )
    return replace(base, **changes)


def goal(*before: wire.ModelState) -> Goal:
    return Goal(WANTED, 5, ENVELOPE, state(*(before or (IDLE,))))


def tried(**changes: Any) -> wire.ModelState:
    return replace(IDLE, target_version="2", target_digest=OURS, **changes)


def test_committed() -> None:
    done = tried(version="2", digest=OURS, outcome="committed", since_ms=200)
    assert judge(goal(), state(done, generation=5), 1) == Ended("committed")
    assert judge(goal(), state(done, generation=9), 1) == Ended("committed")


def test_committed_and_not_loaded_is_not_the_end() -> None:
    seen = tried(version="2", digest=OURS, outcome="committed", reason=Reason.FAILED_STARTS, detail="d")
    assert judge(goal(), state(seen, generation=5), 1) == Underway(
        "not loaded", 0.0, Reason.FAILED_STARTS, "d"
    )


def test_a_report_from_before_the_order_decides_nothing() -> None:
    done = tried(version="2", digest=OURS, outcome="committed", since_ms=200)
    assert judge(goal(), state(done, generation=4), 1) == Underway("sent")


@pytest.mark.parametrize(
    "moving", ["waiting", "resolving", "downloading", "preflight", "activating", "probation", "reverting"]
)
def test_every_state_but_idle_is_under_way(moving: Any) -> None:
    seen = judge(goal(), state(tried(state=moving, progress=0.25, detail="d"), generation=5), 1)
    assert seen == Underway(moving, 0.25, Reason.OK, "d")


def test_probation_of_ours_is_not_committed_yet() -> None:
    seen = judge(goal(), state(tried(state="probation", version="2", digest=OURS), generation=5), 1)
    assert seen == Underway("probation")


@pytest.mark.parametrize("outcome", ["failed", "reverted"])
def test_thrown_out_with_its_reason(outcome: Any) -> None:
    bad = tried(outcome=outcome, reason=Reason.GOLDEN_MISMATCH, detail="3 of 16 differ", since_ms=200)
    seen = judge(goal(), state(bad, generation=5), 1)
    assert seen == Ended(outcome, Reason.GOLDEN_MISMATCH, "3 of 16 differ")


def test_the_outcome_of_an_attempt_before_ours_is_not_ours() -> None:
    """The same digest failed yesterday; the device has just accepted the order and not begun."""
    yesterday = tried(outcome="failed", reason=Reason.TOO_SLOW, since_ms=100)
    accepted = state(yesterday, generation=5)
    assert judge(goal(yesterday), accepted, 1) == Underway("accepted")
    again = state(replace(yesterday, since_ms=300), generation=5)
    assert judge(goal(yesterday), again, 1) == Ended("failed", Reason.TOO_SLOW)
    remembered = state(replace(yesterday), generation=5, rejected=[OURS])
    assert judge(goal(yesterday), remembered, 1) == Ended("failed", Reason.DIGEST_REJECTED_BEFORE)


def test_the_outcome_of_another_version_is_not_ours() -> None:
    other = replace(IDLE, target_version="3", target_digest=OTHER, outcome="failed", since_ms=200)
    assert judge(goal(), state(other, generation=5), 1) == Underway("accepted")


def test_what_serves_already_is_committed_whatever_was_tried_in_between() -> None:
    serving = replace(
        IDLE, version="2", digest=OURS, target_version="3", target_digest=OTHER, outcome="reverted"
    )
    assert judge(goal(serving), state(serving, generation=5), 1) == Ended("committed")


def test_a_model_that_is_not_there_yet() -> None:
    assert judge(Goal(WANTED, 5, ENVELOPE, state()), state(generation=5), 1) == Underway("accepted")


def test_refused() -> None:
    error = MessageRejected(Reason.EXPIRED, "message expired 3 s ago", "check the clock")
    refused = state(IDLE, refused=str(error), refused_sha256=ENVELOPE)
    assert judge(goal(), refused, 0) == Ended("refused", Reason.EXPIRED, str(error))


def test_the_refusal_of_another_message_is_not_ours() -> None:
    refused = state(IDLE, refused="other [expired] → x", refused_sha256=OTHER)
    assert judge(goal(), refused, 999) == Underway("sent")
    accepted = state(IDLE, generation=5, refused="ours once [expired] → x", refused_sha256=ENVELOPE)
    assert judge(goal(), accepted, 999) == Underway("accepted")


@pytest.mark.parametrize("reason", [Reason.UNSIGNED, Reason.SIGNATURE_INVALID])
def test_a_device_may_be_fetching_the_operators_keys(reason: Reason) -> None:
    text = f"no signature by a trusted operator key [{reason.value}] → sign"
    refused = state(IDLE, refused=text, refused_sha256=ENVELOPE)
    assert judge(goal(), refused, KEYS_SETTLE_S - 1) == Underway("checking keys", 0.0, reason, text)
    assert judge(goal(), refused, KEYS_SETTLE_S) == Ended("refused", reason, text)


@pytest.mark.parametrize("text", ["no code at all", "odd [code_of_tomorrow] → x", "[] →"])
def test_a_refusal_without_a_known_code(text: str) -> None:
    refused = state(IDLE, refused=text, refused_sha256=ENVELOPE)
    assert judge(goal(), refused, 1) == Ended("refused", Reason.NOT_ALLOWED, text)


def desired(reported: wire.State, pending: wire.Desired | None = None, now_ms: int = 50) -> wire.Desired:
    return next_desired(
        WANTED, tenant="t", device="d", state=reported, pending=pending, now_ms=now_ms, expires_ms=99
    )


def test_the_whole_set_with_ours_replaced() -> None:
    other = wire.ModelState("digits", "idle", version="7", digest=OTHER)
    made = desired(state(IDLE, other))
    assert made.generation == 5
    assert made.models == [wire.DesiredModel("digits", "7", OTHER), WANTED]
    assert (made.tenant, made.device, made.issued_ms, made.expires_ms) == ("t", "d", 50, 99)


def test_ours_is_added_to_an_empty_device() -> None:
    made = desired(state(generation=0))
    assert (made.generation, made.models) == (1, [WANTED])


def test_the_set_of_a_device_in_mid_update() -> None:
    moving = wire.ModelState(
        "digits", "downloading", version="7", digest=OTHER, target_version="8", target_digest=OLD
    )
    assert current_set(state(moving)) == [wire.DesiredModel("digits", "8", OLD)]
    back = replace(moving, state="reverting")
    assert current_set(state(back)) == [wire.DesiredModel("digits", "7", OTHER)]
    failed = replace(moving, state="idle", outcome="failed")
    assert current_set(state(failed)) == [wire.DesiredModel("digits", "7", OTHER)]
    never = wire.ModelState("digits", "idle", target_version="8", target_digest=OLD, outcome="failed")
    assert current_set(state(never)) == []


def pending(generation: int, expires_ms: int = 99) -> wire.Desired:
    digits = wire.DesiredModel("digits", "7", OTHER)
    return wire.Desired(
        1, "t", "d", generation, 0, expires_ms, [digits, wire.DesiredModel("fashion", "3", OLD)]
    )


def test_orders_to_a_sleeping_device_add_up() -> None:
    made = desired(state(IDLE), pending(6))
    assert made.generation == 7
    assert made.models == [wire.DesiredModel("digits", "7", OTHER), WANTED]


def test_an_order_that_the_device_has_taken_is_no_base() -> None:
    made = desired(state(IDLE), pending(4))
    assert (made.generation, made.models) == (5, [WANTED])


def test_an_expired_order_is_no_base_but_its_generation_is_used_up() -> None:
    made = desired(state(IDLE), pending(6, expires_ms=40))
    assert (made.generation, made.models) == (7, [WANTED])
