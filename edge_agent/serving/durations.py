"""Pure: percentiles of measured durations."""

from __future__ import annotations

import math
from collections.abc import Sequence


def percentile_ms(values_ns: Sequence[int], share: float) -> float:
    """The value that `share` of the values do not exceed (nearest rank), in ms."""
    ordered = sorted(values_ns)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] / 1e6
