"""kill -9 while rows flow: every row arrives once, or a tombstone names it; and a disk that is no disk.

The device of the first part is tests/support/outbox_driver.py (the agent's real outbox, link and client), the
broker the real mosquitto, the controller the real `edge-fleet watch`; each is a process.
"""

from __future__ import annotations

import random
import shutil
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edge_contract import canonical, wire
from edge_contract.errors import Reason
from tests.faults.conftest import Cases
from tests.support.broker import Mosquitto, free_port
from tests.support.device import TENANT as DEVICE_TENANT
from tests.support.device import Device
from tests.support.operator import Operator
from tests.support.outbox_driver import TENANT, Committed, committed
from tests.support.small_disk import fill, read_only, small_disk
from tests.support.waiting import wait_for

DEVICE = "box-1"


class Rig:
    """Three processes, each of which may be killed at any time and started again."""

    def __init__(self, folder: Path, *, rows: int, outbox_bytes: int, rows_a_turn: int) -> None:
        self.folder = folder
        self.db = folder / "fleet.db"
        self.broker = Mosquitto(folder, port=free_port())
        self._rows, self._bytes, self._rows_a_turn = rows, outbox_bytes, rows_a_turn
        self.device: subprocess.Popen[bytes] | None = None
        self.watch: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.broker.start()
        self.start_watch()
        wait_for(lambda: self.db.exists() and self.broker.log.count("SUBACK"), "the controller")
        self.start_device()

    def start_device(self) -> None:
        arguments = [self.folder, self.broker.port, DEVICE, self._rows, self._bytes, self._rows_a_turn]
        self.device = self._process("tests.support.outbox_driver", "device.log", *arguments)

    def start_watch(self) -> None:
        arguments = ["watch", "--broker", self.broker.address, "--tenant", TENANT, "--db", self.db, "--json"]
        self.watch = self._process("fleet", "watch.log", *arguments)

    def kill(self, which: str) -> None:
        """SIGKILL and a new start."""
        if which == "broker":
            self.broker.kill()
            self.broker.start()
            return
        process = self.device if which == "agent" else self.watch
        assert process is not None
        process.kill()
        process.wait()
        (self.start_device if which == "agent" else self.start_watch)()

    def lose_database(self) -> Path:
        """The controller is killed and starts with an empty database; returns where the old one is."""
        assert self.watch is not None
        self.watch.kill()
        self.watch.wait()
        old = self.folder / "old"
        old.mkdir()
        for path in self.folder.glob("fleet.db*"):
            path.rename(old / path.name)
        self.start_watch()
        return old / self.db.name

    def close(self) -> None:
        for process in (self.device, self.watch):
            if process is not None:
                process.kill()
                process.wait()
        self.broker.stop()

    def _process(self, module: str, log: str, *arguments: object) -> subprocess.Popen[bytes]:
        code = f"from {module} import *" if module != "fleet" else "from fleet.cli import main; main()"
        start = ["-m", module] if module != "fleet" else ["-c", code]
        with (self.folder / log).open("ab") as out:
            return subprocess.Popen(
                [sys.executable, *start, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=out
            )

    # what came of it

    def stored(self, path: Path | None = None) -> dict[tuple[str, str, int], int]:
        """(stream, epoch, seq) → number of every row that the controller holds, or did in another file."""
        query = "SELECT stream, epoch, seq, json_extract(payload, '$.n') FROM records"
        return {(stream, epoch, seq): n for stream, epoch, seq, n in self._query(query, path)}

    def gone(self) -> set[tuple[str, str, int]]:
        """Rows that the controller knows to be lost: those the device named."""
        query = "SELECT stream, epoch, first, last FROM gaps WHERE explained"
        return {(s, e, seq) for s, e, first, last in self._query(query) for seq in range(first, last + 1)}

    def elsewhere(self) -> set[tuple[str, str, int]]:
        """Rows of which the device says that they were acknowledged, but not from this database."""
        query = "SELECT stream, epoch, first, last FROM gaps WHERE elsewhere"
        return {(s, e, seq) for s, e, first, last in self._query(query) for seq in range(first, last + 1)}

    def open_gaps(self) -> int:
        """Streams in which rows are missed."""
        return len(self._query("SELECT stream, epoch, first, last FROM runs"))

    def _query(self, query: str, path: Path | None = None) -> list[tuple[str, str, int, int]]:
        db = sqlite3.connect(f"file:{path or self.db}?mode=ro", uri=True)
        try:
            return list(db.execute(query))
        finally:
            db.close()


@contextmanager
def rig(folder: Path, **options: int) -> Iterator[Rig]:
    made = Rig(folder, **options)
    try:
        made.start()
        yield made
    finally:
        made.close()
        for log in ("device.log", "watch.log"):
            print((folder / log).read_text(errors="replace")[-3000:] if (folder / log).exists() else "")


def wait_committed(made: Rig, count: int, timeout_s: float) -> None:
    """Until so many rows were put."""
    path = made.folder / "committed"
    wait_for(
        lambda: path.exists() and path.stat().st_size > 0 and len(list(committed(made.folder))) >= count,
        f"{count} rows",
        timeout_s=timeout_s,
        every_s=0.2,
    )


def finish(made: Rig, timeout_s: float) -> None:
    """Until the device has put everything and nothing waits there any more."""

    def ended() -> bool:
        assert made.device is not None
        if made.device.poll() is None:
            return False
        assert made.device.returncode == 0
        return True

    wait_for(ended, "the device to be done", timeout_s=timeout_s, every_s=0.1)


def check(made: Rig, rows: int, kills: int) -> int:
    """Every committed row once or named as lost; returns how many were lost."""
    told = list(committed(made.folder))
    assert len(told) == rows
    stored, gone = made.stored(), made.gone()
    names = {Committed(stream, epoch, seq, n) for (stream, epoch, seq), n in stored.items()}
    missing = [row for row in told if row not in names and row[:3] not in gone]
    assert missing == [], f"{len(missing)} rows are neither here nor named as lost"
    # What a kill caught between the flush and this test's own log was put again under another name.
    twice = len(stored) + len(gone - stored.keys()) - rows
    assert 0 <= twice <= kills * made._rows_a_turn
    return len(gone - stored.keys())


def test_kills_while_rows_flow(tmp_path: Path, cases: Cases) -> None:
    rng = random.Random(1)
    with rig(tmp_path, rows=2000, outbox_bytes=8 << 20, rows_a_turn=20) as made:
        for number in range(10):
            time.sleep(rng.uniform(0.05, 0.4))
            which = ("agent", "broker", "controller")[number % 3]
            made.kill(which)
            cases.add(f"outbox flow: {which}", "kill -9")
        finish(made, 40)
        assert check(made, 2000, 10) == 0


@pytest.mark.thorough
def test_kills_while_the_outbox_overflows(tmp_path: Path, cases: Cases) -> None:
    """The controller is away; what does not fit is named, and the newest is there."""
    rng = random.Random(2)
    with rig(tmp_path, rows=3000, outbox_bytes=4000, rows_a_turn=100) as made:
        assert made.watch is not None
        made.watch.kill()
        made.watch.wait()
        for _ in range(3):
            time.sleep(rng.uniform(0.1, 0.3))
            made.kill("agent")
            cases.add("outbox flow: overflow", "kill -9")
        wait_committed(made, 3000, 30)
        made.start_watch()
        finish(made, 40)
        lost = check(made, 3000, 3)
        assert lost > 1000
        newest = max(row.number for row in committed(made.folder))
        assert newest in made.stored().values()


def test_a_controller_whose_database_is_lost_while_rows_flow(tmp_path: Path, cases: Cases) -> None:
    """The rows of the old one are no hole that the new one waits for; none is lost, none is invented."""
    with rig(tmp_path, rows=3000, outbox_bytes=8 << 20, rows_a_turn=10) as made:
        wait_for(lambda: len(made.stored()) > 300, "rows in the first database", every_s=0.02)
        old = made.lose_database()
        cases.add("outbox flow: controller", "database lost")
        finish(made, 40)
        before, after = made.stored(old), made.stored()
        told = list(committed(made.folder))
        assert {row.number for row in told} == set(before.values()) | set(after.values())
        assert set() < made.elsewhere() <= before.keys()
        assert made.gone() == made.elsewhere()
        assert made.open_gaps() == 0
        settled = after.keys() | made.elsewhere()
        newest = {key[:2]: 0 for key in after} | {key[:2]: key[2] for key in sorted(after)}
        assert {row[:3] for row in told if row.seq <= newest.get(row[:2], 0)} == settled


@pytest.mark.thorough
@pytest.mark.timeout(420)
def test_two_hundred_kills_while_fifty_thousand_rows_flow(tmp_path: Path, cases: Cases) -> None:
    rng = random.Random(3)
    kills = ["agent"] * 90 + ["broker"] * 90 + ["controller"] * 20
    rng.shuffle(kills)
    with rig(tmp_path, rows=50_000, outbox_bytes=64 << 20, rows_a_turn=6) as made:
        for which in kills:
            time.sleep(rng.uniform(0.05, 1.0))
            made.kill(which)
            cases.add(f"outbox flow, 50,000 rows: {which}", "kill -9")
        finish(made, 240)
        assert check(made, 50_000, 200) == 0


# the disk under the agent


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path, port=free_port()) as running:
        yield running


