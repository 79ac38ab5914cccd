"""The outbox's database as a file: its schema, how it is opened, and what a flipped bit costs.

SQLite has no checksums of its own, so every entry has one over all of its columns. At each opening whatever
fails its checksum is dropped (`mend`); a row that is dropped is named as gone. The name of a row is stored
twice, in the table and in its index, so it is known also when it was the name that flipped.
Text that is no UTF-8 is read with replacement characters: it fails its checksum like any other damage.
"""

from __future__ import annotations

import re
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, get_args

from edge_contract import wire
from edge_contract.errors import Reason, StorageFault

_VERSION = 3
_SCHEMA = """
CREATE TABLE rows (
    id INTEGER PRIMARY KEY, stream TEXT NOT NULL, epoch TEXT NOT NULL, seq INTEGER NOT NULL,
    priority INTEGER NOT NULL, expires_ms INTEGER NOT NULL, payload BLOB NOT NULL, crc INTEGER NOT NULL,
    UNIQUE (stream, epoch, seq)
);
CREATE INDEX by_priority ON rows (priority);
CREATE TABLE epochs (stream TEXT NOT NULL, epoch TEXT NOT NULL, seq INTEGER NOT NULL, lost INTEGER NOT NULL,
    crc INTEGER NOT NULL, PRIMARY KEY (stream, epoch)) WITHOUT ROWID;
CREATE TABLE gone (stream TEXT NOT NULL, epoch TEXT NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL,
    crc INTEGER NOT NULL, PRIMARY KEY (stream, epoch, first)) WITHOUT ROWID;
CREATE TABLE results (id TEXT PRIMARY KEY, expires_ms INTEGER NOT NULL, body BLOB NOT NULL,
    crc INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE clock (run_ms INTEGER NOT NULL, crc INTEGER NOT NULL);
"""
# All columns but the row's number, which changes with the box.
ROW = "stream, epoch, seq, priority, expires_ms, CAST(payload AS BLOB), crc"
# Small enough to be written anew as a whole when one entry of them is damaged.
_SMALL = {
    "epochs": "stream, epoch, seq, lost, crc",
    "gone": "stream, epoch, first, last, crc",
    "results": "id, expires_ms, CAST(body AS BLOB), crc",
    "clock": "run_ms, crc",
}
# What these mean is in the file, so it is the file that is at fault: SQLITE_ERROR is "no such column".
_DAMAGED = frozenset(
    {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT}
)
# What reading a file can raise whose bits have flipped: also values of other types than were written.
FAULTS = (sqlite3.Error, TypeError, ValueError, OverflowError)
# When the write-ahead log is written back, and to what it is cut after it has grown in a storm.
_WAL_PAGES, _WAL_BYTES = 256, 1 << 20
_EPOCH = re.compile(r"[0-9a-f]{12}\Z")
# In the file's header: the versions of the format for writing and reading, and the only values there are.
_FORMAT, _FORMATS = slice(18, 20), (b"\1\1", b"\2\2")


class Damaged(Exception):
    """The file is no database of ours, or a broken one. Other faults say nothing about its content."""


class Name(NamedTuple):
    """What a row is called everywhere."""

    stream: str
    epoch: str
    seq: int


def sealed(*values: Any) -> tuple[Any, ...]:
    """An entry's values and their checksum."""
    return (*values, zlib.crc32(repr(values).encode()))


def whole(entry: tuple[Any, ...]) -> bool:
    """Whether an entry is as it was written."""
    return bool(sealed(*entry[:-1]) == entry)


