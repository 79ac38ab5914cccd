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


def record(seq: int, *, lost: int = 0, epoch: str = "e1", stream: Any = "tel") -> wire.Record:
    return wire.Record(1, stream, epoch, seq, lost, {"n": seq})


def store(inventory: Inventory, *records: wire.Record, device: str = "a", now_ms: int = 0) -> list[bool]:
    return inventory.store([("t", device, r) for r in records], now_ms)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "fleet.db"


def test_rows_are_stored_once(path: Path) -> None:
    with Inventory(path, patience_ms=1000) as inventory:
        assert store(inventory, record(1), record(2), record(1)) == [True, True, False]
        assert store(inventory, record(2), record(1, epoch="e2"), record(1, stream="event")) == [
            False,
            True,
            True,
        ]
        assert store(inventory, record(1), device="b") == [True]
    rows = sqlite3.connect(path).execute("SELECT device, stream, epoch, seq FROM records").fetchall()
    assert len(rows) == 5


def test_marks_outlive_the_program(path: Path) -> None:
    with Inventory(path, patience_ms=1000) as inventory:
        store(inventory, record(1), record(3))
        assert inventory.settle({TEL}, 0) == [Progress(TEL, 1, True, [], behind=True)]
    with Inventory(path, patience_ms=1000) as inventory:
        store(inventory, record(2))
        assert inventory.settle({TEL}, 0) == [Progress(TEL, 3, True, [])]


def test_a_known_row_again_is_acknowledged_again(path: Path) -> None:
    with Inventory(path, patience_ms=1000) as inventory:
        store(inventory, record(1))
        inventory.settle({TEL}, 0)
        store(inventory, record(1))
        assert inventory.settle({TEL}, 0) == [Progress(TEL, 1, False, [])]
        assert inventory.settle(set(), 0) == []


def test_gaps_are_kept_and_told_once(path: Path) -> None:
    with Inventory(path, patience_ms=1000) as inventory:
        store(inventory, record(1), record(4, lost=2), record(6, lost=2))
        assert inventory.settle({TEL}, 0) == [Progress(TEL, 4, True, [Gap(2, 3, True)], behind=True)]
        # Nothing comes, but the patience for 5 ends.
        assert inventory.settle(set(), 999) == []
        assert inventory.settle(set(), 1000) == [Progress(TEL, 6, True, [Gap(5, 5, False)])]
        assert inventory.settle(set(), 5000) == []
    gaps = sqlite3.connect(path).execute("SELECT first, last, explained FROM gaps").fetchall()
    assert gaps == [(2, 3, 1), (5, 5, 0)]


def test_two_programs_share_a_file(path: Path) -> None:
    with Inventory(path, patience_ms=1000) as one, Inventory(path, patience_ms=1000) as two:
        assert store(one, record(1)) == [True]
        assert store(two, record(1), record(2)) == [False, True]
        assert one.settle({TEL}, 0)[0].seq == 2
        assert two.settle({TEL}, 0)[0].seq == 2


def test_it_is_synced_before_it_is_acknowledged(path: Path) -> None:
    with Inventory(path, patience_ms=1000) as inventory:
        assert inventory._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert inventory._db.execute("PRAGMA synchronous").fetchone() == (2,)


def test_a_batch_is_stored_whole_or_not_at_all(path: Path) -> None:
    with Inventory(path, patience_ms=1000) as inventory:
        pages = inventory._db.execute("PRAGMA page_count").fetchone()[0]
        inventory._db.execute(f"PRAGMA max_page_count = {pages + 1}")
        with pytest.raises(StorageFault, match="full") as caught:
            store(inventory, record(1), wire.Record(1, "tel", "e1", 2, 0, {"n": "x" * 100_000}))
        assert caught.value.reason is Reason.DISK_FULL
        assert store(inventory, record(1)) == [True]


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
