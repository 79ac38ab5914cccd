"""What devices have reported, in SQLite. A row is here, durably, before it is acknowledged.

How far to acknowledge is decided in watermark.py. Several `edge-fleet watch` may share one file.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from edge_contract import canonical, wire
from edge_contract.errors import InputRejected, Reason, StorageFault
from fleet import watermark
from fleet.watermark import Gap, Range, Run

_VERSION = 3
_KEY = "tenant TEXT NOT NULL, device TEXT NOT NULL, stream TEXT NOT NULL, epoch TEXT NOT NULL"
_SCHEMA = f"""
CREATE TABLE records (
    {_KEY}, seq INTEGER NOT NULL, lost INTEGER NOT NULL, received_ms INTEGER NOT NULL, payload TEXT NOT NULL,
    PRIMARY KEY (tenant, device, stream, epoch, seq)
) WITHOUT ROWID;
CREATE TABLE marks (
    {_KEY}, seq INTEGER NOT NULL,
    PRIMARY KEY (tenant, device, stream, epoch)
) WITHOUT ROWID;
CREATE TABLE runs (
    {_KEY}, first INTEGER NOT NULL, last INTEGER NOT NULL, since_ms INTEGER NOT NULL, told INTEGER NOT NULL,
    PRIMARY KEY (tenant, device, stream, epoch, first)
) WITHOUT ROWID;
CREATE INDEX untold ON runs (since_ms) WHERE told = 0;
CREATE TABLE gaps (
    {_KEY}, first INTEGER NOT NULL, last INTEGER NOT NULL, explained INTEGER NOT NULL, at_ms INTEGER NOT NULL,
    elsewhere INTEGER NOT NULL DEFAULT 0
);
"""
# What version 2 knew of lost rows beyond a gap it had not acknowledged: devices name them again.
_FROM_2 = "DROP TABLE gone; ALTER TABLE gaps ADD COLUMN elsewhere INTEGER NOT NULL DEFAULT 0"
_MINE = "tenant = ? AND device = ? AND stream = ? AND epoch = ?"
_ADD_RECORD = "INSERT OR IGNORE INTO records VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_ADD_MARK = "INSERT OR IGNORE INTO marks VALUES (?, ?, ?, ?, 0)"
_ADD_RUN = "INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_ADD_GAP = """
INSERT INTO gaps (tenant, device, stream, epoch, first, last, explained, elsewhere, at_ms)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"""
# What is acknowledged beyond the first gap, besides what has just come.
_RUNS_TOLD = 64


class Stream(NamedTuple):
    """One numbered sequence of rows: a device's stream in one epoch of its outbox."""

    tenant: str
    device: str
    stream: wire.StreamName
    epoch: str


class Progress(NamedTuple):
    """How far a stream is acknowledged now (0: not at all), and the gaps to report.

    `have`: runs of rows beyond the first open gap that are stored or explained, those at least that something
    has just come of; `missing`: rows between all of them that are not here, and not explained.
    """

    stream: Stream
    seq: int
    gaps: list[Gap]
    have: list[tuple[int, int]]
    missing: int


@dataclass(slots=True)
class _News:
    """What has just come of one stream."""

    new: list[int] = field(default_factory=list)
    rows: set[Range] = field(default_factory=set)
    gone: set[Range] = field(default_factory=set)
    acked: set[Range] = field(default_factory=set)


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

    def take(
        self, records: Sequence[tuple[str, str, wire.Record]], now_ms: int
    ) -> tuple[list[bool], list[Progress]]:
        """Store (tenant, device, record) in one transaction; True for each that was not here yet.

        Also returned is how far every stream now is that a record belongs to or names the lost rows of,
        and those of which a gap has been open for too long.
        """
        with self._translated(), self._transaction():
            new = [self._insert(tenant, device, record, now_ms) for tenant, device, record in records]
            fresh: defaultdict[Stream, _News] = defaultdict(_News)
            for (tenant, device, r), is_new in zip(records, new, strict=True):
                news = fresh[Stream(tenant, device, r.stream, r.epoch)]
                news.new += [r.seq] if is_new else []
                news.rows.add((r.seq, r.seq))
                news.acked.add((r.seq - r.acked, r.seq - 1))
                for gone in r.gone:
                    news = fresh[Stream(tenant, device, gone.stream, gone.epoch)]
                    news.gone.add((gone.first, gone.last))
                    news.acked.add((gone.first - gone.acked, gone.first - 1))
            for stream in self._impatient(now_ms):
                fresh[stream]  # it has no news, but is looked at
            return new, [self._settle(stream, fresh[stream], now_ms) for stream in sorted(fresh)]

    def _insert(self, tenant: str, device: str, record: wire.Record, now_ms: int) -> bool:
        payload = canonical.to_bytes(record.payload).decode()
        key = (tenant, device, record.stream, record.epoch)
        row = (*key, record.seq, record.lost, now_ms, payload)
        return self._db.execute(_ADD_RECORD, row).rowcount == 1

    def _settle(self, stream: Stream, news: _News, now_ms: int) -> Progress:
        self._db.execute(_ADD_MARK, stream)
        (seq,) = self._db.execute(f"SELECT seq FROM marks WHERE {_MINE}", stream).fetchone()  # noqa: S608
        before = [
            Run(first, last, since_ms, bool(told))
            for first, last, since_ms, told in self._db.execute(
                f"SELECT first, last, since_ms, told FROM runs WHERE {_MINE} ORDER BY first",  # noqa: S608
                stream,
            )
        ]
        runs = watermark.add(before, (s for s in news.new if s > seq), now_ms)
        gaps: list[Gap] = []
        for told, elsewhere in ((news.gone, False), (news.acked, True)):
            explained = watermark.unsettled(seq, runs, told)
            gaps += [Gap(*hole, explained=True, elsewhere=elsewhere) for hole in explained]
            runs = watermark.add_ranges(runs, explained, now_ms)
        moved = watermark.advance(seq, runs, now_ms=now_ms, patience_ms=self._patience_ms)
        gaps += moved.gaps
        if moved.seq != seq:
            self._db.execute(f"UPDATE marks SET seq = ? WHERE {_MINE}", (moved.seq, *stream))  # noqa: S608
        if moved.runs != before:
            self._db.execute(f"DELETE FROM runs WHERE {_MINE}", stream)  # noqa: S608
            self._db.executemany(_ADD_RUN, [(*stream, *run) for run in moved.runs])
        self._db.executemany(_ADD_GAP, [(*stream, *gap, now_ms) for gap in gaps])
        have = watermark.to_tell(moved.runs, news.rows | news.gone, _RUNS_TOLD)
        return Progress(stream, moved.seq, gaps, have, watermark.missing(moved.seq, moved.runs))

    def _impatient(self, now_ms: int) -> set[Stream]:
        """Streams with a gap that has been open for too long, and was not reported."""
        query = "SELECT tenant, device, stream, epoch FROM runs WHERE told = 0 AND since_ms <= ?"
        return {Stream(*row) for row in self._db.execute(query, (now_ms - self._patience_ms,))}

    def _prepare(self) -> None:
        with self._transaction():
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if version == 0 and tables == 0:
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {_VERSION}")
            elif version == 2:
                for statement in _FROM_2.split(";"):
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