@contextmanager
def agent(broker: Mosquitto, tmp_path: Path, **settings: Any) -> Iterator[tuple[Device, Operator]]:
    """`edge-agent run`, not started yet, and who listens to it. Its root of trust is of no use to it."""
    telemetry = {"interval_s": 0.2, "resend_s": 1.0, "backlog_rows_per_s": 500.0} | settings
    device = Device(
        f"box-{uuid.uuid4().hex[:8]}",
        broker=broker,
        registry_url="http://127.0.0.1:9",
        root=tmp_path / "root.json",
        settings={"telemetry": telemetry},
    )
    device.layout.state.mkdir()
    try:
        with Operator(broker.host, broker.port, DEVICE_TENANT, device.name) as operator:
            yield device, operator
    finally:
        print(device.log[-4000:])
        device.stop()
        shutil.rmtree(device.folder, ignore_errors=True)


def seqs(operator: Operator, epoch: str) -> set[int]:
    return {r.seq for r in operator.records(operator.topics.telemetry) if r.epoch == epoch}


def test_a_disk_that_is_full_at_the_start(broker: Mosquitto, tmp_path: Path, cases: Cases) -> None:
    """It comes up, says so, reports from memory, and goes back to the disk when there is room."""
    with agent(broker, tmp_path) as (device, operator), small_disk(device.layout.state, 8 << 20) as disk:
        filler = fill(disk.folder)
        cases.add("agent start", "disk full")
        device.start("run")
        first = operator.wait_online().session
        operator.wait(lambda: operator.events("storage"), "the alarm")
        epoch = operator.wait(lambda: operator.records(operator.topics.telemetry), "telemetry")[0].epoch
        if disk.reason is Reason.DISK_FULL:  # else the limit is on the process and cannot be lifted
            filler.unlink()
            operator.wait(
                lambda: [e for e in operator.events("storage") if "on the disk again" in e.detail], "recovery"
            )
            found = seqs(operator, epoch)
            assert found == set(range(1, len(found) + 1))
        device.kill()
        device.start("run")
        operator.wait(
            lambda: operator.presence and operator.presence.session > first, "a newer session, disk or not"
        )
        device.stop()


