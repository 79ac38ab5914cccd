"""A device that only reports: the agent's outbox, pace, link and client in one process, to be killed.

`python -m tests.support.outbox_driver FOLDER PORT DEVICE ROWS OUTBOX_BYTES ROWS_A_TURN`. It puts numbered
rows and appends to FOLDER/committed what was flushed; a new start goes on behind that. It ends with 0 when
all rows were put and none waits any more, with 1 if the storage failed meanwhile.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from edge_agent.config import Broker, Config, Telemetry
from edge_agent.messaging.link import Link
from edge_agent.messaging.mqtt import Message
from edge_agent.messaging.outbox import Outbox
from edge_agent.messaging.pace import EVENT, TELEMETRY
from edge_contract import wire
from edge_contract.errors import Reason
from edge_contract.profile import Facts

TENANT = "tests"
FACTS = Facts("x86_64", "cpu", [], 2, 1 << 30, "Linux", "3.11", "0.1.0", {})
# Every tenth row is an event.
_EVENT_EVERY = 10
_TURN_S = 0.01


class Committed(NamedTuple):
    """A row that was flushed, as the driver's own log has it."""

    stream: wire.StreamName
    epoch: str
    seq: int
    number: int


def stream_of(number: int) -> wire.StreamName:
    """Which stream the row of a number goes to."""
    return "event" if number % _EVENT_EVERY == 0 else "tel"


def committed(folder: Path) -> Iterator[Committed]:
    """What the log says, in order. A last line that a kill cut off does not count."""
    path = folder / "committed"
    seqs: dict[tuple[str, str], int] = {}
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if not line.endswith("\n"):
            return
        entry = json.loads(line)
        for number in range(entry["first"], entry["last"] + 1):
            key = (stream_of(number), entry["epoch"])
            seqs[key] = seqs.get(key, 0) + 1
            yield Committed(stream_of(number), entry["epoch"], seqs[key], number)


def now_ms() -> int:
    """Monotonic milliseconds."""
    return time.monotonic_ns() // 1_000_000


def main(folder: Path, port: int, device: str, rows: int, outbox_bytes: int, rows_a_turn: int) -> int:
    """Run until all rows are put and acknowledged."""
    config = Config(
        tenant=TENANT,
        device=device,
        broker=Broker(port=port, keepalive_s=5, will_delay_s=0, reconnect_max_s=0.2),
        telemetry=Telemetry(resend_s=1.0, backlog_rows_per_s=10_000.0, outbox_max_bytes=outbox_bytes),
    )
    outbox = Outbox(folder / "outbox.db", max_bytes=outbox_bytes, now_ms=now_ms(), stamp_ms=0)
    told: list[tuple[str, Reason, str]] = []
    session = int(time.time()) * 1000
    link = Link(
        config,
        outbox,
        session,
        lambda number, at_ms: wire.Birth(1, number, FACTS, [], at_ms),
        lambda: time.time_ns() // 1_000_000,
        lambda *event: told.append(event),
    )
    link.start()
    number = max((c.number for c in committed(folder)), default=0)
    log = os.open(folder / "committed", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    _mend(log, folder / "committed")
    while True:
        _receive(link)
        first, last = number + 1, min(rows, number + rows_a_turn)
        for number in range(first, last + 1):
            stream = stream_of(number)
            priority = EVENT if stream == "event" else TELEMETRY
            outbox.put(stream, {"n": number}, priority=priority, now_ms=now_ms(), life_s=1e6)
        link.store(now_ms())
        if last >= first:
            entry = {"epoch": outbox.epoch, "first": first, "last": last}
            os.write(log, (json.dumps(entry) + "\n").encode())
        link.tick(now_ms())
        if number >= rows and outbox.depth() == 0:
            link.stop()
            outbox.close(now_ms())
            return 1 if any(kind == "storage" for kind, *_ in told) else 0


def _mend(log: int, path: Path) -> None:
    """A line that a kill cut off must not glue itself to the next one."""
    data = path.read_bytes()
    os.ftruncate(log, data.rfind(b"\n") + 1)


def _receive(link: Link) -> None:
    deadline_s = time.monotonic() + _TURN_S
    while (left_s := deadline_s - time.monotonic()) > 0:
        try:
            event = link.inbox.get(timeout=left_s)
        except queue.Empty:
            return
        if not isinstance(event, Message):
            link.handle(event, now_ms())
        elif event.topic == link.topics.ack:
            link.acknowledge(event)
        if link.inbox.empty():
            return


if __name__ == "__main__":
    folder, port, device, rows, outbox_bytes, rows_a_turn = sys.argv[1:]
    sys.exit(main(Path(folder), int(port), device, int(rows), int(outbox_bytes), int(rows_a_turn)))
