"""A noisy source is bounded, others are not, and what was dropped is counted."""

from __future__ import annotations

from edge_agent.messaging.throttle import Throttle


def test_a_burst_passes_and_then_one_at_a_time() -> None:
    throttle = Throttle(burst=3, every_ms=1000)
    assert [throttle.admit("a", 0) for _ in range(5)] == [0, 0, 0, None, None]
    assert throttle.admit("b", 0) == 0
    assert throttle.admit("a", 999) is None
    assert throttle.admit("a", 1000) == 3
    assert throttle.admit("a", 1001) is None
    assert throttle.admit("a", 2000) == 1


def test_a_pause_gives_the_burst_back_and_no_more() -> None:
    throttle = Throttle(burst=2, every_ms=1000)
    assert [throttle.admit("a", 0) for _ in range(3)] == [0, 0, None]
    assert [throttle.admit("a", 10**9) for _ in range(3)] == [1, 0, None]
