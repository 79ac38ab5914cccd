"""One SQLite database of rows that wait for the controller: its transactions and its faults.

It stores, finds, deletes and evicts; when to commit and what to do when the disk fails is the outbox's.
Row numbers begin anew in an epoch of their own with every opening, so no number is ever used twice, also
when the database on the disk is older than what was sent from it (a power cut, a restored image, a clone).
Only a box that takes over from one that failed goes on with that one's numbers: a transaction whose end
answered with a fault may be on the disk all the same, so its rows must keep their names.
One connection, used by one thread.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from edge_agent.messaging import boxfile
from edge_agent.messaging.boxfile import FAULTS, Damaged, Name, sealed, storage_fault, whole
from edge_agent.messaging.results import Result
from edge_contract import wire
from edge_contract.errors import Reason, StorageFault

__all__ = ["Box", "Damaged", "Put", "Row"]

_INSERT = "INSERT OR IGNORE INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
# A row at a time is too slow while the network is away and every put evicts.
_EVICTED_AT_ONCE = 8
# What one record can name; the next one names the next.
_GONE_TOLD = 16
_NONE_TOLD = ("", "", 0)
# How many numbers directly before one of `k` belong to no row and no tombstone.
_ACKED = """, k.{0} - 1 - MAX(
    COALESCE((SELECT MAX(r.seq) FROM rows r
        WHERE r.stream = k.stream AND r.epoch = k.epoch AND r.seq < k.{0}), 0),
    COALESCE((SELECT g.last FROM gone g WHERE g.stream = k.stream AND g.epoch = k.epoch AND g.first < k.{0}
        ORDER BY g.first DESC LIMIT 1), 0))"""
_ROWS = f"SELECT id, {boxfile.ROW}" + _ACKED.format("seq")
_GONE = "SELECT stream, epoch, first, last, crc" + _ACKED.format("first")


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


class Box:
    """Raises StorageFault from every method; then nothing of the call has happened.

    Except that a transaction whose end the disk answered with a fault may be found done at the next opening.
    """

    def __init__(self, path: Path | None, *, max_bytes: int, heir_of: Box | None = None) -> None:
        """Open or create; `path` None is memory. Raises Damaged or StorageFault."""
        self.max_bytes = max_bytes
        self.epoch: str = heir_of.epoch if heir_of else uuid.uuid4().hex[:12]
        # (numbered, lost) of this epoch, as of the last transaction that surely was.
        self._counts: dict[str, tuple[int, int]] = dict(heir_of._counts) if heir_of else {}
        # Only of an epoch that was here from its first number on is it certain that what is not here, and not
        # gone, was acknowledged; a heir does not see what lies on the disk.
        self._whole_epoch = "" if heir_of else self.epoch
        self._told = _NONE_TOLD
        self._db, self.dropped = boxfile.open_file(path)
        try:
            self.bytes = self._size()
            self.run_ms = self._scalar("SELECT run_ms FROM clock")
            # SQLite would give the id of the newest row again once that row is deleted.
            self.newest_id = self._scalar("SELECT COALESCE(MAX(id), 0) FROM rows")
            self._forget_epochs()
            for stream, (seq, lost) in self._counts.items():
                boxfile.put_epoch(self._db, stream, self.epoch, seq, lost)
        except FAULTS as e:
            self._db.close()
            raise storage_fault(e) from e

    def apply(
        self,
        puts: Sequence[Put],
        acks: Sequence[wire.Ack],
        *,
        run_ms: int,
        durable: bool,
        results: Sequence[Result] = (),
        forgotten: Sequence[str] = (),
    ) -> set[int]:
        """Store rows, results and acknowledgements in one transaction; returns the ids that are no more.

        `run_ms` is this box's running time, which rows expire by. `durable` syncs to the disk.
        """
        before = self.bytes
        try:
            with self._transaction(durable=durable):
                removed = {id_ for ack in acks for id_ in self._acknowledge(ack)}
                self._insert(puts, run_ms)
                self._put_results(results)
                self._db.executemany("DELETE FROM results WHERE id = ?", [(id_,) for id_ in forgotten])
                self._db.execute("UPDATE clock SET run_ms = ?, crc = ?", sealed(run_ms))
                removed |= self._evict()
                counts = self._own_counts()
        except FAULTS as e:
            self.bytes = before
            raise storage_fault(e) from e
        self._counts = counts
        self.run_ms = run_ms
        self.newest_id += len(puts)
        return removed

    def expire(self, run_ms: int) -> set[int]:
        """Drop what has waited too long; counted as lost. Returns the ids."""
        before = self.bytes
        try:
            with self._transaction():
                dropped = self._drop("expires_ms < ?", (run_ms,))
                counts = self._own_counts()
        except FAULTS as e:
            self.bytes = before
            raise storage_fault(e) from e
        self._counts = counts
        return dropped

    def after(self, priority: int, after_id: int, until_id: int, limit: int) -> list[Row]:
        """Rows of one priority with after_id < id <= until_id, oldest first, ready to be published.

        A row whose bits have flipped since the opening is a fault: the next opening drops and names it.
        """
        try:
            found = self._db.execute(
                _ROWS + " FROM rows k WHERE priority = ? AND id > ? AND id <= ? ORDER BY id LIMIT ?",
                (priority, after_id, until_id, limit),
            ).fetchall()
            gone = self._told_gone() if found else b""
            lost = boxfile.lost_counts(self._db) if found else {}
        except FAULTS as e:
            raise storage_fault(e) from e
        if not all(whole(row[1:-1]) for row in found):
            raise StorageFault(
                Reason.STORAGE_FAULT, "outbox: a row does not match its checksum", "check the device's disk"
            )
        return [
            Row(id_, stream, epoch, seq, rank, _record(stream, epoch, seq, acked, lost, gone, payload))
            for id_, stream, epoch, seq, rank, _, payload, _, before in found
            for acked in [before if epoch == self._whole_epoch else 0]
        ]

    def depth(self) -> int:
        """Rows that wait."""
        try:
            return self._scalar("SELECT COUNT(*) FROM rows")
        except FAULTS as e:
            raise storage_fault(e) from e

    def results(self) -> list[Result]:
        """Every stored result of a command."""
        try:
            found = self._db.execute("SELECT id, expires_ms, CAST(body AS BLOB), crc FROM results").fetchall()
        except FAULTS as e:
            raise storage_fault(e) from e
        return [Result(*entry[:-1]) for entry in found if whole(entry)]

    def adopt(self, other: Box, run_ms: int, results: Sequence[Result]) -> int:
        """Take over all that `other` holds, durably, under its own names; returns how many rows.

        Doing it again, after an attempt that may have reached the disk or not, adds nothing.
        """
        before = self.bytes
        try:
            shift = run_ms - other.run_ms
            found = other._db.execute(f"SELECT id, {boxfile.ROW} FROM rows").fetchall()  # noqa: S608
            rows = [
                (id_ + self.newest_id, *sealed(*name, priority, expires_ms + shift, payload))
                for id_, *name, priority, expires_ms, payload, _ in found
            ]
            gone = other._db.execute("SELECT stream, epoch, first, last, crc FROM gone").fetchall()
            epochs = other._db.execute("SELECT stream, epoch, seq, lost FROM epochs").fetchall()
            with self._transaction(durable=True):
                self._db.executemany(_INSERT, rows)
                for stream, epoch, *figures in epochs:
                    seq, lost = map(max, boxfile.epoch_of(self._db, stream, epoch), figures)
                    boxfile.put_epoch(self._db, stream, epoch, seq, lost)
                self._db.executemany("INSERT OR REPLACE INTO gone VALUES (?, ?, ?, ?, ?)", gone)
                self._put_results(results)
                self.bytes = self._size()
                self._evict()
        except FAULTS as e:
            self.bytes = before
            raise storage_fault(e) from e
        self.newest_id += other.newest_id
        return len(rows)

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def _insert(self, puts: Sequence[Put], run_ms: int) -> None:
        numbered = list(enumerate(puts, self.newest_id + 1))
        for stream in {put.stream for put in puts}:
            mine = [(id_, put) for id_, put in numbered if put.stream == stream]
            last, lost = boxfile.epoch_of(self._db, stream, self.epoch)
            boxfile.put_epoch(self._db, stream, self.epoch, last + len(mine), lost)
            self._db.executemany(
                _INSERT,
                [
                    (id_, *sealed(stream, self.epoch, seq, p.priority, run_ms + p.life_ms, p.payload))
                    for seq, (id_, p) in enumerate(mine, last + 1)
                ],
            )
        self.bytes += sum(len(put.payload) for put in puts)

    def _put_results(self, results: Sequence[Result]) -> None:
        self._db.executemany(
            "INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?)", [sealed(*r) for r in results]
        )

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
            known = "DELETE FROM gone WHERE stream = ? AND epoch = ? AND first >= ? AND last <= ?"
            self._db.execute(known, (*key, first, last))

    def _evict(self) -> set[int]:
        removed: set[int] = set()
        while self.bytes > self.max_bytes:
            oldest = "id IN (SELECT id FROM rows ORDER BY priority, id LIMIT ?)"
            evicted = self._drop(oldest, (_EVICTED_AT_ONCE,))
            if not evicted:
                break  # sizes that flipped: there is nothing to be evicted
            removed |= evicted
        return removed

    def _drop(self, where: str, values: tuple[Any, ...]) -> set[int]:
        """Delete rows that were not acknowledged; each leaves its number among those that are gone."""
        dropped = self._db.execute(
            f"DELETE FROM rows WHERE {where} RETURNING id, stream, epoch, seq, LENGTH(payload)",  # noqa: S608
            values,
        ).fetchall()
        self.bytes -= sum(row[4] for row in dropped)
        boxfile.tell_gone(self._db, [Name(*row[1:4]) for row in dropped])
        return {row[0] for row in dropped}

    def _forget_epochs(self) -> None:
        """Epochs of earlier starts that have nothing left to tell."""
        self._db.execute(
            "DELETE FROM epochs WHERE NOT EXISTS (SELECT 1 FROM rows r WHERE r.stream = epochs.stream"
            " AND r.epoch = epochs.epoch) AND NOT EXISTS (SELECT 1 FROM gone g"
            " WHERE g.stream = epochs.stream AND g.epoch = epochs.epoch)"
        )

    def _own_counts(self) -> dict[str, tuple[int, int]]:
        found = self._db.execute("SELECT stream, seq, lost FROM epochs WHERE epoch = ?", (self.epoch,))
        return {stream: (seq, lost) for stream, seq, lost in found}

    def _told_gone(self) -> bytes:
        """Those that follow the last told ones; after the end, the first again."""
        later = " FROM gone k WHERE (stream, epoch, first) > (?, ?, ?) ORDER BY stream, epoch, first LIMIT ?"
        found: list[tuple[Any, ...]] = []
        for start in (self._told, _NONE_TOLD):
            found = found or self._db.execute(_GONE + later, (*start, _GONE_TOLD)).fetchall()
        self._told = found[-1][:3] if found else _NONE_TOLD
        told = [self._tombstone(*row) for row in found if whole(row[:5])]
        return b'"gone":' + json.dumps(told, separators=(",", ":")).encode() + b"," if told else b""

    def _tombstone(
        self, stream: str, epoch: str, first: int, last: int, _crc: int, acked: int
    ) -> dict[str, Any]:
        known = {"acked": acked} if acked and epoch == self._whole_epoch else {}
        return {**known, "epoch": epoch, "first": first, "last": last, "stream": stream}

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

    def _size(self) -> int:
        return self._scalar("SELECT COALESCE(SUM(LENGTH(payload)), 0) FROM rows")

    def _scalar(self, query: str) -> int:
        return int(self._db.execute(query).fetchone()[0])


def _record(
    stream: str,
    epoch: str,
    seq: int,
    acked: int,
    lost: dict[tuple[str, str], int],
    gone: bytes,
    payload: bytes,
) -> bytes:
    """The bytes of a wire.Record around a payload that is canonical already."""
    return b'{%s"epoch":"%s",%s"lost":%d,"payload":%s,"schema":1,"seq":%d,"stream":"%s"}' % (
        b'"acked":%d,' % acked if acked else b"",
        epoch.encode(),
        gone,
        lost.get((stream, epoch), 0),
        payload,
        seq,
        stream.encode(),
    )
