"""The outbox: order, bounds, acknowledgement, group commit, damage, faulty disks, kills."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.messaging.box import Box, Put
from edge_agent.messaging.outbox import Outbox, Row
from edge_agent.messaging.pace import ALERT, EVENT, TELEMETRY
from edge_contract import canonical, wire
from edge_contract.errors import Reason, StorageFault
from tests.support.small_disk import fill, small_disk

_GONE = "SELECT stream, epoch, first, last FROM gone"
DAY_S = 86400.0
DAY_MS = 86_400_000
Open = Callable[..., Outbox]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Open the outbox, after closing the one before."""
    current: list[Outbox] = []

    def open_(path: Path = tmp_path / "outbox.db", max_bytes: int = 1 << 20, now_ms: int = 0) -> Outbox:
        close()
        current.append(Outbox(path, max_bytes=max_bytes, now_ms=now_ms, stamp_ms=0))
        return current[-1]

    def close() -> None:
        while current:
            current.pop().close(0)

    yield open_
    close()


def put(
    outbox: Outbox, stream: wire.StreamName, value: Any, *, now_ms: int = 0, life_s: float = DAY_S
) -> None:
    priority = EVENT if stream == "event" else TELEMETRY
    outbox.put(stream, {"n": value}, priority=priority, now_ms=now_ms, life_s=life_s)


def all_rows(outbox: Outbox, now_ms: int = 0) -> list[Row]:
    outbox.flush(now_ms)
    return [
        row
        for priority in (ALERT, EVENT, TELEMETRY)
        for row in outbox.after(priority, 0, outbox.newest_id, 100_000, now_ms)
    ]


def records(outbox: Outbox, now_ms: int = 0) -> list[wire.Record]:
    rows = all_rows(outbox, now_ms)
    found = [wire.decode(row.data, wire.Record) for row in rows]
    assert [(r.stream, r.epoch, r.seq) for r in rows] == [(r.stream, r.epoch, r.seq) for r in found]
    assert [canonical.to_bytes(r) for r in found] == [row.data for row in rows]
    return found


def held(outbox: Outbox, now_ms: int = 0) -> list[tuple[str, Any]]:
    return [(r.stream, r.payload["n"]) for r in records(outbox, now_ms)]


def ack(
    outbox: Outbox, stream: wire.StreamName, seq: int, *have: tuple[int, int], epoch: str | None = None
) -> int:
    """How many rows it removed."""
    known = {r.stream: r.epoch for r in records(outbox)}
    before = outbox.depth()
    outbox.acknowledged(wire.Ack(1, stream, epoch or known[stream], seq, have=list(have)))
    removed = outbox.flush(0)
    assert len(removed) == before - outbox.depth()
    return len(removed)


def gone(outbox: Outbox) -> set[tuple[str, int, int]]:
    return {(g.stream, g.first, g.last) for r in records(outbox) for g in r.gone}


def test_each_priority_in_order_of_arrival(opened: Open) -> None:
    outbox = opened()
    for i in range(3):
        put(outbox, "tel", i)
        put(outbox, "event", i)
    outbox.put("event", {"n": "alert"}, priority=ALERT, now_ms=0, life_s=1)
    assert held(outbox) == [
        ("event", "alert"),
        *(("event", i) for i in range(3)),
        *(("tel", i) for i in range(3)),
    ]
    rows = outbox.after(TELEMETRY, 0, outbox.newest_id, 2, 0)
    assert [r.seq for r in rows] == [1, 2]
    assert [r.seq for r in outbox.after(TELEMETRY, rows[-1].id, outbox.newest_id, 9, 0)] == [3]
    assert outbox.after(TELEMETRY, rows[-1].id, rows[-1].id, 9, 0) == []
    assert outbox.depth() == 7


def test_rows_carry_stream_epoch_and_a_number_without_gaps(opened: Open) -> None:
    outbox = opened()
    for i in range(3):
        put(outbox, "tel", i)
    put(outbox, "event", 0)
    found = records(outbox)
    assert [(r.stream, r.seq, r.lost) for r in found] == [
        ("event", 1, 0),
        ("tel", 1, 0),
        ("tel", 2, 0),
        ("tel", 3, 0),
    ]
    assert len({r.epoch for r in found}) == 1


