"""When a transfer is tried again and how fast it goes; windows; room on the disk. Values in, values out."""

from __future__ import annotations

from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.config import Registry
from edge_agent.update import plan, window
from edge_agent.update.pacing import LONGEST_DEFERRAL_S, LowSpeed, Rate, backoff_s, retry_after_s
from edge_agent.update.plan import Leftover
from edge_contract import canonical

NOW_S = 1_800_000_000.0


def test_the_bound_of_pauses_doubles_and_ends() -> None:
    assert [backoff_s(n) for n in (1, 2, 3, 6, 7, 10_000)] == [1.0, 2.0, 4.0, 30.0, 30.0, 30.0]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        (" 120 ", 120.0),
        ("9" * 400, LONGEST_DEFERRAL_S),
        (formatdate(NOW_S + 90, usegmt=True), 90.0),
        (formatdate(NOW_S - 90, usegmt=True), 0.0),
        (formatdate(NOW_S + 1e9, usegmt=True), LONGEST_DEFERRAL_S),
        (None, None),
        ("", None),
        ("soon", None),
        ("-5", None),
        ("1.5", None),
        ("٣", None),
        ("Fri, 99 Foo 9999999 99:99:99 GMT", None),
    ],
)
def test_retry_after(value: str | None, seconds: float | None) -> None:
    assert retry_after_s(value, NOW_S) == seconds


@given(st.text(max_size=40))
def test_no_retry_after_breaks_it(value: str) -> None:
    found = retry_after_s(value, NOW_S)
    assert found is None or 0 <= found <= LONGEST_DEFERRAL_S


def test_low_speed_is_judged_span_by_span() -> None:
    watch = LowSpeed(10, 5, now_s=0)
    assert not watch.too_slow(1, 4.9)
    assert not watch.too_slow(49, 5.0)  # 50 in 5 s is just enough
    assert not watch.too_slow(0, 9.9)
    assert watch.too_slow(49, 10.1)
    assert not LowSpeed(0, 5, now_s=0).too_slow(0, 100)


def test_the_rate_holds_over_pauses_and_saves_nothing_up() -> None:
    rate = Rate(100, now_s=0.0)
    assert rate.pause_s(50, 0.0) == 0.5
    assert rate.pause_s(100, 0.5) == 1.0
    assert rate.pause_s(100, 1.5) == 1.0
    assert rate.pause_s(100, 3.0) == 0.5  # half a second came late
    assert rate.pause_s(100, 500.0) == 0.0
    assert rate.pause_s(100, 500.0) == 1.0
    assert Rate(0, now_s=0.0).pause_s(1 << 40, 0.0) == 0.0


@pytest.mark.parametrize(
    ("text", "at", "wait_s"),
    [
        ("01:00-05:00", "00:59", 60),
        ("01:00-05:00", "01:00", 0),
        ("01:00-05:00", "04:59", 0),
        ("01:00-05:00", "05:00", 20 * 3600),
        ("22:30-04:00 UTC", "22:29", 60),
        ("22:30-04:00 UTC", "23:59", 0),
        ("22:30-04:00 UTC", "00:00", 0),
        ("22:30-04:00 UTC", "04:00", 18.5 * 3600),
        ("03:00-03:00", "17:00", 0),
    ],
)
def test_windows(text: str, at: str, wait_s: float) -> None:
    found = window.parse(text)
    assert found is not None
    assert found.utc == text.endswith("UTC")
    hours, minutes = at.split(":")
    assert window.opens_in_s(found, int(hours) * 3600 + int(minutes) * 60) == wait_s


@pytest.mark.parametrize("text", ["1:00-5:00", "25:00-01:00", "01:00", "01:00-05:00 CET", "01:00-05:61"])
def test_other_windows_are_refused_with_the_configuration(text: str) -> None:
    assert window.parse("") is None
    with pytest.raises(canonical.DecodeFault):
        canonical.from_builtins({"window": text}, Registry)


FOUND = [
    Leftover("aa", 50, 100),
    Leftover("bb.part", 10, 100),
    Leftover("cc.part", 30, 100),
    Leftover("dd.part", 99, 100),
]


def test_what_nobody_wanted_for_long_is_outdated() -> None:
    assert plan.outdated(FOUND, {"dd"}, 20) == ["aa", "cc.part"]


def test_room_is_made_by_the_parts_longest_unwanted_first() -> None:
    assert plan.victims(FOUND, set(), 0) == []
    assert plan.victims(FOUND, {"dd"}, 101) == ["cc.part", "bb.part"]
    assert plan.victims(FOUND, {"dd"}, 10_000) == ["cc.part", "bb.part", "aa"]


def test_what_is_reserved_already_need_not_be_free() -> None:
    assert plan.free_bytes_needed([(1000, 0), (1000, 400), (1000, 4096)], 10) == 1000 + 600 + 10
