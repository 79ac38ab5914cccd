"""The outbox: order, bounds, acknowledgement, resending, damage, kills."""

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

from edge_agent.messaging.outbox import Outbox, Row, Stream
from edge_contract import canonical, wire
from edge_contract.errors import Reason, StorageFault
from tests.support.small_disk import fill, small_disk

DAY_S = 86400.0
Open = Callable[..., Outbox]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Open the outbox, after closing the one before."""
    current: list[Outbox] = []

    def open_(
        path: Path = tmp_path / "outbox.db", max_bytes: int = 1 << 20, resend_s: float = 30.0
    ) -> Outbox:
        close()
        current.append(Outbox(path, max_bytes=max_bytes, resend_s=resend_s, now_ms=0))
        return current[-1]

    def close() -> None:
        while current:
            current.pop().close()

    yield open_
    close()


def put(outbox: Outbox, stream: Stream, value: Any, *, now_ms: int = 0, ttl_s: float = DAY_S) -> None:
    priority = 10 if stream == "event" else 1
    outbox.put(stream, {"n": value}, priority=priority, now_ms=now_ms, ttl_s=ttl_s)


def records(rows: list[Row]) -> list[wire.Record]:
    found = [wire.decode(row.data, wire.Record) for row in rows]
    assert [(r.stream, r.epoch, r.seq) for r in rows] == [(r.stream, r.epoch, r.seq) for r in found]
    return found


def due(outbox: Outbox, now_ms: int = 0, limit: int = 1000) -> list[tuple[str, Any]]:
    return [(r.stream, r.payload["n"]) for r in records(outbox.due(limit, now_ms))]


def ack(outbox: Outbox, stream: Stream, seq: int, epoch: str | None = None) -> int:
    known = {r.stream: r.epoch for r in outbox.due(1000, 1 << 60)}
    return outbox.acknowledged(wire.Ack(1, stream, epoch or known[stream], seq))


def test_events_go_first_and_each_stream_in_order(opened: Open) -> None:
    outbox = opened()
    for i in range(3):
        put(outbox, "tel", i)
        put(outbox, "event", i)
    assert due(outbox) == [*(("event", i) for i in range(3)), *(("tel", i) for i in range(3))]
    assert due(outbox, limit=4) == [("event", 0), ("event", 1), ("event", 2), ("tel", 0)]
    assert outbox.depth() == 6


def test_rows_carry_stream_epoch_and_a_number_without_gaps(opened: Open) -> None:
    outbox = opened()
    for i in range(3):
        put(outbox, "tel", i)
    put(outbox, "event", 0)
    found = records(outbox.due(10, 0))
    assert [(r.stream, r.seq, r.lost) for r in found] == [
        ("event", 1, 0),
        ("tel", 1, 0),
        ("tel", 2, 0),
        ("tel", 3, 0),
    ]
    assert len({r.epoch for r in found if r.stream == "tel"}) == 1


def test_everything_is_there_after_a_restart(opened: Open) -> None:
    first = opened()
    put(first, "tel", 1)
    put(first, "event", 2)
    before = records(first.due(10, 0))
    second = opened()
    assert second.problem == ""
    assert records(second.due(10, 0)) == before
    put(second, "tel", 3)
    assert [r.seq for r in records(second.due(10, 0)) if r.stream == "tel"] == [1, 2]


def test_numbers_are_never_used_twice_even_when_the_box_was_empty(opened: Open) -> None:
    put(opened(), "tel", 1)
    outbox = opened()
    assert ack(outbox, "tel", 1) == 1
    outbox = opened()
    put(outbox, "tel", 2)
    assert [r.seq for r in records(outbox.due(10, 0))] == [2]


def test_the_watermark_deletes_up_to_and_including_it(opened: Open) -> None:
    outbox = opened()
    for i in range(1, 6):
        put(outbox, "tel", i)
        put(outbox, "event", i)
    assert ack(outbox, "tel", 3) == 3
    assert due(outbox) == [*(("event", i) for i in range(1, 6)), ("tel", 4), ("tel", 5)]
    assert ack(outbox, "tel", 3) == 0
    assert ack(outbox, "event", 5) == 5
    assert ack(outbox, "tel", 100) == 2
    assert outbox.depth() == 0


def test_the_watermark_of_another_epoch_deletes_nothing(opened: Open) -> None:
    outbox = opened()
    put(outbox, "tel", 1)
    assert ack(outbox, "tel", 1, epoch="another") == 0
    assert outbox.depth() == 1


def test_a_controller_that_lost_rows_gets_them_at_once(opened: Open) -> None:
    outbox = opened(resend_s=1000.0)
    for i in range(1, 4):
        put(outbox, "tel", i)
        put(outbox, "event", i)
    rows = outbox.due(10, 0)
    for row in rows:
        outbox.sent(row, 0)
    assert outbox.due(10, 0) == []
    epoch = next(row.epoch for row in rows if row.stream == "tel")
    assert outbox.acknowledged(wire.Ack(1, "tel", epoch, 1, resend=True)) == 1
    assert due(outbox) == [("tel", 2), ("tel", 3)]


def test_what_was_sent_waits_longer_each_time_and_comes_again(opened: Open) -> None:
    outbox = opened(resend_s=10.0)
    put(outbox, "tel", 1)
    now_ms, pauses = 0, []
    for _ in range(9):
        row = outbox.due(1, now_ms)[0]
        outbox.sent(row, now_ms)
        later = next(p for p in range(1000, 10**7, 1000) if outbox.due(1, now_ms + p))
        assert outbox.due(1, now_ms + later - 1) == []
        pauses.append(later // 1000)
        now_ms += later
    assert pauses == [10, 20, 40, 80, 160, 320, 640, 640, 640]


def test_sending_one_row_does_not_hold_up_the_others(opened: Open) -> None:
    outbox = opened()
    for i in range(3):
        put(outbox, "tel", i)
    outbox.sent(outbox.due(1, 0)[0], 0)
    assert due(outbox) == [("tel", 1), ("tel", 2)]


def test_a_row_that_was_acknowledged_meanwhile_can_be_sent_without_harm(opened: Open) -> None:
    outbox = opened()
    put(outbox, "tel", 1)
    row = outbox.due(1, 0)[0]
    ack(outbox, "tel", 1)
    outbox.sent(row, 0)
    assert outbox.depth() == 0


# bounds


def test_what_does_not_fit_is_evicted_oldest_telemetry_first_and_counted(opened: Open) -> None:
    size = len(canonical.to_bytes({"n": "x" * 100}))
    outbox = opened(max_bytes=40 * size)
    for _ in range(10):
        put(outbox, "event", "x" * 100)
    for i in range(100):
        put(outbox, "tel", f"{i:03}" + "x" * 97)
    found = records(outbox.due(1000, 0))
    events = [r for r in found if r.stream == "event"]
    telemetry = [r for r in found if r.stream == "tel"]
    assert len(events) == 10
    assert [r.lost for r in events] == [0] * 10
    seqs = [r.seq for r in telemetry]
    assert seqs == list(range(seqs[0], 101))  # the newest, without gaps
    assert 22 <= len(seqs) <= 30
    assert {r.lost for r in telemetry} == {seqs[0] - 1}


def test_events_are_evicted_only_when_there_is_no_telemetry_left(opened: Open) -> None:
    size = len(canonical.to_bytes({"n": "x" * 100}))
    outbox = opened(max_bytes=20 * size)
    for _ in range(10):
        put(outbox, "tel", "x" * 100)
    for _ in range(60):
        put(outbox, "event", "x" * 100)
    found = records(outbox.due(1000, 0))
    assert {r.stream for r in found} == {"event"}
    assert found[-1].seq == 60
    assert found[0].lost == found[0].seq - 1


def test_the_bound_holds_across_a_restart_and_after_acknowledgements(opened: Open) -> None:
    size = len(canonical.to_bytes({"n": "x" * 100}))
    for _ in range(3):
        outbox = opened(max_bytes=20 * size)
        for _ in range(30):
            put(outbox, "tel", "x" * 100)
        assert 12 <= outbox.depth() <= 20
    oldest = outbox.due(1, 0)[0].seq
    assert ack(outbox, "tel", oldest + 5) == 6
    depth = outbox.depth()
    for _ in range(20 - depth):
        put(outbox, "tel", "x" * 100)
    assert outbox.depth() == 20  # the room that was acknowledged is used


def test_what_is_too_old_is_dropped_and_counted(opened: Open) -> None:
    outbox = opened()
    put(outbox, "tel", "short-lived", ttl_s=1.0)
    put(outbox, "tel", "long-lived", ttl_s=100.0)
    put(outbox, "tel", "new", now_ms=2000)
    assert due(outbox, 2000) == [("tel", "long-lived"), ("tel", "new")]
    assert {r.lost for r in records(outbox.due(10, 2000))} == {1}


def test_a_payload_larger_than_the_box_is_lost_and_counted(opened: Open) -> None:
    outbox = opened(max_bytes=100)
    put(outbox, "tel", "x" * 200)
    assert outbox.depth() == 0
    put(outbox, "tel", "small")
    assert [(r.seq, r.lost) for r in records(outbox.due(10, 0))] == [(2, 1)]


def test_a_random_life_keeps_its_promises(opened: Open) -> None:
    """Every row is sent, acknowledged, waiting or counted as lost; the order within a stream holds."""
    rng = random.Random(7)
    outbox = opened(max_bytes=4000)
    appended, acknowledged = {"tel": 0, "event": 0}, {"tel": 0, "event": 0}
    for step in range(600):
        match rng.randrange(5):
            case 0 | 1 | 2:
                stream: Stream = rng.choice(["tel", "event"])
                put(outbox, stream, "x" * rng.randrange(100), now_ms=step)
                appended[stream] += 1
            case 3:
                for row in outbox.due(rng.randrange(1, 20), step):
                    outbox.sent(row, step)
            case 4:
                waiting = outbox.due(1000, 1 << 60)
                if waiting and rng.random() < 0.2:
                    row = rng.choice(waiting)
                    acknowledged[row.stream] += outbox.acknowledged(
                        wire.Ack(1, row.stream, row.epoch, row.seq)
                    )
        if rng.random() < 0.02:
            outbox = opened(max_bytes=4000)
    found = records(outbox.due(1000, 1 << 60))
    for stream in ("tel", "event"):
        mine = [r for r in found if r.stream == stream]
        assert [r.seq for r in mine] == sorted({r.seq for r in mine})
        lost = mine[0].lost
        assert appended[stream] == acknowledged[stream] + lost + len(mine), stream


# faults


def damaged(path: Path, how: str) -> bytes:
    match how:
        case "not a database":
            data = b"this is not a database, but it is long enough to be taken for one" * 100
        case "empty pages":
            data = path.read_bytes()[:100] + b"\0" * (path.stat().st_size - 100)
        case "scrambled":
            data = bytearray(path.read_bytes())
            for i in range(4096, len(data)):
                data[i] ^= 0x5A
        case _:
            raise ValueError(how)
    path.write_bytes(data)
    return bytes(data)


@pytest.mark.parametrize("how", ["not a database", "empty pages", "scrambled"])
def test_a_damaged_database_is_set_aside_and_a_new_epoch_begins(
    opened: Open, tmp_path: Path, how: str
) -> None:
    path = tmp_path / "outbox.db"
    outbox = opened()
    for i in range(300):
        put(outbox, "tel", f"{i}" * 20)
    epoch = outbox.due(1, 0)[0].epoch
    outbox.close()
    data = damaged(path, how)
    outbox = opened()
    assert "set aside; a new epoch begins" in outbox.problem
    assert (tmp_path / "outbox.db.damaged-0").read_bytes() == data
    assert outbox.depth() == 0
    put(outbox, "tel", "first")
    found = records(outbox.due(10, 0))
    assert [(r.seq, r.lost) for r in found] == [(1, 0)]
    assert found[0].epoch != epoch
    assert opened().problem == ""


def test_a_file_that_cannot_be_opened_is_a_fault_and_not_damage(opened: Open, tmp_path: Path) -> None:
    (tmp_path / "folder.db").mkdir()
    with pytest.raises(StorageFault, match="outbox") as fault:
        opened(tmp_path / "folder.db")
    assert fault.value.reason is Reason.STORAGE_FAULT
    assert [p.name for p in tmp_path.iterdir()] == ["folder.db"]


def test_a_full_disk_keeps_what_is_there(opened: Open, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 256 << 10) as disk:
        path = disk.folder / "outbox.db"
        outbox = opened(path, max_bytes=10 << 20)
        put(outbox, "event", "kept")
        filler = fill(disk.folder)
        with pytest.raises(StorageFault, match="outbox") as fault:
            for i in range(2000):
                put(outbox, "tel", f"{i}" * 500)
        assert fault.value.reason in (Reason.DISK_FULL, disk.reason)
        depth = outbox.depth()
        assert due(outbox)[0] == ("event", "kept")
        try:
            outbox = opened(path, max_bytes=10 << 20)
        except StorageFault as e:
            assert e.reason in (Reason.DISK_FULL, disk.reason)
        assert list(disk.folder.glob("*damaged*")) == []  # full is not damaged
        filler.unlink()
        outbox = opened(path, max_bytes=10 << 20)
        assert (outbox.problem, outbox.depth()) == ("", depth)
        put(outbox, "event", "fits again")
        assert due(outbox)[:2] == [("event", "kept"), ("event", "fits again")]
        opened(tmp_path / "elsewhere.db")  # lets go of the disk


def test_faults_of_a_broken_database_are_storage_faults(opened: Open, tmp_path: Path) -> None:
    """Never an exception of sqlite's: the control loop survives those that it knows."""
    outbox = opened()
    put(outbox, "tel", 1)
    row = outbox.due(1, 0)[0]
    with sqlite3.connect(tmp_path / "outbox.db") as other:
        other.execute("DROP TABLE rows")
        other.execute("DROP TABLE results")
    other.close()
    for use in (
        lambda: put(outbox, "tel", 2),
        lambda: outbox.due(1, 0),
        lambda: outbox.sent(row, 0),
        lambda: outbox.acknowledged(wire.Ack(1, "tel", row.epoch, 1)),
        lambda: outbox.depth(),
        lambda: outbox.result("id"),
        lambda: outbox.keep_result("id", b"", 0),
    ):
        with pytest.raises(StorageFault, match="outbox: no such table"):
            use()


