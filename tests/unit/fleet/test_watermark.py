"""How far a stream is acknowledged: never over a row that may still come."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fleet.watermark import (
    Advance,
    Gap,
    Run,
    add,
    add_ranges,
    advance,
    holes,
    merge,
    missing,
    to_tell,
    unsettled,
)

PATIENCE_MS = 1000


def runs(*ranges: tuple[int, int], at_ms: int = 0) -> list[Run]:
    return [Run(first, last, at_ms) for first, last in ranges]


def move(seq: int, found: list[Run], *told: tuple[int, int], now_ms: int = 0) -> Advance:
    """With ranges that the device has explained; these come before the gaps of impatience."""
    explained = unsettled(seq, found, told)
    found = add_ranges(found, explained, now_ms)
    moved = advance(seq, found, now_ms=now_ms, patience_ms=PATIENCE_MS)
    return moved._replace(gaps=[*(Gap(*hole, True) for hole in explained), *moved.gaps])


def test_rows_become_runs() -> None:
    assert add([], [3, 1, 2], 5) == [Run(1, 3, 5)]
    assert add(runs((1, 3)), [5, 7], 9) == [Run(1, 3, 0), Run(5, 5, 9), Run(7, 7, 9)]
    assert add(runs((1, 3), (5, 6)), [4], 9) == runs((1, 6))


def test_a_prefix_without_gaps() -> None:
    assert move(0, runs((1, 3))) == (3, [], [])
    assert move(3, []) == (3, [], [])
    assert move(3, runs((4, 9))) == (9, [], [])


def test_a_gap_stops_it() -> None:
    assert move(0, runs((1, 2), (4, 5))) == (2, runs((4, 5)), [])
    assert move(0, runs((2, 2))) == (0, runs((2, 2)), [])


def test_rows_that_the_device_calls_gone_are_passed() -> None:
    assert move(0, runs((1, 1), (4, 4)), (2, 3)) == (4, [], [Gap(2, 3, True)])
    assert move(0, runs((4, 4)), (1, 2)) == (2, runs((4, 4)), [Gap(1, 2, True)])
    assert move(5, [], (6, 9)) == (9, [], [Gap(6, 9, True)])


def test_a_loss_elsewhere_explains_no_gap() -> None:
    """Rows of a backlog may still come, however many others were evicted."""
    assert move(0, runs((1, 4), (8, 8)), (20, 90)) == (4, runs((8, 8), (20, 90)), [Gap(20, 90, True)])


def test_what_was_stored_before_it_was_evicted_is_no_gap() -> None:
    assert move(0, runs((1, 6)), (3, 8)) == (8, [], [Gap(7, 8, True)])
    assert move(6, [], (0, 8)) == (8, [], [Gap(7, 8, True)])
    assert move(0, [], (0, 0)) == (0, [], [])


def test_an_open_gap_is_told_once_and_never_acknowledged() -> None:
    found = runs((1, 1), (4, 4), at_ms=100)
    assert move(0, found, now_ms=1099) == (1, found[1:], [])
    told = [Run(4, 4, 100, told=True)]
    assert move(0, found, now_ms=1100) == (1, told, [Gap(2, 3, False)])
    assert move(1, told, now_ms=9000) == (1, told, [])
    # The device was cut off for long, and comes back with them.
    assert move(1, add(told, [2, 3], 9000), now_ms=9000) == (4, [], [])


def test_only_what_is_unexplained_of_a_gap_is_told() -> None:
    found = [Run(9, 9, 0), Run(15, 15, 600)]
    assert move(0, found, (3, 4), (6, 6)).gaps == [Gap(3, 4, True), Gap(6, 6, True)]
    moved = advance(0, add_ranges(found, [(3, 4), (6, 6)], 0), now_ms=1000, patience_ms=PATIENCE_MS)
    assert moved.gaps == [Gap(1, 2, False), Gap(5, 5, False), Gap(7, 8, False)]
    assert moved.seq == 0


def test_missing_counts_what_is_neither_here_nor_explained() -> None:
    assert missing(0, runs((2, 3), (5, 6), (9, 9))) == 1 + 1 + 2
    assert missing(6, []) == 0


def test_what_has_just_come_is_told_however_many_gaps_lie_before_it() -> None:
    found = runs((2, 3), (5, 6), (8, 9), (11, 20))
    assert to_tell(found, [], 2) == [(2, 3), (5, 6)]
    assert to_tell(found, [(12, 12), (9, 10)], 1) == [(2, 3), (8, 9), (11, 20)]
    assert to_tell(found, [(1, 1), (7, 7), (30, 31)], 0) == []


def test_ranges() -> None:
    assert merge([(5, 6), (1, 2), (3, 3), (9, 8)]) == [(1, 3), (5, 6)]
    assert holes(1, 10, [(2, 3), (9, 20)]) == [(1, 1), (4, 8)]
    assert holes(5, 4, []) == []


@given(
    st.sets(st.integers(1, 60), max_size=40),
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), max_size=4),
    st.randoms(),
)
def test_invariants(seqs: set[int], gone: list[tuple[int, int]], rng: object) -> None:
    gone_seqs = {s for first, last in gone for s in range(first, last + 1)}
    # In any order and in several goes it comes to the same.
    order = sorted(seqs)
    rng.shuffle(order)  # type: ignore[attr-defined]
    seq, left = 0, []
    explained: set[int] = set()
    for number in [*order, 0]:
        moved = move(seq, add(left, [number] if number > seq else [], 0), *gone)
        seq, left = moved.seq, moved.runs
        explained |= {s for gap in moved.gaps for s in range(gap.first, gap.last + 1)}
    known = seqs | gone_seqs
    expected = next(s for s in range(62) if s + 1 not in known)
    assert seq == expected
    assert {s for run in left for s in range(run.first, run.last + 1)} == {s for s in known if s > seq}
    # What is called lost was said to be gone.
    assert explained <= gone_seqs
    assert set(range(1, seq + 1)) - seqs <= explained
