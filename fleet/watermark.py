"""Pure: how far a stream of numbered rows may be acknowledged, and which of its rows will not come.

After an outage a device sends its newest rows first, so what is stored is a prefix and *runs* beyond it.
Both are acknowledged, and the device deletes only those rows. A gap is closed by the rows themselves or by
the device's word that they are gone (a tombstone). A gap that stays open for a patience is reported as
unexplained, but never acknowledged: the rows may still lie on a device that was cut off again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Run(NamedTuple):
    """Stored rows without a gap, beyond an open one. `told`: the gap before it was reported."""

    first: int
    last: int
    since_ms: int
    told: bool = False


class Gap(NamedTuple):
    """Rows that are not here. `explained` when the device said that they are gone."""

    first: int
    last: int
    explained: bool


class Advance(NamedTuple):
    """Everything up to `seq` is stored or explained; `runs` lie beyond; `gaps` are to be reported now."""

    seq: int
    runs: list[Run]
    gaps: list[Gap]


Range = tuple[int, int]


def add(runs: Sequence[Run], seqs: Iterable[int], now_ms: int) -> list[Run]:
    """`runs` with these stored rows beside or between them."""
    merged: list[Run] = []
    for run in sorted([*runs, *(Run(seq, seq, now_ms) for seq in seqs)]):
        if merged and run.first <= merged[-1].last + 1:
            last = max(merged[-1].last, run.last)
            merged[-1] = merged[-1]._replace(last=last)
        else:
            merged.append(run)
    return merged


def advance(
    seq: int, runs: Sequence[Run], gone: Sequence[Range], *, now_ms: int, patience_ms: int
) -> Advance:
    """Move `seq` over stored and explained rows; find gaps that were open for too long."""
    ends = merge(gone)
    gaps: list[Gap] = []
    left = list(runs)
    while True:
        if left and left[0].first <= seq + 1:
            seq = max(seq, left.pop(0).last)
            continue
        stop = left[0].first - 1 if left else None
        end = next((last for first, last in ends if first <= seq + 1 <= last), None)
        if end is None:
            break
        end = end if stop is None else min(end, stop)
        gaps.append(Gap(seq + 1, end, explained=True))
        seq = end
    before = seq
    for index, run in enumerate(left):
        if not run.told and now_ms - run.since_ms >= patience_ms:
            gaps += [Gap(*hole, explained=False) for hole in holes(before + 1, run.first - 1, ends)]
            left[index] = run._replace(told=True)
        before = run.last
    return Advance(seq, left, gaps)


def missing(seq: int, runs: Sequence[Run], gone: Sequence[Range]) -> int:
    """How many rows between `seq` and the last run are neither here nor explained."""
    ends = merge(gone)
    count, before = 0, seq
    for run in runs:
        count += sum(last - first + 1 for first, last in holes(before + 1, run.first - 1, ends))
        before = run.last
    return count


def merge(ranges: Iterable[Range]) -> list[Range]:
    """Sorted, without overlaps; neighbours are joined. Inverted ranges say nothing."""
    merged: list[Range] = []
    for first, last in sorted(r for r in ranges if r[0] <= r[1]):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged


def holes(first: int, last: int, ends: Sequence[Range]) -> list[Range]:
    """What of first…last is in none of the merged ranges."""
    found: list[Range] = []
    at = first
    for begin, end in ends:
        if begin > last:
            break
        if begin > at:
            found.append((at, begin - 1))
        at = max(at, end + 1)
    if at <= last:
        found.append((at, last))
    return found
