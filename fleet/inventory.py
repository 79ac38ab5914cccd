"""What devices have reported, in SQLite. A row is here, durably, before it is acknowledged.

How far to acknowledge is decided in watermark.py. Several `edge-fleet watch` may share one file.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple

from edge_contract import canonical, wire
from edge_contract.errors import InputRejected, Reason, StorageFault
from fleet.watermark import Gap, Mark, Row, advance

_VERSION = 1
_SCHEMA = """
CREATE TABLE records (
    tenant TEXT NOT NULL, device TEXT NOT NULL, stream TEXT NOT NULL, epoch TEXT NOT NULL,
    seq INTEGER NOT NULL, lost INTEGER NOT NULL, received_ms INTEGER NOT NULL, payload TEXT NOT NULL,
    PRIMARY KEY (tenant, device, stream, epoch, seq)
) WITHOUT ROWID;
CREATE TABLE marks (
    tenant TEXT NOT NULL, device TEXT NOT NULL, stream TEXT NOT NULL, epoch TEXT NOT NULL,
    seq INTEGER NOT NULL, missing INTEGER NOT NULL, lost INTEGER NOT NULL,
    PRIMARY KEY (tenant, device, stream, epoch)
) WITHOUT ROWID;
CREATE TABLE gaps (
    tenant TEXT NOT NULL, device TEXT NOT NULL, stream TEXT NOT NULL, epoch TEXT NOT NULL,
    first INTEGER NOT NULL, last INTEGER NOT NULL, explained INTEGER NOT NULL, at_ms INTEGER NOT NULL
);
"""
_ADD_RECORD = "INSERT OR IGNORE INTO records VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_ADD_MARK = """
INSERT INTO marks VALUES (?, ?, ?, ?, 0, 0, ?) ON CONFLICT DO UPDATE SET lost = max(lost, excluded.lost)"""
_ADD_GAP = "INSERT INTO gaps VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_GET_MARK = """
SELECT seq, missing, lost FROM marks WHERE tenant = ? AND device = ? AND stream = ? AND epoch = ?"""
_SET_MARK = """
UPDATE marks SET seq = ?, missing = ? WHERE tenant = ? AND device = ? AND stream = ? AND epoch = ?"""
_ROWS_ABOVE = """
SELECT seq, received_ms FROM records
WHERE tenant = ? AND device = ? AND stream = ? AND epoch = ? AND seq > ? ORDER BY seq"""
_WAITING = """
SELECT DISTINCT m.tenant, m.device, m.stream, m.epoch FROM marks m
JOIN records r USING (tenant, device, stream, epoch) WHERE r.seq > m.seq"""


class Stream(NamedTuple):
    """One numbered sequence of rows: a device's stream in one epoch of its outbox."""

    tenant: str
    device: str
    stream: Literal["tel", "event"]
    epoch: str


class Progress(NamedTuple):
    """How far a stream is acknowledged now (0: not at all), and the gaps given up on the way.

    `behind`: later rows are stored here, but some before them have not come yet.
    """

    stream: Stream
    seq: int
    moved: bool
    gaps: list[Gap]
    behind: bool = False


class Inventory:
    """An open database. Use as a context manager."""

    def __init__(self, path: Path, *, patience_ms: int) -> None:
        """Open or create. Raises InputRejected (not ours) or StorageFault."""
        self._path = path
        self._patience_ms = patience_ms
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._translated():
            self._db = sqlite3.connect(path, timeout=10, isolation_level=None)
            # FULL: what is acknowledged must survive a power cut, because the device deletes it.
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._prepare()

    def __enter__(self) -> Inventory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()

    def store(self, records: Sequence[tuple[str, str, wire.Record]], now_ms: int) -> list[bool]:
        """Store (tenant, device, record) in one transaction; True for each that was not here yet."""
        with self._translated(), self._transaction():
            return [self._insert(tenant, device, record, now_ms) for tenant, device, record in records]

    def settle(self, streams: set[Stream], now_ms: int) -> list[Progress]:
        """Move the marks of `streams`, and of those that wait for a gap, as far as they may go.

        Returned are all of `streams`, and of the others those that moved.
        """
        with self._translated(), self._transaction():
            settled = [self._settle(stream, now_ms) for stream in sorted(streams | self._waiting())]
        return [p for p in settled if p.stream in streams or p.moved]

    def _insert(self, tenant: str, device: str, record: wire.Record, now_ms: int) -> bool:
        key = (tenant, device, record.stream, record.epoch)
        payload = canonical.to_bytes(record.payload).decode()
        row = (*key, record.seq, record.lost, now_ms, payload)
        is_new = self._db.execute(_ADD_RECORD, row).rowcount == 1
        self._db.execute(_ADD_MARK, (*key, record.lost))
        return is_new

    def _settle(self, stream: Stream, now_ms: int) -> Progress:
        seq, missing, lost = self._db.execute(_GET_MARK, stream).fetchone()
        rows = [Row(*row) for row in self._db.execute(_ROWS_ABOVE, (*stream, seq))]
        before = Mark(seq, missing)
        mark, gaps = advance(before, rows, lost=lost, now_ms=now_ms, patience_ms=self._patience_ms)
        self._db.execute(_SET_MARK, (*mark, *stream))
        self._db.executemany(_ADD_GAP, [(*stream, *gap, now_ms) for gap in gaps])
        behind = bool(rows) and rows[-1].seq > mark.seq
        return Progress(stream, mark.seq, mark != before, gaps, behind)

    def _waiting(self) -> set[Stream]:
        """Streams with rows above their mark."""
        return {Stream(*row) for row in self._db.execute(_WAITING)}

    def _prepare(self) -> None:
        with self._transaction():
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if version == 0 and tables == 0:
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {_VERSION}")
            elif version != _VERSION:
                raise InputRejected(
                    Reason.BAD_INPUT,
                    f"{self._path}: a database of another program or version ({version}, not {_VERSION})",
                    "name another file with --db",
                )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            # SQLite has done it already when the disk is full.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as e:
            full = e.sqlite_errorname == "SQLITE_FULL"
            raise StorageFault(
                Reason.DISK_FULL if full else Reason.STORAGE_FAULT,
                f"{self._path}: {e}",
                "free space and run it again" if full else "name a writable database of edge-fleet with --db",
            ) from e
