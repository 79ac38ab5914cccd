"""`edge-fleet broker`: the embedded broker speaks MQTT 5, ends cleanly, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result

from edge_contract import wire
from fleet.broker import MAX_PAYLOAD_BYTES
from fleet.bus import Address, Bus
from tests.support.broker import Embedded
from tests.unit.fleet import samples
from tests.unit.fleet.device_double import Device

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def embedded() -> Iterator[Embedded]:
    with Embedded() as running:
        yield running


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 0.5).close()
    except OSError:
        return False
    return True


def await_silence(port: int) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if not listens(port):
            return True
        time.sleep(0.05)
    return False


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_deployment_and_a_command_over_it(
    run: Run, published: Path, embedded: Embedded, tenant: str, operators: wire.Operators
) -> None:
    where = ("--broker", embedded.address, "--tenant", tenant)
    with Device(embedded.address, tenant, "a", operators):
        result = run("deploy", "fashion@2.0.0", "--device", "a", "--registry", published, *where, "--json")
        assert samples.json_of(result)["devices"][0]["outcome"] == "committed"
        keys = ("--keys", published.parent / "keys")
        run("command", "status", "--device", "a", *keys, *where)
        found = samples.json_of(run("devices", *where, "--json"))["devices"]
        assert [(d["device"], d["status"]) for d in found] == [("a", "online")]


def test_large_messages(embedded: Embedded, tenant: str) -> None:
    assert MAX_PAYLOAD_BYTES >= wire.LIMIT_BYTES
    with Bus(Address(embedded.host, embedded.port)) as connected:
        connected.subscribe([tenant])
        connected.publish(tenant, b"x" * wire.LIMIT_BYTES)
        message = connected.next(5)
    assert message is not None
    assert len(message.payload) == wire.LIMIT_BYTES


def test_a_will_is_published(embedded: Embedded, tenant: str, operators: wire.Operators) -> None:
    device = Device(embedded.address, tenant, "a", operators)
    device.__enter__()
    with Bus(Address(embedded.host, embedded.port)) as connected:
        connected.subscribe([device.topics.presence])
        first = connected.next(5)
        assert first is not None
        assert wire.decode(first.payload, wire.Presence).status == "online"
        device.die()
        will = connected.next(5)
        assert will is not None
        assert wire.decode(will.payload, wire.Presence).status == "offline"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_it_leaves_nothing_running(number: signal.Signals) -> None:
    running = Embedded().start()
    (child,) = children(running.pid)
    os.kill(running.pid, number)
    code = running.wait(10)
    assert code == (-number if number == signal.SIGKILL else 0)
    assert await_silence(running.port)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{child}").exists()


def test_a_broker_that_dies_is_an_error() -> None:
    running = Embedded().start()
    (child,) = children(running.pid)
    os.kill(child, signal.SIGKILL)
    assert running.wait(10) == 5


def test_a_taken_port_is_one_line(embedded: Embedded, refused: Callable[..., str]) -> None:
    line = refused("broker", "--port", embedded.port, code=2, reason="bad_input")
    assert str(embedded.port) in line


def test_without_the_package_it_names_the_extra(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "iotcore", None)
    assert "edgeward[demo]" in refused("broker", code=6, reason="runtime_missing")
