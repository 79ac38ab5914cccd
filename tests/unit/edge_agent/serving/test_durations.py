"""Percentiles."""

from __future__ import annotations

import pytest

from edge_agent.serving.durations import percentile_ms


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([5_000_000], 0.5, 5.0),
        ([1_000_000, 2_000_000, 3_000_000], 0.5, 2.0),
        ([4_000_000, 1_000_000, 3_000_000, 2_000_000], 0.5, 2.0),
        (list(range(1_000_000, 101_000_000, 1_000_000)), 0.95, 95.0),
        ([1_000_000, 9_000_000], 1.0, 9.0),
        ([1_000_000, 9_000_000], 0.0, 1.0),
    ],
)
def test_percentiles(values: list[int], share: float, expected: float) -> None:
    assert percentile_ms(values, share) == expected
