"""The time for expiry, and what is told of a clock that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent import status
from edge_agent.config import Config
from edge_agent.layout import Layout
from edge_agent.update.clock import TrustedClock
from edge_agent.update.floor import metadata_floor
from edge_agent.update.levels import MetadataFloor, SignedTime
from edge_contract.errors import Reason

SIGNED_S = 1_790_000_000


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(tenant="t", device="d", state_dir=str(tmp_path / "state"), run_dir=str(tmp_path / "run"))


@pytest.fixture
def layout(config: Config) -> Layout:
    return Layout(config)


def sign(layout: Layout, at_s: int = SIGNED_S) -> None:
    metadata_floor(layout).raise_to(MetadataFloor(time=SignedTime(at_s, ["a"])))


def test_without_a_floor_the_clock_is_believed(layout: Layout) -> None:
    clock = TrustedClock(layout)
    assert clock.look(5_000) == []
    assert clock.now_ms(5_000) == 5_000


def test_a_clock_of_1970_is_told_once_and_does_not_count(layout: Layout) -> None:
    sign(layout)
    clock = TrustedClock(layout)
    assert clock.now_ms(6_000) == SIGNED_S * 1000  # from the very first order on
    (event,) = clock.look(7_000)
    assert (event.kind, event.reason) == ("clock", Reason.CLOCK_BEHIND)
    assert "behind by 20,717 days" in event.detail
    assert clock.now_ms(7_000) == SIGNED_S * 1000
    assert clock.look(8_000) == []
    right_ms = SIGNED_S * 1000 + 5
    (event,) = clock.look(right_ms)
    assert (event.kind, event.reason) == ("clock", Reason.OK)
    assert clock.now_ms(right_ms) == right_ms
    (event,) = clock.look(9_000)
    assert event.reason is Reason.CLOCK_BEHIND


def test_a_drift_is_not_told(layout: Layout) -> None:
    sign(layout)
    clock = TrustedClock(layout)
    assert clock.look(SIGNED_S * 1000 - 59_000) == []
    assert clock.now_ms(0) == SIGNED_S * 1000


def test_what_a_child_writes_later_is_seen(layout: Layout) -> None:
    clock = TrustedClock(layout)
    clock.look(0)
    sign(layout)
    clock.look(0)
    assert clock.now_ms(0) == SIGNED_S * 1000
    sign(layout, SIGNED_S + 10)
    clock.look(0)
    assert clock.now_ms(0) == (SIGNED_S + 10) * 1000


def test_a_damaged_copy_is_told_once(layout: Layout) -> None:
    sign(layout)
    copy = layout.floor_copies("metadata")[1]
    copy.write_bytes(b"")
    clock = TrustedClock(layout)
    (event,) = clock.look(SIGNED_S * 1000)
    assert (event.kind, event.reason) == ("storage", Reason.STORAGE_FAULT)
    assert str(copy) in event.detail
    copy.write_bytes(b"again")
    assert clock.look(SIGNED_S * 1000) == []
    assert clock.now_ms(0) == SIGNED_S * 1000


def test_status_says_so(config: Config, layout: Layout) -> None:
    assert status.collect(config)["clock_behind_s"] == 0
    future_s = 4_000_000_000
    sign(layout, future_s)
    found = status.collect(config)
    assert 0 < found["clock_behind_s"] < future_s
    assert "clock is behind by" in status.text(found)
