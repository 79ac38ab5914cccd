"""The store behind `edge-fleet watch`: durable before it is acknowledged, and shared."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from edge_contract import wire
from edge_contract.errors import InputRejected, Reason, StorageFault
from fleet.inventory import Inventory, Progress, Stream
from fleet.watermark import Gap

TEL = Stream("t", "a", "tel", "e1")


def record(
    seq: int,
    *,
    epoch: str = "e1",
    stream: Any = "tel",
    gone: tuple[tuple[int, int], ...] = (),
    acked: int = 0,
) -> wire.Record:
    told = [wire.Gone(stream, epoch, first, last) for first, last in gone]
    return wire.Record(1, stream, epoch, seq, 0, {"n": seq}, told, acked)


def take(
    inventory: Inventory, *records: wire.Record, device: str = "a", now_ms: int = 0
) -> tuple[list[bool], list[Progress]]:
    return inventory.take([("t", device, r) for r in records], now_ms)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "fleet.db"


def rows_of(path: Path, query: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(path) as db:
        found = db.execute(query).fetchall()
    db.close()
    return found


def test_rows_are_stored_once(path: Path) -> None:
    with Inventory(path, patience_ms=1000) as inventory:
        assert take(inventory, record(1), record(2), record(1))[0] == [True, True, False]
        new, _ = take(inventory, record(2), record(1, epoch="e2"), record(1, stream="event"))
        assert new == [False, True, True]
        assert take(inventory, record(1), device="b")[0] == [True]
    assert len(rows_of(path, "SELECT * FROM records")) == 5


def test_marks_outlive_the_program(path: Path) -> None:
    with Inventory(path, patience_ms=1000) as inventory:
        assert take(inventory, record(1), record(3))[1] == [Progress(TEL, 1, [], [(3, 3)], missing=1)]
    with Inventory(path, patience_ms=1000) as inventory:
        assert take(inventory, record(2))[1] == [Progress(TEL, 3, [], [], missing=0)]


def test_a_known_row_again_is_acknowledged_again(path: Path) -> None:
    with Inventory(path, patience_ms=1000) as inventory:
        take(inventory, record(1))
        assert take(inventory, record(1)) == ([False], [Progress(TEL, 1, [], [], 0)])
        assert take(inventory) == ([], [])


def test_the_newest_rows_first_and_the_backlog_after_them(path: Path) -> None:
    with Inventory(path, patience_ms=1000) as inventory:
        take(inventory, record(100))
        for seq in range(1, 99):
            progress = take(inventory, record(seq))[1][0]
            assert (progress.seq, progress.have) == (seq, [(100, 100)])
        assert take(inventory, record(99))[1][0].seq == 100
    assert rows_of(path, "SELECT * FROM runs") == []


def test_gaps_are_kept_and_told_once(path: Path) -> None:
    with Inventory(path, patience_ms=1000) as inventory:
        _, (progress,) = take(inventory, record(1), record(4, gone=((2, 3),)), record(6, gone=((2, 3),)))
        assert progress == Progress(TEL, 4, [Gap(2, 3, True)], [(6, 6)], missing=1)
        # Nothing comes, but the patience for 5 ends.
        assert inventory.take([], 999) == ([], [])
        _, (progress,) = inventory.take([], 1000)
        assert progress == Progress(TEL, 4, [Gap(5, 5, False)], [(6, 6)], missing=1)
        assert inventory.take([], 5000) == ([], [])
    assert rows_of(path, "SELECT first, last, explained FROM gaps") == [(2, 3, 1), (5, 5, 0)]


def test_what_a_lost_database_had_acknowledged_is_told_as_such(path: Path) -> None:
    """The device has these rows no more: a gap for ever, if it did not say so."""
    with Inventory(path, patience_ms=1000) as inventory:
        _, (progress,) = take(inventory, record(51, acked=50), record(60, acked=5))
        elsewhere = [Gap(1, 50, True, elsewhere=True), Gap(55, 59, True, elsewhere=True)]
        assert progress == Progress(TEL, 51, elsewhere, [(55, 60)], missing=3)
        # What is here already is no gap, whoever acknowledged it.
        _, (progress,) = take(inventory, record(52), record(53), record(54), record(61, acked=60))
        assert progress == Progress(TEL, 61, [], [], missing=0)
        # A device that comes back with them after all (a restored card) is heard.
        assert take(inventory, record(7)) == ([True], [Progress(TEL, 61, [], [], 0)])
    found = rows_of(path, "SELECT first, last, explained, elsewhere FROM gaps")
    assert found == [(1, 50, 1, 1), (55, 59, 1, 1)]


def test_a_tombstone_tells_what_was_acknowledged_before_it(path: Path) -> None:
    old = Stream("t", "a", "event", "old")
    told = wire.Record(1, "tel", "e1", 1, 0, {}, [wire.Gone("event", "old", 11, 12, acked=10)])
    with Inventory(path, patience_ms=1000) as inventory:
        progress = next(p for p in take(inventory, told)[1] if p.stream == old)
    assert progress == Progress(old, 12, [Gap(11, 12, True), Gap(1, 10, True, elsewhere=True)], [], 0)


def test_a_loss_beyond_a_gap_is_told_and_acknowledged_at_once(path: Path) -> None:
    with Inventory(path, patience_ms=1000) as inventory:
        _, (progress,) = take(inventory, record(9, gone=((5, 6),)))
        assert progress == Progress(TEL, 0, [Gap(5, 6, True)], [(5, 6), (9, 9)], missing=4 + 2)
        assert take(inventory, record(9, gone=((5, 6),)))[1][0].gaps == []


def test_what_comes_beyond_many_gaps_is_acknowledged(path: Path) -> None:
    with Inventory(path, patience_ms=1000) as inventory:
        _, (progress,) = take(inventory, *(record(seq) for seq in range(2, 602, 2)))
        assert progress.have == [(seq, seq) for seq in range(2, 602, 2)]
        # Sent again, because the acknowledgement was lost.
        _, (progress,) = take(inventory, record(500), record(7, gone=((551, 551),)))
        assert progress.have[-2:] == [(500, 500), (550, 552)]
        assert len(progress.have) == 64 + 2


def test_a_file_of_the_version_before_goes_on(path: Path) -> None:
    with Inventory(path, patience_ms=1000) as inventory:
        take(inventory, record(1), record(5))
    with sqlite3.connect(path) as db:
        db.execute("ALTER TABLE gaps DROP COLUMN elsewhere")
        db.execute("CREATE TABLE gone (first INTEGER)")
        db.execute("PRAGMA user_version = 2")
    db.close()
    with Inventory(path, patience_ms=1000) as inventory:
        assert take(inventory, record(6, acked=5))[1][0].gaps == [Gap(2, 4, True, elsewhere=True)]


def test_a_stream_of_which_nothing_ever_came_is_explained_by_another(path: Path) -> None:
    """Everything of an epoch was evicted: only records of the next can tell."""
    gone = wire.Gone("event", "old", 1, 7)
    told = wire.Record(1, "tel", "e1", 1, 0, {}, [gone])
    with Inventory(path, patience_ms=1000) as inventory:
        _, progress = take(inventory, told)
        old = Stream("t", "a", "event", "old")
        assert Progress(old, 7, [Gap(1, 7, True)], [], 0) in progress
        _, again = take(inventory, told)
        assert Progress(old, 7, [], [], 0) in again


def test_two_programs_share_a_file(path: Path) -> None:
    with Inventory(path, patience_ms=1000) as one, Inventory(path, patience_ms=1000) as two:
        assert take(one, record(1))[0] == [True]
        new, (progress,) = take(two, record(1), record(2))
        assert (new, progress.seq) == ([False, True], 2)
        assert take(one, record(2))[1][0].seq == 2


def test_it_is_synced_before_it_is_acknowledged(path: Path) -> None:
    with Inventory(path, patience_ms=1000) as inventory:
        assert inventory._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert inventory._db.execute("PRAGMA synchronous").fetchone() == (2,)


def test_a_batch_is_stored_whole_or_not_at_all(path: Path) -> None:
    with Inventory(path, patience_ms=1000) as inventory:
        pages = inventory._db.execute("PRAGMA page_count").fetchone()[0]
        inventory._db.execute(f"PRAGMA max_page_count = {pages + 1}")
        with pytest.raises(StorageFault, match="full") as caught:
            take(inventory, record(1), wire.Record(1, "tel", "e1", 2, 0, {"n": "x" * 100_000}))
        assert caught.value.reason is Reason.DISK_FULL
        assert take(inventory, record(1)) == ([True], [Progress(TEL, 1, [], [], 0)])


def test_other_files_are_refused(tmp_path: Path) -> None:
    junk = tmp_path / "junk"
    junk.write_bytes(b"not a database at all" * 100)
    with pytest.raises(StorageFault, match="not a database"):
        Inventory(junk, patience_ms=1)
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE theirs (x)")
    db.close()
    with pytest.raises(InputRejected, match="another program"):
        Inventory(other, patience_ms=1)
    with pytest.raises(StorageFault, match="unable to open"):
        Inventory(tmp_path, patience_ms=1)
