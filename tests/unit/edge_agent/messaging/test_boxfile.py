"""One bit of the outbox's file flips, anywhere: the agent goes on, sends nothing false, and counts.

Every flip is made in a copy of one real database, which is then opened and emptied as the link does it.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from edge_agent.messaging.outbox import Outbox
from edge_agent.messaging.pace import EVENT, TELEMETRY, Pace
from edge_contract import wire

ROWS = 24
MARK = "known-by-this"
Key = tuple[str, str, int]


class Original(NamedTuple):
    data: bytes
    payloads: dict[Key, dict[str, object]]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    """Rows of two streams and two epochs, tombstones, results of commands; closed in order."""
    path = tmp_path_factory.mktemp("outbox") / "outbox.db"
    payloads: dict[Key, dict[str, object]] = {}
    for start in range(2):
        outbox = Outbox(path, max_bytes=1 << 20, now_ms=0, stamp_ms=0)
        for n in range(ROWS // 2):
            stream: wire.StreamName = "event" if n % 3 == 0 else "tel"
            priority = EVENT if stream == "event" else TELEMETRY
            payload = {"n": n + 100 * start, "text": f"{MARK}-{n}" * (1 + n % 3)}
            outbox.put(stream, payload, priority=priority, now_ms=0, life_s=0.5 if n == 1 else 1e6)
        outbox.keep_result(f"command-{start}", 10**12, b"answer" * 20)
        outbox.flush(0)
        outbox.flush(60_001)  # one row is too old by now
        for each in (EVENT, TELEMETRY):
            for row in outbox.after(each, 0, outbox.newest_id, 100, 0):
                record = wire.decode(row.data, wire.Record)
                payloads[row.stream, row.epoch, row.seq] = record.payload
        outbox.close(0)
    assert len(payloads) == ROWS - 2
    return Original(path.read_bytes(), payloads)


class Run(NamedTuple):
    """What came of a file."""

    sent: dict[Key, dict[str, object]]
    gone: set[Key]
    news: str
    outbox: Outbox


def run(path: Path, data: bytes) -> Run:
    """Open it, put a row, and send everything, as the control process does it."""
    for each in path.parent.iterdir():
        each.unlink()
    path.write_bytes(data)
    outbox = Outbox(path, max_bytes=1 << 20, now_ms=0, stamp_ms=0)
    pace = Pace(resend_ms=30_000, rows_per_s=1e6, jitter=lambda: 0.5)
    pace.begin(outbox.newest_id, 0)
    swaps, sent, gone = outbox.swaps, {}, set()
    outbox.put("event", {"n": "after"}, priority=EVENT, now_ms=0, life_s=1e6)
    for now_ms in range(0, 6_000, 200):
        pace.gone(outbox.flush(now_ms))
        if outbox.swaps != swaps:
            swaps = outbox.swaps
            pace.begin(outbox.newest_id, now_ms, new_box=True)
        for ask in pace.asks(outbox.newest_id, now_ms):
            rows = outbox.after(ask.priority, ask.after_id, ask.until_id, ask.limit, now_ms)
            for row in rows:
                if pace.take(ask, row.id, row.stream, now_ms):
                    record = wire.decode(row.data, wire.Record)
                    sent[record.stream, record.epoch, record.seq] = record.payload
                    gone |= {(g.stream, g.epoch, n) for g in record.gone for n in range(g.first, g.last + 1)}
                    pace.answered(row.id, 0, now_ms)
            pace.looked(ask, len(rows))
    return Run(sent, gone, " ".join(outbox.take_news()), outbox)


def check(original: Original, found: Run, flip: str) -> None:
    known = {key: found.sent[key] for key in found.sent.keys() & original.payloads.keys()}
    assert known == {key: original.payloads[key] for key in known}, flip  # nothing false
    new = [payload for key, payload in found.sent.items() if key not in original.payloads]
    assert new == [{"n": "after"}], flip  # and it goes on
    assert found.outbox.on_disk, flip
    missing = original.payloads.keys() - found.sent.keys()
    if "set aside" not in found.news:
        assert missing <= found.gone, flip
        assert len(missing) <= 1, flip
        assert bool(missing) == ("were damaged" in found.news), flip
    assert not found.gone & found.sent.keys(), flip
    found.outbox.close(6_000)


def flips(data: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    rng = random.Random(seed)
    used = [at for at in range(len(data)) if data[at] or rng.random() < 0.01]
    for at in rng.sample(used, min(count, len(used))):
        flipped = bytearray(data)
        bit = rng.randrange(8)
        flipped[at] ^= 1 << bit
        yield f"byte {at} bit {bit}", bytes(flipped)


def test_without_a_flip_everything_is_there(original: Original, tmp_path: Path) -> None:
    found = run(tmp_path / "outbox.db", original.data)
    assert found.news == ""
    assert found.sent.keys() > original.payloads.keys()
    assert found.outbox.result("command-1") == b"answer" * 20
    check(original, found, "none")


@pytest.mark.parametrize(
    ("count", "seed"), [(250, 1), *(pytest.param(800, n, marks=pytest.mark.thorough) for n in (2, 3, 4, 5))]
)
def test_a_bit_that_flips_anywhere(original: Original, tmp_path: Path, count: int, seed: int) -> None:
    outcomes = set()
    for flip, data in flips(original.data, count, seed):
        found = run(tmp_path / "outbox.db", data)
        check(original, found, flip)
        outcomes.add("aside" if "set aside" in found.news else "dropped" if found.news else "sound")
    assert outcomes == {"aside", "dropped", "sound"}


COLUMNS = ["stream", "epoch", "seq", "priority", "expires_ms", "payload", "crc"]


@pytest.mark.parametrize("bit", [0x01, 0x80])
@pytest.mark.parametrize("column", ["stream", "epoch", "payload"])
def test_a_bit_in_the_text_of_a_row_loses_this_row_and_names_it(
    original: Original, tmp_path: Path, column: str, bit: int
) -> None:
    data = bytearray(original.data)
    payload = data.index(b'{"n":103')  # an event of the second start, as it stands in the table
    key = next(k for k, v in original.payloads.items() if v["n"] == 103)
    at = {"stream": data.rindex(b"event", 0, payload) + 1, "payload": payload + 6}
    at["epoch"] = data.rindex(key[1].encode(), 0, payload) + 3
    data[at[column]] ^= bit
    found = run(tmp_path / "outbox.db", bytes(data))
    check(original, found, column)
    assert original.payloads.keys() - found.sent.keys() == {key}
    assert key in found.gone
    assert "1 rows of the outbox were damaged" in found.news


@pytest.mark.parametrize("column", COLUMNS)
def test_every_column_of_a_row_is_under_its_checksum(original: Original, tmp_path: Path, column: str) -> None:
    path = tmp_path / "folder" / "outbox.db"
    path.parent.mkdir()
    path.write_bytes(original.data)
    key = next(k for k, v in original.payloads.items() if v["n"] == 103)
    changed = {"stream": "'ewent'", "epoch": "'\ufffd'", "payload": "CAST('{}' AS BLOB)"}
    with sqlite3.connect(path) as db:
        value = changed.get(column, f"{column} + 64")
        where = "stream = ? AND epoch = ? AND seq = ?"
        db.execute(f"UPDATE rows SET {column} = {value} WHERE {where}", key)
    db.close()
    found = run(path, path.read_bytes())
    assert original.payloads.keys() - found.sent.keys() == {key}
    assert "1 rows of the outbox were damaged" in found.news
    assert found.outbox.on_disk
    found.outbox.close(0)


def test_a_row_that_flips_while_it_is_open_costs_a_look_at_the_file(
    original: Original, tmp_path: Path
) -> None:
    path = tmp_path / "outbox.db"
    path.write_bytes(original.data)
    outbox = Outbox(path, max_bytes=1 << 20, now_ms=0, stamp_ms=0)
    with sqlite3.connect(path) as db:
        db.execute("UPDATE rows SET payload = CAST('{}' AS BLOB) WHERE id = 5")
    db.close()
    outbox.after(TELEMETRY, 0, outbox.newest_id, 100, 0)
    outbox.after(EVENT, 0, outbox.newest_id, 100, 0)
    assert not outbox.on_disk
    outbox.flush(2_000)
    assert outbox.on_disk
    found = [r for p in (EVENT, TELEMETRY) for r in outbox.after(p, 0, outbox.newest_id, 100, 2_000)]
    assert len(found) == len(original.payloads) - 1
    assert any(b'"gone":' in row.data for row in found)
    outbox.close(3_000)