def test_nothing_is_written_before_the_flush_and_all_of_it_with_one(opened: Open, tmp_path: Path) -> None:
    outbox = opened()
    statements: list[str] = []
    outbox._box._db.set_trace_callback(statements.append)
    for i in range(100):
        put(outbox, "tel", i)
    assert statements == []
    assert outbox.depth() == 100
    outbox.acknowledged(wire.Ack(1, "tel", outbox._box.epoch, 0))
    outbox.flush(0)
    assert [s for s in statements if s.startswith(("BEGIN", "COMMIT", "PRAGMA"))] == [
        "PRAGMA synchronous=NORMAL",
        "BEGIN IMMEDIATE",
        "COMMIT",
    ]
    statements.clear()
    put(outbox, "tel", 1)
    put(outbox, "event", 1)
    outbox.flush(0)
    assert "PRAGMA synchronous=FULL" in statements
    statements.clear()
    outbox.flush(0)
    assert statements == []


def test_a_storm_within_one_turn_is_flushed_in_between(opened: Open) -> None:
    outbox = opened(max_bytes=10 << 20)
    for _ in range(1000):
        put(outbox, "tel", "x" * 1000)
    assert outbox._put_bytes < 300_000
    assert outbox.depth() == 1000


def test_everything_is_there_after_a_restart_under_its_old_names(opened: Open) -> None:
    first = opened()
    put(first, "tel", 1)
    put(first, "event", 2)
    before = records(first)
    second = opened()
    assert second.take_news() == []
    assert records(second) == before
    put(second, "tel", 3)
    found = [r for r in records(second) if r.stream == "tel"]
    assert [(r.payload["n"], r.seq) for r in found] == [(1, 1), (3, 1)]
    assert found[0].epoch != found[1].epoch


def test_no_name_is_used_twice_even_when_the_database_is_an_older_one(opened: Open, tmp_path: Path) -> None:
    """A power cut takes the end of the log away; an image is restored; a card is copied for another box."""
    path = tmp_path / "outbox.db"
    opened()
    opened(tmp_path / "elsewhere.db")  # closes it in order
    image = path.read_bytes()
    names: set[tuple[str, str, int]] = set()
    for _ in range(3):
        path.write_bytes(image)
        outbox = opened(path)
        put(outbox, "tel", 1)
        new = {(r.stream, r.epoch, r.seq) for r in records(outbox)}
        assert not new & names
        names |= new
        opened(tmp_path / "elsewhere.db")
    assert len(names) == 3


def test_the_watermark_deletes_up_to_and_including_it(opened: Open) -> None:
    outbox = opened()
    for i in range(1, 6):
        put(outbox, "tel", i)
        put(outbox, "event", i)
    assert ack(outbox, "tel", 3) == 3
    assert held(outbox) == [*(("event", i) for i in range(1, 6)), ("tel", 4), ("tel", 5)]
    assert ack(outbox, "tel", 3) == 0
    assert ack(outbox, "event", 5) == 5
    assert ack(outbox, "tel", 100) == 2
    assert outbox.depth() == 0


def test_what_the_controller_has_beyond_a_gap_is_deleted_too(opened: Open) -> None:
    outbox = opened()
    for i in range(1, 11):
        put(outbox, "tel", i)
    assert ack(outbox, "tel", 2, (5, 6), (9, 9)) == 5
    assert [n for _, n in held(outbox)] == [3, 4, 7, 8, 10]
    assert gone(outbox) == set()


def test_the_watermark_of_another_epoch_deletes_nothing(opened: Open) -> None:
    outbox = opened()
    put(outbox, "tel", 1)
    assert ack(outbox, "tel", 1, epoch="another") == 0
    assert outbox.depth() == 1


def test_ids_are_never_used_twice_while_it_is_open(opened: Open) -> None:
    """Whoever sends remembers how far it got by them."""
    outbox = opened()
    seen: set[int] = set()
    for i in range(5):
        put(outbox, "tel", i)
        ids = {row.id for row in all_rows(outbox)}
        assert not ids & seen
        seen |= ids
        assert ack(outbox, "tel", i + 1) == 1


# bounds