def test_a_disk_that_is_read_only_at_the_start(broker: Mosquitto, tmp_path: Path, cases: Cases) -> None:
    with agent(broker, tmp_path) as (device, operator), small_disk(device.layout.state, 8 << 20) as disk:
        device.start("run")
        epoch = operator.wait(lambda: operator.records(operator.topics.telemetry), "telemetry")[0].epoch
        device.kill()
        with read_only(disk.folder):
            cases.add("agent start", "disk read-only")
            device.start("run")
            operator.wait(
                lambda: [r for r in operator.records(operator.topics.telemetry) if r.epoch != epoch],
                "telemetry from memory",
            )
            told = operator.wait(lambda: operator.events("storage"), "the alarm")
            assert any("kept in memory" in e.detail for e in told)
        operator.wait(
            lambda: [e for e in operator.events("storage") if "on the disk again" in e.detail], "recovery", 40
        )
        device.stop()


def test_a_disk_that_fills_while_it_runs(broker: Mosquitto, tmp_path: Path, cases: Cases) -> None:
    """Nothing is lost on the way to memory and back."""
    with agent(broker, tmp_path) as (device, operator), small_disk(device.layout.state, 8 << 20) as disk:
        device.start("run")
        operator.wait(lambda: len(operator.records(operator.topics.telemetry)) > 5, "telemetry")
        filler = fill(disk.folder)
        cases.add("outbox flush", "disk full")
        if disk.reason is Reason.DISK_FULL:
            operator.wait(
                lambda: [e for e in operator.events("storage") if "kept in memory" in e.detail],
                "the alarm",
                40,
            )
            filler.unlink()
            operator.wait(
                lambda: [e for e in operator.events("storage") if "on the disk again" in e.detail], "recovery"
            )
        epochs = {r.epoch for r in operator.records(operator.topics.telemetry)}
        time.sleep(1.0)
        for epoch in epochs:
            found = seqs(operator, epoch)
            assert found == set(range(1, len(found) + 1))
        device.stop()


@pytest.mark.parametrize(
    "how",
    ["flipped bits", *(pytest.param(h, marks=pytest.mark.thorough) for h in ("truncated", "zeros", "log"))],
)
def test_a_damaged_database_at_the_start(broker: Mosquitto, tmp_path: Path, cases: Cases, how: str) -> None:
    with agent(broker, tmp_path) as (device, operator):
        device.start("run")
        operator.wait(lambda: len(operator.records(operator.topics.telemetry)) > 5, "telemetry")
        device.kill()
        before = {r.epoch for r in operator.records(operator.topics.telemetry)}
        path = device.layout.outbox
        if how == "log":
            path = path.with_name(path.name + "-wal")
        data = bytearray(path.read_bytes())
        match how:
            case "truncated":
                del data[len(data) // 3 :]
            case "zeros":
                data[100:] = bytes(len(data) - 100)
            case _:
                for at in range(50, len(data), 97):
                    data[at] ^= 0x10
        path.write_bytes(data)
        cases.add("outbox open", how)
        device.start("run")
        after = operator.wait(
            lambda: [r for r in operator.records(operator.topics.telemetry) if r.epoch not in before],
            "telemetry of a new epoch",
        )
        assert after[0].seq == 1
        assert all(
            canonical.from_builtins(r.payload, wire.Telemetry)
            for r in operator.records(operator.topics.telemetry)
        )
        device.stop()
