"""The outbox: rows in, rows out to a controller that has stored them, and what a row costs.

`python benchmarks/update/outbox.py [--rows 5000] [--json]`. *In* is `put` and `flush` in groups, beside a
naive outbox that commits each row on its own in the same run. *Out* is from the first row to the last
acknowledged and deleted one, through a real broker to a real `edge-fleet watch`. CPU time is this process's;
wall time on a shared machine says less.
"""

from __future__ import annotations

import argparse
import json
import queue
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_agent.config import Broker, Config, Telemetry
from edge_agent.messaging.link import Link
from edge_agent.messaging.mqtt import Message
from edge_agent.messaging.outbox import Outbox
from edge_agent.messaging.pace import EVENT, TELEMETRY
from edge_contract import canonical, wire
from edge_contract.errors import Reason
from edge_contract.profile import Facts

MOSQUITTO = "/usr/sbin/mosquitto"
GROUP = 50
FACTS = Facts("x86_64", "cpu", [], 2, 1 << 30, "Linux", "3.11", "0.1.0", {})
Figures = dict[str, float]


def telemetry(number: int) -> wire.Telemetry:
    """Thirty metrics, as a device sends them."""
    device = {f"metric_{i:02}_percent": number % 100 + i / 7 for i in range(30)}
    return wire.Telemetry(1_790_000_000_000 + number, 10.0, device, [])


def event(number: int) -> wire.Event:
    """One step of an update."""
    return wire.Event(
        1_790_000_000_000 + number, "probation", "fashion", "2.0.0", Reason.OK, f"step {number}"
    )


KINDS: dict[str, tuple[wire.StreamName, int, Callable[[int], Any]]] = {
    "telemetry": ("tel", TELEMETRY, telemetry),
    "events": ("event", EVENT, event),
}


def now_ms() -> int:
    """Monotonic milliseconds."""
    return time.monotonic_ns() // 1_000_000


def measured(rows: int, work: Callable[[], None]) -> Figures:
    """Rows per second of wall time, and microseconds of CPU time per row."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    work()
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    return {"rows_per_s": rows / wall_s, "cpu_us_per_row": cpu_s / rows * 1e6}


def opened(folder: Path) -> Outbox:
    """A new outbox, large enough for all."""
    return Outbox(folder / "outbox.db", max_bytes=1 << 30, now_ms=now_ms(), stamp_ms=0)


def fill(outbox: Outbox, kind: str, rows: int) -> None:
    """Put rows in groups, as turns of the control loop make them."""
    stream, priority, make = KINDS[kind]
    for number in range(1, rows + 1):
        outbox.put(stream, make(number), priority=priority, now_ms=now_ms(), life_s=1e6)
        if number % GROUP == 0 or number == rows:
            outbox.flush(now_ms())


def put(folder: Path, kind: str, rows: int) -> Figures:
    """Ours: one transaction for a group."""
    outbox = opened(folder)
    figures = measured(rows, lambda: fill(outbox, kind, rows))
    outbox.close(now_ms())
    return figures


def naive(folder: Path, kind: str, rows: int) -> Figures:
    """A table, a transaction a row, synced to the disk each time."""
    db = sqlite3.connect(folder / "naive.db", isolation_level=None)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    db.execute("CREATE TABLE rows (seq INTEGER PRIMARY KEY, payload BLOB)")
    make = KINDS[kind][2]

    def work() -> None:
        for number in range(1, rows + 1):
            db.execute("INSERT INTO rows VALUES (?, ?)", (number, canonical.to_bytes(make(number))))

    figures = measured(rows, work)
    db.close()
    return figures


def out(folder: Path, kind: str, rows: int) -> Figures:
    """From a full outbox to an empty one, through the broker, by the controller's acknowledgements."""
    outbox = opened(folder)
    fill(outbox, kind, rows)
    port = _free_port()
    broker = _broker(folder, port)
    watch = _watch(folder, port)
    link = Link(
        Config(
            tenant="bench",
            device="box",
            broker=Broker(port=port),
            telemetry=Telemetry(backlog_rows_per_s=1e6),
        ),
        outbox,
        1,
        lambda session, at_ms: wire.Birth(1, session, FACTS, [], at_ms),
        lambda: time.time_ns() // 1_000_000,
        lambda *_: None,
    )
    try:
        link.start()
        figures = measured(rows, lambda: _drain(link, outbox))
        link.stop()
    finally:
        for process in (watch, broker):
            process.terminate()
            process.wait(timeout=20)
        outbox.close(now_ms())
    return figures


def _drain(link: Link, outbox: Outbox) -> None:
    while outbox.depth():
        for _ in range(200):
            try:
                event_ = link.inbox.get(timeout=0.05)
            except queue.Empty:
                break
            if not isinstance(event_, Message):
                link.handle(event_, now_ms())
            elif event_.topic == link.topics.ack:
                link.acknowledge(event_)
            if link.inbox.empty():
                break
        link.store(now_ms())
        link.tick(now_ms())


def _broker(folder: Path, port: int) -> subprocess.Popen[bytes]:
    if not Path(MOSQUITTO).exists():
        sys.exit(f"{MOSQUITTO} is not there; install Debian's mosquitto")
    config = folder / "mosquitto.conf"
    config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
    process = subprocess.Popen([MOSQUITTO, "-c", str(config)], stderr=subprocess.DEVNULL)
    _await(port)
    return process


def _watch(folder: Path, port: int) -> subprocess.Popen[bytes]:
    command = [Path(sys.executable).parent / "edge-fleet", "watch", "--broker", f"127.0.0.1:{port}"]
    where = ["--tenant", "bench", "--db", folder / "fleet.db", "--json"]
    process = subprocess.Popen([*command, *where], stdout=subprocess.DEVNULL)
    while not (folder / "fleet.db").exists():
        time.sleep(0.05)
    time.sleep(1.0)  # it subscribes right after it has opened its file
    return process


def _await(port: int) -> None:
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 0.2).close()
        except OSError:
            time.sleep(0.02)
        else:
            return


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
    return number


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=5000, help="rows of each kind (default 5000)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    figures: dict[str, dict[str, Figures]] = {}
    for kind in KINDS:
        for name, measure in (("in", put), ("in, one transaction a row", naive), ("out", out)):
            folder = Path(tempfile.mkdtemp(prefix="ew-outbox-", dir="."))
            try:
                figures.setdefault(kind, {})[name] = measure(folder, kind, options.rows)
            finally:
                shutil.rmtree(folder)
    if options.json:
        print(json.dumps({"rows": options.rows, "group": GROUP, **figures}))
        return 0
    print(f"{options.rows} rows of each kind, put in groups of {GROUP}")
    for kind, measures in figures.items():
        for name, f in measures.items():
            print(f"{kind:10} {name:26} {f['rows_per_s']:8.0f} rows/s {f['cpu_us_per_row']:8.1f} µs CPU/row")
        ratio = measures["in"]["rows_per_s"] / measures["in, one transaction a row"]["rows_per_s"]
        print(f"{kind:10} groups take {ratio:.1f} times the rows of single transactions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
