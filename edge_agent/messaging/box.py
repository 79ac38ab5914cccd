"""One SQLite database of rows that wait for the controller: its schema, its transactions, its faults.

It stores, finds, deletes and evicts; when to commit and what to do when the disk fails is the outbox's.
Row numbers begin anew in an epoch of their own with every opening, so no number is ever used twice, also
when the database on the disk is older than what was sent from it (a power cut, a restored image, a clone).
One connection, used by one thread.
"""

from __future__ import annotations

import json
import sqlite3
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from edge_contract import wire
from edge_contract.errors import Reason, StorageFault

_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_VERSION = 2
_SCHEMA = """
CREATE TABLE rows (
    id INTEGER PRIMARY KEY, stream TEXT NOT NULL, epoch TEXT NOT NULL, seq INTEGER NOT NULL,
    priority INTEGER NOT NULL, expires_ms INTEGER NOT NULL, crc INTEGER NOT NULL, payload BLOB NOT NULL,
    UNIQUE (stream, epoch, seq)
);
CREATE INDEX by_priority ON rows (priority);
CREATE TABLE epochs (stream TEXT NOT NULL, epoch TEXT NOT NULL, seq INTEGER NOT NULL, lost INTEGER NOT NULL,
    PRIMARY KEY (stream, epoch)) WITHOUT ROWID;
CREATE TABLE gone (stream TEXT NOT NULL, epoch TEXT NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL,
    PRIMARY KEY (stream, epoch, first)) WITHOUT ROWID;
CREATE TABLE results (id TEXT PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE clock (run_ms INTEGER NOT NULL);
INSERT INTO clock VALUES (0);
"""
_INSERT = "INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_TABLES = ("rows", "epochs", "gone", "results", "clock")
_RESULTS_KEPT = 200
# A row at a time is too slow while the network is away and every put evicts.
_EVICTED_AT_ONCE = 8
# When the write-ahead log is written back, and to what it is cut after it has grown in a storm.
_WAL_PAGES, _WAL_BYTES = 256, 1 << 20
# What one record can name. A controller acknowledges these, then come the next.
_GONE_TOLD = 16


class Put(NamedTuple):
    """A row that is about to be stored. `life_ms`: how much running time it may wait."""

    stream: wire.StreamName
    priority: int
    life_ms: int
    payload: bytes


class Row(NamedTuple):
    """A stored row, and the bytes to publish. `id` is this database's; the rest identifies it everywhere."""

    id: int
    stream: wire.StreamName
    epoch: str
    seq: int
    priority: int
    data: bytes


class Damaged(Exception):
    """The file is no database of ours, or a broken one. Other faults say nothing about its content."""


