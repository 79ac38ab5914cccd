"""Pauses between the starts of a program that falls over."""

from __future__ import annotations

from edge_agent.supervisor import _pause_s


def test_pauses_double_up_to_a_cap_and_never_end() -> None:
    assert [round(_pause_s(n), 1) for n in (0, 1, 2, 3)] == [0.0, 0.1, 0.3, 0.7]
    assert _pause_s(10) == _pause_s(2000) == 5.0  # 2**2000 is no float
