"""Pure: how far a stream of numbered rows may be acknowledged.

An acknowledgement covers every row up to its number, and the device deletes them. So only a prefix
without open gaps is acknowledged. A gap is closed by the row itself (the device sends again what is
not acknowledged), by the device's count of rows it had to evict, or after a patience: then it is
reported as unexplained and passed, because a controller that never acknowledges fills the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Mark(NamedTuple):
    """`seq`: everything up to here is stored or given up; `missing`: how many rows of that are not here."""

    seq: int = 0
    missing: int = 0


class Row(NamedTuple):
    """A stored row above the mark."""

    seq: int
    received_ms: int


class Gap(NamedTuple):
    """Rows that will not come. `explained` when the device said that it evicted as many."""

    first: int
    last: int
    explained: bool


def advance(
    mark: Mark, rows: Sequence[Row], *, lost: int, now_ms: int, patience_ms: int
) -> tuple[Mark, list[Gap]]:
    """Move `mark` over `rows` (ascending, above it) as far as it may go.

    `lost` is the largest count of evicted rows that the device has reported in this epoch.
    """
    seq, missing = mark
    gaps = []
    for row in rows:
        absent = row.seq - seq - 1
        explained = missing + absent <= lost
        if absent and not explained and now_ms - row.received_ms < patience_ms:
            break
        if absent:
            gaps.append(Gap(seq + 1, row.seq - 1, explained))
        seq, missing = row.seq, missing + absent
    return Mark(seq, missing), gaps