class Box:
    """Raises StorageFault from every method; then nothing of the call has happened."""

    def __init__(self, path: Path | None, *, max_bytes: int) -> None:
        """Open or create; `path` None is memory. Raises Damaged or StorageFault."""
        self.max_bytes = max_bytes
        self.epoch = uuid.uuid4().hex[:12]
        self._db = _open(path)
        try:
            self.bytes = self._scalar("SELECT COALESCE(SUM(LENGTH(payload)), 0) FROM rows")
            self.run_ms = self._scalar("SELECT run_ms FROM clock")
            # SQLite would give the id of the newest row again once that row is deleted.
            self.newest_id = self._scalar("SELECT COALESCE(MAX(id), 0) FROM rows")
            self._forget_epochs()
        except sqlite3.Error as e:
            self._db.close()
            raise storage_fault(e) from e

    def apply(self, puts: Sequence[Put], acks: Sequence[wire.Ack], *, run_ms: int, durable: bool) -> set[int]:
        """Store rows and take acknowledgements in one transaction; returns the ids that are no more.

        `run_ms` is this box's running time, which rows expire by. `durable` syncs to the disk.
        """
        before = self.bytes
        try:
            with self._transaction(durable=durable):
                removed = {id_ for ack in acks for id_ in self._acknowledge(ack)}
                self._insert(puts, run_ms)
                self._db.execute("UPDATE clock SET run_ms = ?", (run_ms,))
                removed |= self._evict()
        except sqlite3.Error as e:
            self.bytes = before
            raise storage_fault(e) from e
        self.run_ms = run_ms
        self.newest_id += len(puts)
        return removed

    def expire(self, run_ms: int) -> set[int]:
        """Drop what has waited too long; counted as lost. Returns the ids."""
        before = self.bytes
        try:
            with self._transaction():
                return self._drop("expires_ms < ?", (run_ms,))
        except sqlite3.Error as e:
            self.bytes = before
            raise storage_fault(e) from e

    def after(self, priority: int, after_id: int, until_id: int, limit: int) -> list[Row]:
        """Rows of one priority with after_id < id <= until_id, oldest first, ready to be published."""
        try:
            found = self._db.execute(
                "SELECT id, stream, epoch, seq, priority, crc, CAST(payload AS BLOB) FROM rows"
                " WHERE priority = ? AND id > ? AND id <= ? ORDER BY id LIMIT ?",
                (priority, after_id, until_id, limit),
            ).fetchall()
            gone = self._told_gone() if found else b""
            good = [row for row in found if zlib.crc32(row[6]) == row[5]]
            for row in found:
                if row not in good:  # SQLite has no checksums: a bit that flipped on the disk is found here
                    with self._transaction():
                        self._drop("id = ?", (row[0],))
            lost = self._lost()
        except sqlite3.Error as e:
            raise storage_fault(e) from e
        return [
            Row(id_, stream, epoch, seq, rank, _record(stream, epoch, seq, lost, gone, payload))
            for id_, stream, epoch, seq, rank, _, payload in good
        ]

    def depth(self) -> int:
        """Rows that wait."""
        try:
            return self._scalar("SELECT COUNT(*) FROM rows")
        except sqlite3.Error as e:
            raise storage_fault(e) from e

    def result(self, command_id: str) -> bytes | None:
        """The stored result of a command."""
        try:
            row = self._db.execute("SELECT body FROM results WHERE id = ?", (command_id,)).fetchone()
        except sqlite3.Error as e:
            raise storage_fault(e) from e
        return None if row is None else bytes(row[0])

    def keep_result(self, command_id: str, body: bytes) -> None:
        """Remember a result durably; the oldest beyond the last 200 are forgotten."""
        try:
            with self._transaction(durable=True):
                self._db.execute("INSERT OR REPLACE INTO results VALUES (?, ?)", (command_id, body))
                self._db.execute(
                    "DELETE FROM results WHERE rowid NOT IN"
                    " (SELECT rowid FROM results ORDER BY rowid DESC LIMIT ?)",
                    (_RESULTS_KEPT,),
                )
        except sqlite3.Error as e:
            raise storage_fault(e) from e

    def adopt(self, other: Box, run_ms: int) -> int:
        """Take over all that `other` holds, durably, under its own epochs; returns how many rows."""
        before = self.bytes
        try:
            shift = run_ms - other.run_ms
            rows = other._db.execute(
                "SELECT id + ?, stream, epoch, seq, priority, expires_ms + ?, crc, payload FROM rows",
                (self.newest_id, shift),
            ).fetchall()
            with self._transaction(durable=True):
                self._db.executemany(_INSERT, rows)
                for table, marks in (("epochs", "?, ?, ?, ?"), ("gone", "?, ?, ?, ?"), ("results", "?, ?")):
                    found = other._db.execute(f"SELECT * FROM {table}").fetchall()  # noqa: S608
                    self._db.executemany(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", found)  # noqa: S608
                self.bytes += sum(len(row[7]) for row in rows)
                self._evict()
                self.newest_id += other.newest_id
        except sqlite3.Error as e:
            self.bytes = before
            raise storage_fault(e) from e
        return len(rows)

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def _insert(self, puts: Sequence[Put], run_ms: int) -> None:
        numbered = list(enumerate(puts, self.newest_id + 1))
        for stream in {put.stream for put in puts}:
            mine = [(id_, put) for id_, put in numbered if put.stream == stream]
            key = (stream, self.epoch)
            self._db.execute("INSERT OR IGNORE INTO epochs VALUES (?, ?, 0, 0)", key)
            (last,) = self._db.execute(
                "UPDATE epochs SET seq = seq + ? WHERE stream = ? AND epoch = ? RETURNING seq",
                (len(mine), *key),
            ).fetchone()
            first = last - len(mine) + 1
            self._db.executemany(
                _INSERT,
                [
                    (id_, *key, seq, p.priority, run_ms + p.life_ms, zlib.crc32(p.payload), p.payload)
                    for (id_, p), seq in zip(mine, range(first, first + len(mine)), strict=True)
                ],
            )
        self.bytes += sum(len(put.payload) for put in puts)

    def _acknowledge(self, ack: wire.Ack) -> Iterator[int]:
        key = (ack.stream, ack.epoch)
        for first, last in [(1, ack.seq), *ack.have]:
            rows = self._db.execute(
                "DELETE FROM rows WHERE stream = ? AND epoch = ? AND seq BETWEEN ? AND ?"
                " RETURNING id, LENGTH(payload)",
                (*key, first, last),
            ).fetchall()
            self.bytes -= sum(size for _, size in rows)
            yield from (id_ for id_, _ in rows)
        self._db.execute("DELETE FROM gone WHERE stream = ? AND epoch = ? AND last <= ?", (*key, ack.seq))

    def _evict(self) -> set[int]:
        removed: set[int] = set()
        while self.bytes > self.max_bytes:
            oldest = "id IN (SELECT id FROM rows ORDER BY priority, id LIMIT ?)"
            removed |= self._drop(oldest, (_EVICTED_AT_ONCE,))
        return removed

    def _drop(self, where: str, values: tuple[Any, ...]) -> set[int]:
        """Delete rows that were not acknowledged; each leaves its number among those that are gone."""
        dropped = self._db.execute(
            f"DELETE FROM rows WHERE {where} RETURNING id, stream, epoch, seq, LENGTH(payload)",  # noqa: S608
            values,
        ).fetchall()
        for _, stream, epoch, seq, size in sorted(dropped, key=lambda row: row[3]):
            self.bytes -= size
            key = (stream, epoch)
            self._db.execute("UPDATE epochs SET lost = lost + 1 WHERE stream = ? AND epoch = ?", key)
            grown = self._db.execute(
                "UPDATE gone SET last = ? WHERE stream = ? AND epoch = ? AND last = ?", (seq, *key, seq - 1)
            ).rowcount
            if not grown:
                self._db.execute("INSERT OR REPLACE INTO gone VALUES (?, ?, ?, ?)", (*key, seq, seq))
        return {row[0] for row in dropped}

    def _forget_epochs(self) -> None:
        """Epochs of earlier starts that have nothing left to tell."""
        self._db.execute(
            "DELETE FROM epochs WHERE NOT EXISTS (SELECT 1 FROM rows r WHERE r.stream = epochs.stream"
            " AND r.epoch = epochs.epoch) AND NOT EXISTS (SELECT 1 FROM gone g"
            " WHERE g.stream = epochs.stream AND g.epoch = epochs.epoch)"
        )

    def _told_gone(self) -> bytes:
        found = self._db.execute("SELECT * FROM gone ORDER BY epoch, first LIMIT ?", (_GONE_TOLD,)).fetchall()
        if not found:
            return b""
        names = ("stream", "epoch", "first", "last")
        told = [dict(sorted(zip(names, row, strict=True))) for row in found]
        return b'"gone":' + json.dumps(told, separators=(",", ":")).encode() + b","

    def _lost(self) -> dict[tuple[str, str], int]:
        found = self._db.execute("SELECT stream, epoch, lost FROM epochs WHERE lost > 0").fetchall()
        return {(stream, epoch): lost for stream, epoch, lost in found}

    @contextmanager
    def _transaction(self, *, durable: bool = False) -> Iterator[None]:
        """All of the block or nothing. The level of syncing can only be set outside a transaction."""
        self._db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # SQLite has done it already when the disk is full
                self._db.execute("ROLLBACK")
            raise

    def _scalar(self, query: str, values: tuple[Any, ...] = ()) -> int:
        return int(self._db.execute(query, values).fetchone()[0])


def _record(
    stream: str, epoch: str, seq: int, lost: dict[tuple[str, str], int], gone: bytes, payload: bytes
) -> bytes:
    """The bytes of a wire.Record around a payload that is canonical already."""
    return b'{"epoch":"%s",%s"lost":%d,"payload":%s,"schema":1,"seq":%d,"stream":"%s"}' % (
        epoch.encode(),
        gone,
        lost.get((stream, epoch), 0),
        payload,
        seq,
        stream.encode(),
    )


def _open(path: Path | None) -> sqlite3.Connection:
    """Raises Damaged, or StorageFault when the disk is full, read-only or out of order."""
    try:
        db = sqlite3.connect(path or ":memory:", isolation_level=None)
    except sqlite3.Error as e:
        raise storage_fault(e) from e
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute(f"PRAGMA journal_size_limit={_WAL_BYTES}")
        db.execute(f"PRAGMA wal_autocheckpoint={_WAL_PAGES}")
        problem = str(db.execute("PRAGMA quick_check").fetchone()[0])
        if problem == "ok" and _prepare(db):
            # Only a write says whether there can be one, and it must be now, not at the first event.
            db.execute("UPDATE clock SET run_ms = run_ms")
            return db
    except sqlite3.Error as e:
        with suppress(sqlite3.Error):
            db.close()
        if getattr(e, "sqlite_errorcode", 0) & 0xFF in _DAMAGED:
            raise Damaged(str(e)) from e
        raise storage_fault(e) from e
    db.close()
    raise Damaged(problem if problem != "ok" else "its tables are not those of this version")


def _prepare(db: sqlite3.Connection) -> bool:
    """Create what a new file needs; says whether the tables are ours."""
    version = db.execute("PRAGMA user_version").fetchone()[0]
    tables = {row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if version == 0 and not tables:
        db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
        return True
    return bool(version == _VERSION and tables >= set(_TABLES))


def storage_fault(error: sqlite3.Error) -> StorageFault:
    """sqlite's complaint as ours."""
    full = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL
    return StorageFault(
        Reason.DISK_FULL if full else Reason.STORAGE_FAULT,
        f"outbox: {error}",
        "free space on the device" if full else "check the device's disk",
    )