def test_what_does_not_fit_is_evicted_oldest_telemetry_first_and_named(opened: Open) -> None:
    size = len(canonical.to_bytes({"n": "x" * 100}))
    outbox = opened(max_bytes=40 * size)
    for _ in range(10):
        put(outbox, "event", "x" * 100)
    for i in range(100):
        put(outbox, "tel", f"{i:03}" + "x" * 97)
        outbox.flush(0)
    found = records(outbox)
    events = [r for r in found if r.stream == "event"]
    telemetry = [r for r in found if r.stream == "tel"]
    assert len(events) == 10
    assert [r.lost for r in events] == [0] * 10
    seqs = [r.seq for r in telemetry]
    assert seqs == list(range(seqs[0], 101))  # the newest, without gaps
    assert 22 <= len(seqs) <= 30
    assert {r.lost for r in telemetry} == {seqs[0] - 1}
    assert gone(outbox) == {("tel", 1, seqs[0] - 1)}


def test_evicted_rows_are_named_until_the_controller_knows(opened: Open) -> None:
    outbox = opened(max_bytes=200)
    for i in range(40):
        put(outbox, "tel", i)
    put(outbox, "event", "last")
    ((_, _, last),) = gone(outbox)
    epoch = records(outbox)[0].epoch
    outbox = opened(max_bytes=200)
    assert gone(outbox) == {("tel", 1, last)}
    ack(outbox, "tel", last - 1, epoch=epoch)
    assert gone(outbox) == {("tel", 1, last)}
    ack(outbox, "tel", last, epoch=epoch)
    assert gone(outbox) == set()


def test_many_tombstones_are_named_in_turn_and_forgotten_one_by_one(opened: Open) -> None:
    outbox = opened(max_bytes=10**6)
    for i in range(100):
        outbox.put(
            "event", {"n": i}, priority=ALERT if i % 2 else EVENT, now_ms=0, life_s=1 if i % 2 else DAY_S
        )
    outbox.flush(0)
    epoch = outbox.epoch
    outbox.flush(70_000)  # every other row was not to wait so long
    told: list[set[tuple[str, int, int]]] = []
    for _ in range(5):
        (record, *_) = records(outbox, 70_000)
        assert len(record.gone) <= 16
        told.append({(g.stream, g.first, g.last) for g in record.gone})
    every = {("event", seq, seq) for seq in range(2, 101, 2)}
    assert set.union(*told[:4]) == every
    assert told[4] == told[0]
    outbox.acknowledged(wire.Ack(1, "event", epoch, 0, have=[(50, 50), (90, 97)]))
    outbox.flush(70_000)
    left = set.union(*({(g.stream, g.first, g.last) for g in records(outbox)[0].gone} for _ in range(4)))
    assert left == every - {("event", seq, seq) for seq in (50, 90, 92, 94, 96)}


def test_tombstones_that_touch_are_one(opened: Open) -> None:
    outbox = opened(max_bytes=10**6)
    for i in range(9):
        outbox.put("event", {"n": i}, priority=EVENT, now_ms=0, life_s=[1, 100, 1000][i % 3])
    outbox.flush(0)
    for at_ms, expected in ((70_000, {(1, 1), (4, 4), (7, 7)}), (140_000, {(1, 2), (4, 5), (7, 8)})):
        outbox.flush(at_ms)
        assert {(first, last) for _, first, last in gone(outbox)} == expected
    outbox.put("event", {"n": 10}, priority=EVENT, now_ms=140_000, life_s=DAY_S)
    outbox.flush(1_140_000)
    assert gone(outbox) == {("event", 1, 9)}


def test_rows_tell_how_many_before_them_were_acknowledged(opened: Open) -> None:
    """So that a controller which has lost its database does not wait for them."""
    outbox = opened()
    for i in range(9):
        put(outbox, "event", i)
    assert [r.acked for r in records(outbox)] == [0] * 9
    ack(outbox, "event", 2, (4, 5), (8, 8))
    assert [(r.seq, r.acked) for r in records(outbox)] == [(3, 2), (6, 2), (7, 0), (9, 1)]
    outbox._box._drop("seq = ?", (6,))
    found = records(outbox)
    assert [(r.seq, r.acked) for r in found] == [(3, 2), (7, 0), (9, 1)]
    assert found[0].gone == [wire.Gone("event", outbox.epoch, 6, 6, acked=2)]