_WRITER = """
import sys
from pathlib import Path
from edge_agent.messaging.outbox import Outbox
outbox = Outbox(Path(sys.argv[1]), max_bytes=1 << 24, resend_s=1.0, now_ms=0)
i = 0
while True:
    i += 1
    outbox.put(sys.argv[2], {"n": i, "pad": "x" * 200}, priority=1, now_ms=0, ttl_s=1e6)
    sys.stdout.write(f"{i}\\n")
    sys.stdout.flush()
"""


@pytest.mark.parametrize("stream", ["event", "tel"])
def test_no_committed_row_is_lost_when_the_writer_is_killed(
    opened: Open, tmp_path: Path, stream: Stream
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
        outbox = opened(path)
        assert outbox.problem == ""
        found = records(outbox.due(10_000, 0))
        assert [r.seq for r in found] == list(range(1, len(found) + 1))
        # One more than was told may be there: committed, and killed before it could say so.
        assert committed + last <= len(found) <= committed + last + 1
        committed = len(found)
        outbox.close()


# results of commands


def test_results_are_kept_across_a_restart(opened: Open) -> None:
    outbox = opened()
    assert outbox.result("a") is None
    outbox.keep_result("a", b"answer", 1)
    assert opened().result("a") == b"answer"


def test_only_the_newest_results_are_kept(opened: Open) -> None:
    outbox = opened()
    for i in range(230):
        outbox.keep_result(f"id-{i}", str(i).encode(), i)
    assert [i for i in range(230) if outbox.result(f"id-{i}") is not None] == list(range(30, 230))


def test_payloads_come_out_as_they_went_in(opened: Open) -> None:
    outbox = opened()
    event = wire.Event(5, "update", "tiny", "2.0.0", Reason.OUTPUT_DRIFT, "naïve – „quoted“ \u2028")
    outbox.put("event", event, priority=1, now_ms=0, ttl_s=1.0)
    record = wire.decode(outbox.due(1, 0)[0].data, wire.Record)
    assert wire.decode(json.dumps(record.payload).encode(), wire.Event) == event


def test_rows_that_the_controller_misses_are_due_at_once(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.db", max_bytes=1 << 20, resend_s=60, now_ms=0)
    for n in range(3):
        outbox.put("tel", {"n": n}, priority=1, now_ms=0, ttl_s=3600)
    rows = outbox.due(10, 0)
    for row in rows:
        outbox.sent(row, 0)
    assert outbox.due(10, 1000) == []
    outbox.acknowledged(wire.Ack(1, "tel", rows[0].epoch, 1, resend=True))
    assert [row.seq for row in outbox.due(10, 1000)] == [2, 3]
    outbox.close()


def test_a_row_with_a_flipped_bit_is_counted_as_lost(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    outbox = Outbox(path, max_bytes=1 << 20, resend_s=60, now_ms=0)
    for n in range(3):
        outbox.put("tel", {"n": n}, priority=1, now_ms=0, ttl_s=3600)
    outbox.close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE rows SET payload = ? WHERE seq = 2", (b'{"n"\xba1}',))
    db.close()
    outbox = Outbox(path, max_bytes=1 << 20, resend_s=60, now_ms=0)
    assert [row.seq for row in outbox.due(10, 0)] == [1, 3]
    assert {json.loads(row.data)["lost"] for row in outbox.due(10, 0)} == {1}
    outbox.close()
