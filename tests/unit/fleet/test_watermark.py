"""How far a stream is acknowledged: never over a row that may still come."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fleet.watermark import Gap, Mark, Row, advance

PATIENCE_MS = 1000


def rows(*seqs: int, at_ms: int = 0) -> list[Row]:
    return [Row(seq, at_ms) for seq in seqs]


def move(mark: Mark, found: list[Row], *, lost: int = 0, now_ms: int = 0) -> tuple[Mark, list[Gap]]:
    return advance(mark, found, lost=lost, now_ms=now_ms, patience_ms=PATIENCE_MS)


def test_a_prefix_without_gaps() -> None:
    assert move(Mark(), rows(1, 2, 3)) == (Mark(3, 0), [])
    assert move(Mark(3, 0), []) == (Mark(3, 0), [])


def test_a_gap_stops_it() -> None:
    assert move(Mark(), rows(1, 2, 4, 5)) == (Mark(2, 0), [])
    assert move(Mark(), rows(2)) == (Mark(0, 0), [])


def test_a_gap_that_the_device_accounts_for_is_passed() -> None:
    assert move(Mark(), rows(1, 4), lost=2) == (Mark(4, 2), [Gap(2, 3, True)])
    assert move(Mark(), rows(1, 4), lost=1) == (Mark(1, 0), [])


def test_evictions_explain_a_gap_once() -> None:
    mark, _ = move(Mark(), rows(1, 4), lost=2)
    assert move(mark, rows(7), lost=2) == (mark, [])
    assert move(mark, rows(7), lost=4) == (Mark(7, 4), [Gap(5, 6, True)])


def test_a_gap_is_given_up_after_the_patience_and_said_to_be_unexplained() -> None:
    found = rows(1, 4, at_ms=100)
    assert move(Mark(), found, now_ms=1099) == (Mark(1, 0), [])
    assert move(Mark(), found, now_ms=1100) == (Mark(4, 2), [Gap(2, 3, False)])


def test_only_the_gap_that_is_old_enough_is_given_up() -> None:
    found = [Row(2, 0), Row(5, 600)]
    assert move(Mark(), found, now_ms=1000) == (Mark(2, 1), [Gap(1, 1, False)])


@given(st.sets(st.integers(1, 60), max_size=40), st.integers(0, 30), st.integers(0, 2 * PATIENCE_MS))
def test_invariants(seqs: set[int], lost: int, now_ms: int) -> None:
    found = rows(*sorted(seqs))
    mark, gaps = move(Mark(), found, lost=lost, now_ms=now_ms)
    covered = {row.seq for row in found if row.seq <= mark.seq}
    given_up = {seq for gap in gaps for seq in range(gap.first, gap.last + 1)}
    # Every number up to the mark is stored or reported lost, and never both.
    assert covered | given_up == set(range(1, mark.seq + 1))
    assert not covered & given_up
    assert mark.missing == len(given_up)
    if now_ms < PATIENCE_MS:
        assert mark.missing <= lost
    # In two goes it comes to the same.
    again, more = advance(
        mark, [r for r in found if r.seq > mark.seq], lost=lost, now_ms=now_ms, patience_ms=1000
    )
    assert (again, more) == (mark, [])