def test_memory_says_nothing_of_rows_on_the_disk(opened: Open) -> None:
    """It goes on with the epoch, and does not see what lies on a disk that fails."""
    outbox = opened()
    for i in range(9):
        put(outbox, "event", i)
    outbox.flush(0)
    heir = Box(None, max_bytes=1000, heir_of=outbox._box)
    heir.apply([Put("event", EVENT, 1000, b"{}")], [], run_ms=0, durable=False)
    (row,) = heir.after(EVENT, 0, heir.newest_id, 9)
    heir.close()
    assert (row.epoch, row.seq) == (outbox.epoch, 10)
    assert wire.decode(row.data, wire.Record).acked == 0


def test_an_alert_outlives_the_events_around_it(opened: Open) -> None:
    size = len(canonical.to_bytes({"n": "x" * 100}))
    outbox = opened(max_bytes=20 * size)
    for _ in range(5):
        put(outbox, "event", "x" * 100)
    outbox.put("event", {"n": "alert"}, priority=ALERT, now_ms=0, life_s=DAY_S)
    for _ in range(100):
        put(outbox, "event", "x" * 100)
    assert ("event", "alert") in held(outbox)
    assert gone(outbox) >= {("event", 1, 5)}
    assert len(gone(outbox)) == 2


def test_events_are_evicted_only_when_there_is_no_telemetry_left(opened: Open) -> None:
    size = len(canonical.to_bytes({"n": "x" * 100}))
    outbox = opened(max_bytes=20 * size)
    for _ in range(10):
        put(outbox, "tel", "x" * 100)
    for _ in range(60):
        put(outbox, "event", "x" * 100)
    found = records(outbox)
    assert {r.stream for r in found} == {"event"}
    assert found[-1].seq == 60
    assert found[0].lost == found[0].seq - 1


def test_the_bound_holds_across_a_restart_and_after_acknowledgements(opened: Open) -> None:
    size = len(canonical.to_bytes({"n": "x" * 100}))
    for _ in range(3):
        outbox = opened(max_bytes=20 * size)
        for _ in range(30):
            put(outbox, "tel", "x" * 100)
        outbox.flush(0)
        assert 12 <= outbox.depth() <= 20
    newest = all_rows(outbox)[-1]
    depth = outbox.depth()
    removed = ack(outbox, "tel", newest.seq - 3, epoch=newest.epoch)
    assert removed > 0
    for _ in range(20 - depth + removed):
        put(outbox, "tel", "x" * 100)
    outbox.flush(0)
    assert outbox.depth() == 20  # the room that was acknowledged is used


def test_what_has_waited_too_long_is_dropped_and_named(opened: Open) -> None:
    outbox = opened()
    put(outbox, "tel", "short-lived", life_s=1.0)
    put(outbox, "tel", "long-lived", life_s=1000.0)
    assert len(held(outbox)) == 2
    assert held(outbox, 60_001) == [("tel", "long-lived")]
    assert gone(outbox) == {("tel", 1, 1)}
    assert {r.lost for r in records(outbox)} == {1}


def test_only_the_time_that_it_runs_counts(opened: Open) -> None:
    """Switched off for a year, or a monotonic clock that begins anew: neither makes a row older."""
    outbox = opened(now_ms=5 * DAY_MS)
    put(outbox, "tel", "of long ago", now_ms=5 * DAY_MS, life_s=7 * DAY_S)
    outbox.flush(5 * DAY_MS)
    outbox.flush(5 * DAY_MS + 3 * DAY_MS)
    outbox._box.apply([], [], run_ms=3 * DAY_MS, durable=False)
    for began_ms in (0, 400 * DAY_MS, 10):
        outbox = opened(now_ms=began_ms)
        outbox.flush(began_ms)
        assert outbox.depth() == 1
    outbox.flush(10 + 4 * DAY_MS + 1)
    assert outbox.depth() == 0  # 3 days then, 4 now


