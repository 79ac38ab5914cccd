"""The outbox: telemetry and events wait here, on disk, until the controller says it has stored them.

A PUBACK is not a store, so a row is deleted only on the application's acknowledgement. What does not fit
is evicted, oldest of the lowest priority first, and counted: loss is reported, never silent.
One connection, used by one thread.
"""

from __future__ import annotations

import sqlite3
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from edge_agent import files
from edge_contract import canonical, wire
from edge_contract.errors import Reason, StorageFault

Stream = Literal["tel", "event"]
_BACKOFF_DOUBLINGS = 6
_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})

_SCHEMA = """
CREATE TABLE IF NOT EXISTS rows (
    stream TEXT NOT NULL, epoch TEXT NOT NULL, seq INTEGER NOT NULL,
    priority INTEGER NOT NULL, expires_ms INTEGER NOT NULL,
    next_ms INTEGER NOT NULL DEFAULT 0, tries INTEGER NOT NULL DEFAULT 0,
    payload BLOB NOT NULL,
    PRIMARY KEY (stream, epoch, seq)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS due ON rows (next_ms, priority);
CREATE TABLE IF NOT EXISTS streams (stream TEXT PRIMARY KEY, epoch TEXT NOT NULL, seq INTEGER NOT NULL,
    lost INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS results (id TEXT PRIMARY KEY, at_ms INTEGER NOT NULL, body BLOB NOT NULL);
"""
_RESULTS_KEPT = 200


class Row(NamedTuple):
    """What identifies a row, and the bytes to publish."""

    stream: Stream
    epoch: str
    seq: int
    data: bytes