def open_file(path: Path | None) -> tuple[sqlite3.Connection, int]:
    """Open or create (`path` None is memory), and mend; also says how many rows were dropped.

    Raises Damaged, or StorageFault when the disk is full, read-only or out of order.
    """
    try:
        db = sqlite3.connect(path or ":memory:", isolation_level=None)
    except sqlite3.Error as e:
        raise storage_fault(e) from e
    try:
        db.text_factory = _text
        db.execute("PRAGMA journal_mode=WAL")
        db.execute(f"PRAGMA journal_size_limit={_WAL_BYTES}")
        db.execute(f"PRAGMA wal_autocheckpoint={_WAL_PAGES}")
        _prepare(db)
        dropped = _mend(db)
        # Only a write says whether there can be one, and it must be now, not at the first event.
        db.execute("UPDATE clock SET run_ms = run_ms")
    except (*FAULTS, Damaged) as e:
        with suppress(sqlite3.Error):
            db.close()
        if isinstance(e, Damaged):
            raise
        code = getattr(e, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        if code in _DAMAGED or (code == sqlite3.SQLITE_READONLY and _is_foreign(path)):
            raise Damaged(str(e)) from e
        raise storage_fault(e) from e
    return db, dropped


def tell_gone(db: sqlite3.Connection, names: list[Name]) -> None:
    """Write down that these rows will not come, within the caller's transaction."""
    runs = groupby(enumerate(sorted(names)), key=lambda item: (*item[1][:2], item[1].seq - item[0]))
    for (stream, epoch, _), run in runs:
        seqs = [name.seq for _, name in run]
        first, last, key = seqs[0], seqs[-1], (stream, epoch)
        seq, lost = epoch_of(db, *key)
        put_epoch(db, *key, max(seq, last), lost + len(seqs))
        before = db.execute(
            "SELECT first FROM gone WHERE stream = ? AND epoch = ? AND last = ?", (*key, first - 1)
        ).fetchone()
        first = before[0] if before else first
        after = db.execute(
            "DELETE FROM gone WHERE stream = ? AND epoch = ? AND first = ? RETURNING last", (*key, last + 1)
        ).fetchall()
        last = after[0][0] if after else last
        db.execute("INSERT OR REPLACE INTO gone VALUES (?, ?, ?, ?, ?)", sealed(*key, first, last))


def epoch_of(db: sqlite3.Connection, stream: str, epoch: str) -> tuple[int, int]:
    """(rows numbered so far, rows lost so far)."""
    found = db.execute(
        "SELECT seq, lost FROM epochs WHERE stream = ? AND epoch = ?", (stream, epoch)
    ).fetchone()
    return found or (0, 0)


def put_epoch(db: sqlite3.Connection, stream: str, epoch: str, seq: int, lost: int) -> None:
    """Write both figures of an epoch."""
    db.execute("INSERT OR REPLACE INTO epochs VALUES (?, ?, ?, ?, ?)", sealed(stream, epoch, seq, lost))


def storage_fault(error: Exception) -> StorageFault:
    """sqlite's complaint as ours."""
    full = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL
    return StorageFault(
        Reason.DISK_FULL if full else Reason.STORAGE_FAULT,
        f"outbox: {error}",
        "free space on the device" if full else "check the device's disk",
    )


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _prepare(db: sqlite3.Connection) -> None:
    """Create what a new file needs. Raises Damaged when the tables are not ours."""
    version = db.execute("PRAGMA user_version").fetchone()[0]
    found = _tables(db)
    if version == 0 and not found:
        db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {_VERSION};")
        db.execute("INSERT INTO clock VALUES (?, ?)", sealed(0))
        db.execute("COMMIT")
    elif version != _VERSION or found != _our_tables():
        raise Damaged("its tables are not those of this version")


def _tables(db: sqlite3.Connection) -> set[tuple[str, str, str]]:
    return set(db.execute("SELECT type, name, COALESCE(sql, '') FROM sqlite_master"))


@cache
def _our_tables() -> set[tuple[str, str, str]]:
    with sqlite3.connect(":memory:") as db:
        db.executescript(_SCHEMA)
        found = _tables(db)
    db.close()
    return found


def _is_foreign(path: Path | None) -> bool:
    """Whether SQLite calls a file read-only because of a format that it never writes."""
    if path is None:
        return False
    try:
        with path.open("rb") as stream:
            return stream.read(100)[_FORMAT] not in _FORMATS
    except OSError:
        return False


def _mend(db: sqlite3.Connection) -> int:
    """Drop what is damaged; returns how many rows. Raises Damaged, or what sqlite raises."""
    small = {
        table: list(db.execute(f"SELECT {columns} FROM {table}"))  # noqa: S608
        for table, columns in _SMALL.items()
    }
    kept = {table: [entry for entry in entries if whole(entry)] for table, entries in small.items()}
    rows = db.execute(f"SELECT id, {ROW} FROM rows NOT INDEXED")  # noqa: S608
    bad = [(id_, Name(*row[:3])) for id_, *row in rows if not whole(tuple(row))]
    sound = not bad and kept == small and len(kept["clock"]) == 1
    if sound and _problem(db) == "":
        return 0
    # Deleting a row that its index does not know is an error for SQLite, except in this mode.
    db.execute("PRAGMA writable_schema=ON")
    db.execute("BEGIN IMMEDIATE")
    try:
        _drop(db, bad, kept)
        db.execute("REINDEX")
        problem = _problem(db)
        db.execute("ROLLBACK" if problem else "COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    finally:
        db.execute("PRAGMA writable_schema=OFF")
    if problem:
        raise Damaged(problem)
    return len(bad)


def _drop(
    db: sqlite3.Connection, bad: list[tuple[Any, Name]], kept: dict[str, list[tuple[Any, ...]]]
) -> None:
    # A row without rowid whose key has flipped cannot be found by it, so these are written anew.
    for table, entries in kept.items():
        db.execute(f"DELETE FROM {table}")  # noqa: S608
        marks = ", ".join("?" * (_SMALL[table].count(",") + 1))
        db.executemany(f"INSERT INTO {table} VALUES ({marks})", entries)  # noqa: S608
    if len(kept["clock"]) != 1:  # rows wait longer than they should; the bound on bytes holds
        db.execute("DELETE FROM clock")
        db.execute("INSERT INTO clock VALUES (?, ?)", sealed(0))
    names = _index_names(db) if bad else {}
    numbered = {entry[:2]: entry[2] for entry in kept["epochs"]}
    for id_, _ in bad:
        db.execute("DELETE FROM rows WHERE id = ?", (id_,))
    told = {names.get(id_, name) for id_, name in bad}
    tell_gone(db, [name for name in told if _is_plausible(name, numbered.get(name[:2], 0))])


def _index_names(db: sqlite3.Connection) -> dict[int, Name]:
    """The names of all rows as the index has them."""
    query = "SELECT id, stream, epoch, seq FROM rows INDEXED BY sqlite_autoindex_rows_1"
    return {id_: Name(*name) for id_, *name in db.execute(query)}


def _is_plausible(name: Name, numbered: int) -> bool:
    """Whether a row was ever called so; a wrong tombstone would be worse than none."""
    streams = get_args(wire.StreamName)
    known = name.stream in streams and isinstance(name.epoch, str) and _EPOCH.match(name.epoch)
    return bool(known) and isinstance(name.seq, int) and 1 <= name.seq <= numbered


def _problem(db: sqlite3.Connection) -> str:
    """What SQLite itself finds wrong with the file, or nothing."""
    found = str(db.execute("PRAGMA integrity_check(1)").fetchone()[0])
    return "" if found == "ok" else found


def lost_counts(db: sqlite3.Connection) -> dict[tuple[str, str], int]:
    """(stream, epoch) → rows lost so far, where there are any."""
    found: Iterator[tuple[Any, ...]] = db.execute(f"SELECT {_SMALL['epochs']} FROM epochs WHERE lost > 0")  # noqa: S608
    return {entry[:2]: entry[3] for entry in found if whole(entry)}