def test_a_payload_larger_than_the_box_is_lost_and_named(opened: Open) -> None:
    outbox = opened(max_bytes=100)
    put(outbox, "tel", "x" * 200)
    outbox.flush(0)
    assert outbox.depth() == 0
    put(outbox, "tel", "small")
    assert [(r.seq, r.lost) for r in records(outbox)] == [(2, 1)]
    assert gone(outbox) == {("tel", 1, 1)}


def test_a_random_life_keeps_its_promises(opened: Open) -> None:
    """Every row is acknowledged, waiting, or named as gone; the order within a stream holds."""
    rng = random.Random(7)
    outbox = opened(max_bytes=4000)
    appended: dict[tuple[str, str], int] = {}
    acknowledged: dict[tuple[str, str], set[int]] = {}
    for _ in range(1500):
        match rng.randrange(4):
            case 0 | 1:
                stream: wire.StreamName = rng.choice(["tel", "event"])
                put(outbox, stream, "x" * rng.randrange(100))
                key = (stream, outbox._box.epoch)
                appended[key] = appended.get(key, 0) + 1
            case 2:
                rows = all_rows(outbox)
                if rows and rng.random() < 0.3:
                    row = rng.choice(rows)
                    outbox.acknowledged(wire.Ack(1, row.stream, row.epoch, 0, have=[(row.seq, row.seq)]))
                    acknowledged.setdefault((row.stream, row.epoch), set()).add(row.seq)
            case 3:
                outbox.flush(0)
        if rng.random() < 0.01:
            outbox = opened(max_bytes=4000)
    outbox.flush(0)
    waiting: dict[tuple[str, str], list[int]] = {}
    for row in all_rows(outbox):
        waiting.setdefault((row.stream, row.epoch), []).append(row.seq)
    lost: dict[tuple[str, str], set[int]] = {}
    for stream_, epoch, first, last in outbox._box._db.execute(_GONE):
        lost.setdefault((stream_, epoch), set()).update(range(first, last + 1))
    for key, count in appended.items():
        assert waiting.get(key, []) == sorted(set(waiting.get(key, [])))
        told = acknowledged.get(key, set()) | lost.get(key, set())
        assert set(waiting.get(key, [])) | told == set(range(1, count + 1)), key
        assert not set(waiting.get(key, [])) & told


# faults


