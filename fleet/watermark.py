"""Pure: how far a stream of numbered rows may be acknowledged, and which of its rows will not come.

After an outage a device sends its newest rows first, so what is settled is a prefix and *runs* beyond it.
Both are acknowledged, and the device deletes only those rows. A gap is closed by the rows themselves or by
the device's word: they are gone (a tombstone), or were acknowledged, and not by us. A gap that stays open for
a patience is reported as unexplained, but never acknowledged: the rows may still lie on a device that was
cut off again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Run(NamedTuple):
    """Stored or explained rows, beyond an open gap. `told`: the gap before it was reported."""

    first: int
    last: int
    since_ms: int
    told: bool = False


class Gap(NamedTuple):
    """Rows that are not here. `explained` when the device said why: they are gone; or, `elsewhere`, they
    were acknowledged by another controller, or by this one before it lost its database.
    """

    first: int
    last: int
    explained: bool
    elsewhere: bool = False


class Advance(NamedTuple):
    """Everything up to `seq` is stored or explained; `runs` lie beyond; `gaps` were open for too long."""

    seq: int
    runs: list[Run]
    gaps: list[Gap]


Range = tuple[int, int]


def add(runs: Sequence[Run], seqs: Iterable[int], now_ms: int) -> list[Run]:
    """`runs` with these rows beside or between them."""
    return add_ranges(runs, ((seq, seq) for seq in seqs), now_ms)


def add_ranges(runs: Sequence[Run], ranges: Iterable[Range], now_ms: int) -> list[Run]:
    """`runs` with these ranges beside, between or across them."""
    merged: list[Run] = []
    for run in sorted([*runs, *(Run(first, last, now_ms) for first, last in ranges)]):
        if merged and run.first <= merged[-1].last + 1:
            last = max(merged[-1].last, run.last)
            merged[-1] = merged[-1]._replace(last=last)
        else:
            merged.append(run)
    return merged


def unsettled(seq: int, runs: Sequence[Run], ranges: Iterable[Range]) -> list[Range]:
    """What of these ranges is neither in the prefix up to `seq` nor in a run."""
    known = [(1, seq), *((run.first, run.last) for run in runs)] if seq else [(r.first, r.last) for r in runs]
    return [hole for first, last in merge(ranges) for hole in holes(max(1, first), last, known)]


def advance(seq: int, runs: Sequence[Run], *, now_ms: int, patience_ms: int) -> Advance:
    """Move `seq` over the runs that reach it; find gaps that were open for too long."""
    left = list(runs)
    while left and left[0].first <= seq + 1:
        seq = max(seq, left.pop(0).last)
    gaps: list[Gap] = []
    before = seq
    for index, run in enumerate(left):
        if not run.told and now_ms - run.since_ms >= patience_ms:
            gaps.append(Gap(before + 1, run.first - 1, explained=False))
            left[index] = run._replace(told=True)
        before = run.last
    return Advance(seq, left, gaps)


def missing(seq: int, runs: Sequence[Run]) -> int:
    """How many rows between `seq` and the last run are neither here nor explained."""
    return runs[-1].last - seq - sum(run.last - run.first + 1 for run in runs) if runs else 0


def to_tell(runs: Sequence[Run], news: Iterable[Range], limit: int) -> list[Range]:
    """The runs that something has just come of, and of the others the first ones up to a limit.

    Else rows beyond many gaps would be sent, and sent again, until the last gap before them is closed.
    """
    came = merge(news)
    firsts = [first for first, _ in came]
    told = []
    for index, run in enumerate(runs):
        at = bisect_right(firsts, run.last) - 1
        if index < limit or (at >= 0 and came[at][1] >= run.first):
            told.append((run.first, run.last))
    return told


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
