"""`edge-fleet watch`: stored, then acknowledged, then shown; on the real broker."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import Result

from edge_contract import canonical, wire
from edge_contract.errors import Reason
from tests.support.broker import Mosquitto, free_port
from tests.unit.fleet.device_double import Device, now_ms


class Watch:
    """The real process; its lines as they come. A test that fails leaves none running."""

    running: ClassVar[list[Watch]] = []

    def __init__(self, *arguments: object) -> None:
        self.running.append(self)
        self._outcome: tuple[int, str, str] | None = None
        command = [sys.executable, "-u", "-c", "from fleet.cli import main; main()", "watch"]
        self.process = subprocess.Popen(
            [*command, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str, str]:
        if not self._outcome:
            self.process.send_signal(number)
            out, err = self.process.communicate(timeout=10)
            self._outcome = (self.process.returncode, out, err)
        return self._outcome


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    yield
    while Watch.running:
        Watch.running.pop().end(signal.SIGKILL)


@pytest.fixture
def device(mosquitto: Mosquitto, tenant: str, operators: wire.Operators) -> Iterator[Device]:
    with Device(mosquitto.address, tenant, "a", operators) as running:
        yield running


@pytest.fixture
def where(mosquitto: Mosquitto, tenant: str, tmp_path: Path) -> tuple[object, ...]:
    return ("--broker", mosquitto.address, "--tenant", tenant, "--db", tmp_path / "fleet.db")


def event(seq: int, **changes: Any) -> wire.Record:
    body = wire.Event(now_ms(), "update", "fashion", "2.0.0", Reason.OK, f"step {seq}")
    return wire.Record(
        **{
            "schema": 1,
            "stream": "event",
            "epoch": "e1",
            "seq": seq,
            "lost": 0,
            "payload": json.loads(canonical.to_bytes(body)),
            **changes,
        }
    )


def telemetry(seq: int) -> wire.Record:
    served = wire.VersionTelemetry("fashion", "2.0.0", 200, 1, 20.0, 1.0, 2.5, None)
    device = {
        "cpu_percent": 12.4,
        "temperature_c": None,
        "disk_free_bytes": 2.0 * (1 << 30),
        "net_sent_bytes_per_s": 1536.0,
    }
    body = wire.Telemetry(now_ms(), 10.0, device, [served])
    return wire.Record(1, "tel", "e1", seq, 0, json.loads(canonical.to_bytes(body)))


def acked(device: Device, *expected: tuple[str, int]) -> None:
    """Wait for these acknowledgements, and no others."""
    deadline = time.monotonic() + 5
    while len(device.acks) < len(expected) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [(a.stream, a.seq) for a in device.acks] == list(expected)


def test_records_are_stored_acknowledged_and_shown(
    device: Device, where: tuple[object, ...], tmp_path: Path
) -> None:
    watch = Watch(*where)
    assert "a is online (session 1)" in watch.line()
    device.send(event(1))
    assert "a event update fashion@2.0.0 step 1" in watch.line()
    device.send(telemetry(1))
    assert watch.line().split(" ", 1)[1] == (
        "a telemetry cpu=12 % disk_free=2.0 GiB net_sent=1.5 KiB/s | fashion@2.0.0 20/s 1 errors p95 2.5 ms\n"
    )
    acked(device, ("event", 1), ("tel", 1))
    assert watch.end() == (0, "", "")
    with sqlite3.connect(tmp_path / "fleet.db") as db:
        assert len(db.execute("SELECT * FROM records").fetchall()) == 2
    db.close()


def test_as_json(device: Device, where: tuple[object, ...]) -> None:
    watch = Watch(*where, "--json", "--device", "a", "--count", 2)
    assert json.loads(watch.line())["type"] == "presence"
    device.send(event(1))
    device.send(event(1))
    device.send(telemetry(1))
    first, second = json.loads(watch.line()), json.loads(watch.line())
    assert (first["device"], first["stream"], first["seq"]) == ("a", "event", 1)
    assert first["payload"]["detail"] == "step 1"
    assert (second["stream"], second["payload"]["device"]["cpu_percent"]) == ("tel", 12.4)
    assert watch.process.wait(10) == 0
    assert watch.end() == (0, "", "")


def test_only_a_prefix_is_acknowledged_and_gaps_are_shown(device: Device, where: tuple[object, ...]) -> None:
    watch = Watch(*where, "--json")
    watch.line()
    device.send(event(1))
    acked(device, ("event", 1))
    device.send(event(3))
    assert [json.loads(watch.line())["seq"] for _ in range(2)] == [1, 3]
    acked(device, ("event", 1), ("event", 1))
    device.send(event(2))
    acked(device, ("event", 1), ("event", 1), ("event", 3))
    device.send(event(6, lost=2, gone=[wire.Gone("event", "e1", 4, 5)]))
    acked(device, ("event", 1), ("event", 1), ("event", 3), ("event", 6))
    assert json.loads(watch.line())["seq"] == 2
    assert json.loads(watch.line())["seq"] == 6
    gap = json.loads(watch.line())
    assert (gap["type"], gap["first"], gap["last"], gap["explained"]) == ("gap", 4, 5, True)
    assert watch.end()[0] == 0


def test_a_gap_is_told_after_a_while_and_never_acknowledged(
    device: Device, where: tuple[object, ...]
) -> None:
    watch = Watch(*where, "--gap-after-s", 1)
    watch.line()
    device.send(event(3))
    assert "step 3" in watch.line()
    assert "a event rows 1 to 2 have not come (unexplained)" in watch.line()
    acked(device, ("event", 0), ("event", 0))
    assert device.acks[-1].have == [(3, 3)]
    device.send(event(1))
    acked(device, ("event", 0), ("event", 0), ("event", 1))
    device.send(event(2))
    acked(device, ("event", 0), ("event", 0), ("event", 1), ("event", 3))
    assert watch.end()[0] == 0


def test_what_a_killed_watch_has_acknowledged_is_stored(
    device: Device, where: tuple[object, ...], tmp_path: Path
) -> None:
    watch = Watch(*where)
    watch.line()
    for seq in range(1, 40):
        device.send(event(seq))
    while not device.acks:
        time.sleep(0.005)
    watch.process.kill()
    watch.end(signal.SIGKILL)
    with sqlite3.connect(tmp_path / "fleet.db") as db:
        stored = {row[0] for row in db.execute("SELECT seq FROM records")}
    db.close()
    assert stored >= set(range(1, device.acks[-1].seq + 1))


def test_what_cannot_be_read_is_shown_and_not_acknowledged(device: Device, where: tuple[object, ...]) -> None:
    watch = Watch(*where)
    watch.line()
    device.say_raw(device.topics.event, b"\x1b[2J{", retain=False)
    assert "a sent something unreadable: record message: not JSON" in watch.line()
    device.send(event(1, payload={"of": "a newer version"}))
    assert "of" in watch.line()
    acked(device, ("event", 1))
    assert watch.end()[0] == 0


def test_a_late_death_is_not_shown(device: Device, where: tuple[object, ...]) -> None:
    watch = Watch(*where)
    watch.line()
    late = wire.Presence(1, "offline", 0, now_ms())
    device.say_raw(device.topics.presence, canonical.to_bytes(late))
    device.send(event(1))
    assert "step 1" in watch.line()
    assert watch.end()[0] == 0


def test_two_devices_with_one_id_are_shown(device: Device, where: tuple[object, ...]) -> None:
    watch = Watch(*where)
    watch.line()
    double = wire.Presence(1, "online", device.session, now_ms() + 5)
    device.say_raw(device.topics.presence, canonical.to_bytes(double))
    assert "a came online with session 1, which is not newer than its last" in watch.line()
    assert "a is online (session 1)" in watch.line()
    later = wire.Presence(1, "online", 2, now_ms() + 9)
    device.say_raw(device.topics.presence, canonical.to_bytes(later))
    assert "a is online (session 2)" in watch.line()
    assert watch.end()[0] == 0


def test_it_ends_by_time_and_by_signal(where: tuple[object, ...]) -> None:
    started = time.monotonic()
    brief = Watch(*where, "--for-s", "0.5")
    assert brief.process.wait(10) == 0
    assert time.monotonic() - started < 5
    brief.end()
    assert not os.path.exists("fleet.db")


def test_it_goes_on_after_a_restart_of_the_broker(
    tmp_path: Path, tenant: str, operators: wire.Operators
) -> None:
    with Mosquitto(tmp_path) as broker, Device(broker.address, tenant, "a", operators) as device:
        watch = Watch("--broker", broker.address, "--tenant", tenant, "--db", tmp_path / "fleet.db")
        watch.line()
        broker.restart()
        assert device.wait_for_broker(10)
        # As the agent does: until it is acknowledged.
        deadline = time.monotonic() + 10
        while not device.acks and time.monotonic() < deadline:
            device.send(event(1))
            time.sleep(0.2)
        assert device.acks
        assert watch.end(signal.SIGINT)[0] == 0


def test_bad_input(tmp_path: Path, refused: Callable[..., str], mosquitto: Mosquitto) -> None:
    nowhere = ("--broker", f"127.0.0.1:{free_port()}")
    refused("watch", *nowhere, "--db", tmp_path / "db", code=5, reason="broker_unreachable")
    (tmp_path / "junk").write_bytes(b"junk" * 1000)
    where = ("--broker", mosquitto.address)
    refused("watch", *where, "--db", tmp_path / "junk", code=7, reason="storage_fault")
    refused("watch", *where, "--db", tmp_path, code=7, reason="storage_fault")
    refused("watch", *where, "--db", tmp_path / "db", "--device", "#", code=2, reason="bad_input")


def test_devices(run: Callable[..., Result], device: Device, mosquitto: Mosquitto, tenant: str) -> None:
    where = ("--broker", mosquitto.address, "--tenant", tenant)
    serving = wire.ModelState("fashion", "idle", version="2.0.0", digest="2" * 64, outcome="committed")
    device.report(wire.State(1, 3, True, [serving], [], now_ms()))
    with Device(mosquitto.address, tenant, "b", device.operators):
        pass
    found = {d["device"]: d for d in json.loads(run("devices", *where, "--json").stdout)["devices"]}
    assert {name: d["status"] for name, d in found.items()} == {"a": "online", "b": "offline"}
    assert found["a"]["state"]["models"][0]["version"] == "2.0.0"
    assert found["a"]["facts"]["cores"] == 4
    header, a, b = run("devices", *where).stdout.splitlines()
    assert header.split()[:3] == ["Device", "Status", "Since"]
    assert "aarch64  4      4.0 GiB" in a
    assert "fashion@2.0.0" in a
    assert "offline" in b
    # The will of the session before arrives late.
    device.say_raw(device.topics.presence, canonical.to_bytes(wire.Presence(1, "offline", 0, now_ms())))
    found = {d["device"]: d for d in json.loads(run("devices", *where, "--json").stdout)["devices"]}
    assert found["a"]["online"]


def test_no_devices(run: Callable[..., Result], mosquitto: Mosquitto, tenant: str) -> None:
    where = ("--broker", mosquitto.address, "--tenant", tenant)
    assert "no device has reported" in run("devices", *where).stdout
    assert json.loads(run("devices", *where, "--json").stdout)["devices"] == []


def test_a_controller_that_comes_late_asks_for_what_it_missed(
    device: Device, where: tuple[object, ...]
) -> None:
    watch = Watch(*where)
    watch.line()
    device.send(event(7))
    watch.line()
    acked(device, ("event", 0))
    assert device.acks[0].resend
    for seq in range(1, 7):
        device.send(event(seq))
        watch.line()
    deadline = time.monotonic() + 5
    while device.acks[-1].seq < 7 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (device.acks[-1].seq, device.acks[-1].resend) == (7, False)
    watch.end()