class Outbox:
    """Rows `(stream, epoch, seq, priority, expires, payload)` in SQLite, bounded in bytes."""

    def __init__(self, path: Path, *, max_bytes: int, resend_s: float, now_ms: int) -> None:
        self._max_bytes = max_bytes
        self._resend_ms = int(resend_s * 1000)
        self.problem = ""
        files.make_folder(path.parent)
        try:
            self._db = _open(path)
        except _Damaged as e:
            self.problem = f"the outbox was damaged ({e}) and set aside; a new epoch begins"
            for suffix in ("-wal", "-shm"):
                files.remove_link(path.with_name(path.name + suffix))
            files.set_aside(path, now_ms)
            self._db = _open(path)
        self._bytes = self._scalar("SELECT COALESCE(SUM(LENGTH(payload)), 0) FROM rows")

    def put(self, stream: Stream, payload: Any, *, priority: int, now_ms: int, ttl_s: float) -> None:
        """Append one row durably. Events are synced to the disk, telemetry survives a kill of the process.

        Raises StorageFault; then nothing was appended.
        """
        body = canonical.to_bytes(payload)
        try:
            self._db.execute(f"PRAGMA synchronous={'FULL' if stream == 'event' else 'NORMAL'}")
            with self._db:
                epoch, seq = self._next(stream)
                self._db.execute(
                    "INSERT INTO rows (stream, epoch, seq, priority, expires_ms, payload)"
                    " VALUES (?, ?, ?, ?, ?, ?)",
                    (stream, epoch, seq, priority, now_ms + int(ttl_s * 1000), body),
                )
                self._bytes += len(body)
                self._evict(now_ms)
        except sqlite3.Error as e:
            raise self._fault(e) from e

    def due(self, limit: int, now_ms: int) -> list[Row]:
        """Rows to publish now, most urgent first, oldest first within a priority."""
        try:
            found = self._db.execute(
                "SELECT r.stream, r.epoch, r.seq, CAST(r.payload AS BLOB), s.lost FROM rows r JOIN streams s"
                " ON s.stream = r.stream WHERE r.next_ms <= ?"
                " ORDER BY r.priority DESC, r.stream, r.seq LIMIT ?",
                (now_ms, limit),
            ).fetchall()
        except sqlite3.Error as e:
            raise self._fault(e) from e
        rows = []
        for stream, epoch, seq, payload, lost in found:
            try:
                record = wire.Record(1, stream, epoch, seq, lost, canonical.parse(payload))
                rows.append(Row(stream, epoch, seq, canonical.to_bytes(record)))
            except ValueError:  # SQLite has no checksums: a bit that flipped on the disk is found here
                self._give_up(stream, epoch, seq)
        return rows

    def _give_up(self, stream: str, epoch: str, seq: int) -> None:
        """Drop a row that cannot be read any more; it is counted as lost."""
        try:
            with self._db:
                self._drop("stream = ? AND epoch = ? AND seq = ?", (stream, epoch, seq))
        except sqlite3.Error as e:
            raise self._fault(e) from e

    def sent(self, row: Row, now_ms: int) -> None:
        """The broker took it: wait for the controller, longer each time."""
        try:
            with self._db:
                self._db.execute(
                    "UPDATE rows SET tries = tries + 1, next_ms = ? + ? * (1 << MIN(tries, ?))"
                    " WHERE stream = ? AND epoch = ? AND seq = ?",
                    (now_ms, self._resend_ms, _BACKOFF_DOUBLINGS, row.stream, row.epoch, row.seq),
                )
        except sqlite3.Error as e:
            raise self._fault(e) from e

    def acknowledged(self, ack: wire.Ack) -> int:
        """The controller has every row up to the watermark: delete them; returns how many.

        If it asks for the rest again, they are due at once.
        """
        try:
            with self._db:
                where = "stream = ? AND epoch = ? AND seq <= ?"
                key = (ack.stream, ack.epoch, ack.seq)
                freed = self._scalar(f"SELECT COALESCE(SUM(LENGTH(payload)), 0) FROM rows WHERE {where}", key)  # noqa: S608
                count = self._db.execute(f"DELETE FROM rows WHERE {where}", key).rowcount  # noqa: S608
                self._bytes -= freed
                if ack.resend:
                    self._db.execute(
                        "UPDATE rows SET next_ms = 0, tries = 0 WHERE stream = ? AND epoch = ?", key[:2]
                    )
                return count
        except sqlite3.Error as e:
            raise self._fault(e) from e

    def depth(self) -> int:
        """Rows that wait."""
        try:
            return self._scalar("SELECT COUNT(*) FROM rows")
        except sqlite3.Error as e:
            raise self._fault(e) from e

    def result(self, command_id: str) -> bytes | None:
        """The stored result of a command, so that the same id again does nothing."""
        try:
            row = self._db.execute("SELECT body FROM results WHERE id = ?", (command_id,)).fetchone()
        except sqlite3.Error as e:
            raise self._fault(e) from e
        return None if row is None else bytes(row[0])

    def keep_result(self, command_id: str, body: bytes, now_ms: int) -> None:
        """Remember a result durably; the oldest beyond the last 200 are forgotten."""
        try:
            self._db.execute("PRAGMA synchronous=FULL")
            with self._db:
                self._db.execute(
                    "INSERT OR REPLACE INTO results VALUES (?, ?, ?)", (command_id, now_ms, body)
                )
                self._db.execute(
                    "DELETE FROM results WHERE id NOT IN"
                    " (SELECT id FROM results ORDER BY at_ms DESC LIMIT ?)",
                    (_RESULTS_KEPT,),
                )
        except sqlite3.Error as e:
            raise self._fault(e) from e

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def _next(self, stream: Stream) -> tuple[str, int]:
        self._db.execute("INSERT OR IGNORE INTO streams VALUES (?, ?, 0, 0)", (stream, uuid.uuid4().hex[:12]))
        self._db.execute("UPDATE streams SET seq = seq + 1 WHERE stream = ?", (stream,))
        row = self._db.execute("SELECT epoch, seq FROM streams WHERE stream = ?", (stream,)).fetchone()
        return str(row[0]), int(row[1])

    def _evict(self, now_ms: int) -> None:
        self._drop("expires_ms < ?", (now_ms,))
        while self._bytes > self._max_bytes:
            # A handful at once: eviction happens when the network is away, at every put.
            self._drop(
                "(stream, epoch, seq) IN (SELECT stream, epoch, seq FROM rows"
                " ORDER BY priority, stream DESC, seq LIMIT 8)",
                (),
            )

    def _drop(self, where: str, values: tuple[Any, ...]) -> None:
        gone = self._db.execute(
            f"DELETE FROM rows WHERE {where} RETURNING stream, LENGTH(payload)",  # noqa: S608
            values,
        ).fetchall()
        for stream, size in gone:
            self._bytes -= size
            self._db.execute("UPDATE streams SET lost = lost + 1 WHERE stream = ?", (stream,))

    def _scalar(self, query: str, values: tuple[Any, ...] = ()) -> int:
        return int(self._db.execute(query, values).fetchone()[0])

    def _fault(self, error: sqlite3.Error) -> StorageFault:
        with suppress(sqlite3.Error):  # unreadable: the count of before is good enough for eviction
            self._bytes = self._scalar("SELECT COALESCE(SUM(LENGTH(payload)), 0) FROM rows")
        return _storage_fault(error)


class _Damaged(Exception):
    """The file is no database, or a broken one. Other faults say nothing about its content."""


def _open(path: Path) -> sqlite3.Connection:
    """Raises _Damaged, or StorageFault when the disk is full, read-only or out of order."""
    try:
        db = sqlite3.connect(path, isolation_level="DEFERRED")
    except sqlite3.Error as e:
        raise _storage_fault(e) from e
    try:
        db.execute("PRAGMA journal_mode=WAL")
        problem = str(db.execute("PRAGMA quick_check").fetchone()[0])
        if problem == "ok":
            db.executescript(_SCHEMA)
            return db
    except sqlite3.Error as e:
        db.close()
        if getattr(e, "sqlite_errorcode", 0) & 0xFF in _DAMAGED:
            raise _Damaged(str(e)) from e
        raise _storage_fault(e) from e
    db.close()
    raise _Damaged(problem)


def _storage_fault(error: sqlite3.Error) -> StorageFault:
    full = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL
    return StorageFault(
        Reason.DISK_FULL if full else Reason.STORAGE_FAULT,
        f"outbox: {error}",
        "free space on the device" if full else "check the device's disk",
    )