def damaged(path: Path, how: str) -> bytes:
    match how:
        case "not a database":
            data = b"this is not a database, but it is long enough to be taken for one" * 100
        case "empty pages":
            data = path.read_bytes()[:100] + b"\0" * (path.stat().st_size - 100)
        case "truncated":
            data = path.read_bytes()[: path.stat().st_size // 2 + 100]
        case "scrambled":
            data = bytearray(path.read_bytes())
            for i in range(4096, len(data)):
                data[i] ^= 0x5A
        case "of an older version":
            path.unlink()
            with sqlite3.connect(path) as db:
                db.execute("CREATE TABLE rows (stream TEXT)")
            db.close()
            data = path.read_bytes()
        case _:
            raise ValueError(how)
    path.write_bytes(data)
    return bytes(data)


@pytest.mark.parametrize(
    "how", ["not a database", "empty pages", "truncated", "scrambled", "of an older version"]
)
def test_a_damaged_database_is_set_aside_and_a_new_epoch_begins(
    opened: Open, tmp_path: Path, how: str
) -> None:
    path = tmp_path / "outbox.db"
    outbox = opened()
    for i in range(300):
        put(outbox, "tel", f"{i}" * 20)
    epoch = all_rows(outbox)[0].epoch
    outbox.close(0)
    data = damaged(path, how)
    outbox = opened()
    (news,) = outbox.take_news()
    assert "set aside as outbox.db.damaged-0; a new epoch begins" in news
    assert outbox.take_news() == []
    aside = (tmp_path / "outbox.db.damaged-0").read_bytes()
    assert aside[100:] == data[100:]  # asking SQLite for its log may have changed a flag in the header
    assert (outbox.depth(), outbox.on_disk) == (0, True)
    put(outbox, "tel", "first")
    found = records(outbox)
    assert [(r.seq, r.lost) for r in found] == [(1, 0)]
    assert found[0].epoch != epoch
    assert opened().take_news() == []


@pytest.mark.parametrize("how", ["flipped", "truncated", "garbage"])
def test_a_damaged_log_costs_its_end_and_no_more(opened: Open, tmp_path: Path, how: str) -> None:
    """SQLite's frames have checksums: what is behind the first bad one never was."""
    path, log = tmp_path / "outbox.db", tmp_path / "outbox.db-wal"
    outbox = opened()
    for i in range(50):
        put(outbox, "event", i)
        outbox.flush(0)
    image, frames = path.read_bytes(), log.read_bytes()
    assert len(frames) > 4096
    opened(tmp_path / "elsewhere.db")
    path.write_bytes(image)
    bad = bytearray(frames)
    match how:
        case "flipped":
            bad[len(bad) // 2] ^= 1
        case "truncated":
            del bad[len(bad) // 2 :]
        case "garbage":
            bad[:] = b"\x5a" * len(bad)
    log.write_bytes(bad)
    (tmp_path / "outbox.db-shm").unlink(missing_ok=True)
    outbox = opened(path)
    found = [n for _, n in held(outbox)]
    assert found == list(range(len(found)))
    assert len(found) < 50
    put(outbox, "event", "new")
    assert [r.seq for r in records(outbox)][-1] == 1  # in an epoch of its own: no number comes twice


def test_a_row_with_a_flipped_bit_is_counted_as_lost(opened: Open, tmp_path: Path) -> None:
    outbox = opened()
    for n in range(3):
        put(outbox, "tel", n)
    outbox.flush(0)
    opened(tmp_path / "elsewhere.db")
    with sqlite3.connect(tmp_path / "outbox.db") as db:
        db.execute("UPDATE rows SET payload = ? WHERE seq = 2", (b'{"n":9}',))
    db.close()
    outbox = opened()
    assert [r.seq for r in records(outbox)] == [1, 3]
    assert {r.lost for r in records(outbox)} == {1}
    assert gone(outbox) == {("tel", 2, 2)}


def test_a_full_disk_keeps_what_is_there_and_memory_takes_over(opened: Open, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        path = disk.folder / "outbox.db"
        outbox = opened(path, max_bytes=10 << 20)
        put(outbox, "event", "kept")
        outbox.flush(0)
        filler = fill(disk.folder)
        for i in range(200):
            put(outbox, "tel", f"{i}" * 500)
            outbox.flush(0)
        (news,) = outbox.take_news()
        assert "until the disk recovers" in news
        assert not outbox.on_disk
        put(outbox, "event", "in memory")
        rows = records(outbox)
        assert rows[0].payload == {"n": "in memory"}
        assert outbox.depth() > 100
        outbox.flush(5_000)
        assert outbox.on_disk is False  # still full
        filler.unlink()
        moved = outbox.depth()
        outbox.flush(100_000)
        assert outbox.on_disk
        (news,) = outbox.take_news()
        assert f"on the disk again; {moved} rows" in news
        found = records(outbox)
        assert {"kept", "in memory"} <= {r.payload["n"] for r in found}
        assert [r for r in found if r.epoch == rows[0].epoch and r.seq == rows[0].seq]
        outbox = opened(path, max_bytes=10 << 20)
        assert outbox.take_news() == []
        assert {r.payload["n"] for r in records(outbox)} == {r.payload["n"] for r in found}
        assert list(disk.folder.glob("*damaged*")) == []  # full is not damaged
        opened(tmp_path / "elsewhere.db")  # lets go of the disk


def test_a_disk_that_is_full_at_the_start(opened: Open, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 512 << 10) as disk:
        filler = fill(disk.folder)
        outbox = opened(disk.folder / "outbox.db")
        assert "until the disk recovers" in outbox.take_news()[0]
        put(outbox, "event", 1)
        assert held(outbox) == [("event", 1)]
        filler.unlink()
        outbox.flush(2_000)
        assert "on the disk again; 1 rows" in outbox.take_news()[0]
        assert held(outbox) == [("event", 1)]
        opened(tmp_path / "elsewhere.db")


def test_what_cannot_be_opened_is_a_fault_and_not_damage(opened: Open, tmp_path: Path) -> None:
    (tmp_path / "folder.db").mkdir()
    outbox = opened(tmp_path / "folder.db")
    assert not outbox.on_disk
    assert [p.name for p in tmp_path.iterdir()] == ["folder.db"]


def test_memory_is_bounded_too(opened: Open, tmp_path: Path) -> None:
    (tmp_path / "folder.db").mkdir()
    outbox = opened(tmp_path / "folder.db", max_bytes=100 << 20)
    for _ in range(300):
        put(outbox, "tel", "x" * 10_000)
    outbox.flush(0)
    assert 90 <= outbox.depth() <= 105
    assert len(gone(outbox)) == 1


def test_a_database_that_breaks_while_it_is_used_is_left_for_memory(opened: Open, tmp_path: Path) -> None:
    """Never an exception of sqlite's: the control loop goes on."""
    outbox = opened()
    put(outbox, "tel", 1)
    outbox.flush(0)
    with sqlite3.connect(tmp_path / "outbox.db") as other:
        other.execute("DROP TABLE rows")
    other.close()
    swaps = outbox.swaps
    put(outbox, "tel", 2)
    assert held(outbox) == [("tel", 2)]
    assert outbox.swaps == swaps + 1
    assert "no such table" in outbox.take_news()[0]
    outbox.flush(2_000)  # the broken file is set aside, and the rows go to a new one
    assert outbox.on_disk
    assert "set aside" in "".join(outbox.take_news())
    assert held(outbox) == [("tel", 2)]


_WRITER = """
import sys
from pathlib import Path
from edge_agent.messaging.outbox import Outbox
outbox = Outbox(Path(sys.argv[1]), max_bytes=1 << 24, now_ms=0, stamp_ms=0)
i = 0
while True:
    for _ in range(5):
        i += 1
        outbox.put(sys.argv[2], {"n": i, "pad": "x" * 200}, priority=1, now_ms=0, life_s=1e6)
    outbox.flush(0)
    sys.stdout.write(f"{i}\\n")
    sys.stdout.flush()
"""


@pytest.mark.parametrize("stream", ["event", "tel"])
def test_no_committed_row_is_lost_when_the_writer_is_killed(
    opened: Open, tmp_path: Path, stream: wire.StreamName
) -> None:
    path = tmp_path / "outbox.db"
    committed = 0
    for kill_after in (1, 40, 111):
        command = [sys.executable, "-c", _WRITER, str(path), stream]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(kill_after):
                last = int(writer.stdout.readline())
            os.kill(writer.pid, signal.SIGKILL)
            last = max([last, *(int(line) for line in writer.stdout.read().split())])
            writer.wait()
        outbox = opened(path, max_bytes=1 << 24)
        assert outbox.take_news() == []
        found = len(records(outbox))
        # One group more than was told may be there: committed, and killed before it could say so.
        assert found - committed - last in (0, 5)
        committed = found
        opened(tmp_path / "elsewhere.db")


# a disk that answers with a fault what it has done all the same


class LyingDisk:
    """COMMIT and then a fault, as an fsync with EIO behind a written log looks like."""

    def __init__(self, db: Any, times: int) -> None:
        self._db = db
        self._times = times

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)

    def execute(self, query: str, *values: Any) -> Any:
        result = self._db.execute(query, *values)
        if query == "COMMIT" and self._times:
            self._times -= 1
            raise sqlite3.OperationalError("disk I/O error")
        return result


def break_once(outbox: Outbox) -> None:
    outbox._box._db = LyingDisk(outbox._box._db, 1)  # type: ignore[assignment]


def test_a_row_that_was_stored_in_spite_of_a_fault_keeps_its_name(opened: Open) -> None:
    outbox = opened()
    put(outbox, "event", 0)
    outbox.flush(0)
    break_once(outbox)
    put(outbox, "event", 1)
    put(outbox, "tel", 1)
    outbox.flush(1)
    assert not outbox.on_disk
    put(outbox, "event", 2)
    found = records(outbox, 2)
    assert [(r.stream, r.seq, r.payload["n"]) for r in found] == [
        ("event", 2, 1),
        ("event", 3, 2),
        ("tel", 1, 1),
    ]
    outbox.flush(100_000)
    assert outbox.on_disk
    found = records(outbox, 100_000)
    assert [(r.stream, r.seq, r.payload["n"]) for r in found] == [
        ("event", 1, 0),
        ("event", 2, 1),
        ("event", 3, 2),
        ("tel", 1, 1),
    ]
    assert len({r.epoch for r in found}) == 1
    put(outbox, "event", 3)
    assert records(outbox, 100_001)[-2].seq == 1  # in a new epoch


def test_the_way_back_to_the_disk_is_tried_again_when_it_was_gone_unseen(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = opened(max_bytes=400)
    break_once(outbox)
    for n in range(80):
        put(outbox, "tel", n)
    outbox.flush(1)
    put(outbox, "event", 1)
    before = records(outbox, 2)
    real, attempts = Box.adopt, []

    def adopt(self: Box, *arguments: Any) -> int:
        moved = real(self, *arguments)
        attempts.append(moved)
        if len(attempts) < 4:
            raise StorageFault(Reason.STORAGE_FAULT, "disk I/O error", "check the disk")
        return moved

    monkeypatch.setattr(Box, "adopt", adopt)
    for now_ms in range(5_000, 2_000_000, 50_000):
        outbox.flush(now_ms)
        if outbox.on_disk:
            break
    assert len(attempts) == 4
    after = records(outbox, now_ms)
    assert [(r.stream, r.epoch, r.seq, r.lost) for r in after] == [
        (r.stream, r.epoch, r.seq, r.lost) for r in before
    ]
    assert gone(outbox) == {("tel", g.first, g.last) for g in before[0].gone}


# results of commands


def test_results_are_kept_across_a_restart(opened: Open) -> None:
    outbox = opened()
    assert outbox.result("a") is None
    outbox.keep_result("a", 1, b"answer")
    assert outbox.result("a") == b"answer"
    assert opened().result("a") == b"answer"


def test_a_result_is_on_the_disk_before_its_answer_can_be_sent(opened: Open, tmp_path: Path) -> None:
    outbox = opened()
    statements: list[str] = []
    outbox._box._db.set_trace_callback(statements.append)
    outbox.keep_result("a", 1, b"answer")
    outbox.flush(0)
    assert "PRAGMA synchronous=FULL" in statements


def test_results_are_kept_until_their_commands_expire(opened: Open) -> None:
    """Those of many commands after it forget none that could come again."""
    outbox = opened()
    outbox.keep_result("lives long", 10**6, b"x")
    for i in range(1500):
        outbox.keep_result(f"id-{i}", i, b"x")
    outbox.flush(0)
    for again in (outbox, opened()):
        kept = [i for i in range(1500) if again.result(f"id-{i}") is not None]
        assert kept == list(range(501, 1500))
        assert again.result("lives long") == b"x"
    for i in range(40):
        again.keep_result(f"large-{i}", 2000 + i, b"x" * 100_000)
    again.flush(0)
    again = opened()
    assert [i for i in range(40) if again.result(f"large-{i}") is not None] == list(range(20, 40))
    assert again.result("lives long") == b"x"


def test_results_survive_swaps_of_the_disk_and_memory(opened: Open, tmp_path: Path) -> None:
    outbox = opened()
    outbox.keep_result("on disk", 1, b"1")
    outbox.flush(0)
    break_once(outbox)
    put(outbox, "tel", 1)
    outbox.flush(1)
    assert not outbox.on_disk
    outbox.keep_result("in memory", 1, b"2")
    outbox.flush(2)
    assert (outbox.result("on disk"), outbox.result("in memory")) == (b"1", b"2")
    outbox.flush(100_000)
    assert outbox.on_disk
    outbox.keep_result("later", 1, b"3")
    again = opened()
    assert [again.result(name) for name in ("on disk", "in memory", "later")] == [b"1", b"2", b"3"]


def test_payloads_come_out_as_they_went_in(opened: Open) -> None:
    outbox = opened()
    event = wire.Event(5, "update", "tiny", "2.0.0", Reason.OUTPUT_DRIFT, "naïve – „quoted“ \u2028")
    outbox.put("event", event, priority=EVENT, now_ms=0, life_s=1.0)
    (record,) = records(outbox)
    assert wire.decode(json.dumps(record.payload).encode(), wire.Event) == event
