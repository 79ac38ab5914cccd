"""What the control process does with messages while its disk does not answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_agent import app, files
from edge_agent.app import App
from edge_agent.config import Broker, Config
from edge_agent.layout import Layout
from edge_agent.messaging.mqtt import Message
from edge_agent.update.inbox import Inbox
from edge_agent.update.operators import FILE
from edge_contract import canonical, dsse, wire
from edge_contract.errors import Reason, StorageFault
from tests.support.broker import free_port

KEY = Ed25519PrivateKey.generate()
FAULT = StorageFault(Reason.STORAGE_FAULT, "Input/output error", "check the disk")


def order(generation: int) -> bytes:
    desired = wire.Desired(1, "acme", "box-1", generation, 1, 10**15, [])
    return dsse.sign(canonical.to_bytes(desired), wire.DESIRED_TYPE, [KEY])


@pytest.fixture
def config(tmp_path: Path) -> Config:
    folders = {"state_dir": str(tmp_path / "state"), "run_dir": str(tmp_path / "run")}
    return Config("acme", "box-1", broker=Broker(port=free_port()), **folders)


@pytest.fixture
def control(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[App]:
    """Not running: turn after turn is taken by the test. Its operators' keys are known."""
    monkeypatch.setattr(app, "_LOOK_EVERY_MS", 0)
    trust = Layout(config).trust
    trust.mkdir(parents=True)
    public = KEY.public_key().public_bytes_raw().hex()
    (trust / FILE).write_bytes(canonical.to_bytes(wire.Operators(1, 1, [wire.OperatorKey(public, "tests")])))
    control = App(tmp_path / "agent.toml", config)
    monkeypatch.setattr(control._operators, "tick", lambda _: control._operators.reload() and False)
    monkeypatch.setattr(control._link, "tick", lambda _: None)  # no broker
    yield control
    control._updater.stop()
    control._outbox.close(0)


def test_an_order_that_met_a_fault_of_the_disk_is_taken_later(
    control: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = Message(control._link.topics.desired, order(3), "", b"")
    with monkeypatch.context() as disk:
        disk.setattr(control._updater, "accept", _out_of_order)
        control._route(message, 1)
        control._tick(2)
    assert control._updater.generation == 0
    control._tick(3)
    assert control._updater.generation == 3
    assert control._held is None


def test_a_command_that_met_a_fault_of_the_disk_is_answered_later(
    control: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = wire.Command(1, "acme", "box-1", "c" * 32, "clear-rejected", 1, 10**15)
    signed = dsse.sign(canonical.to_bytes(command), wire.COMMAND_TYPE, [KEY])
    message = Message(control._link.topics.command, signed, "", b"")
    answers: list[str] = []
    monkeypatch.setattr(control._commands, "_reply", lambda topic, *_: answers.append(topic))
    with monkeypatch.context() as disk:
        disk.setattr(control._outbox, "result", _out_of_order)
        control._route(message, 1)
    assert answers == []
    for turn in range(2, 4):
        control._tick(turn)
    assert len(answers) == 1


def test_an_order_by_hand_stays_until_the_keys_can_be_read(
    control: App, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox = Inbox(Layout(config))
    inbox.drop(order(5))
    cache = Layout(config).trust / FILE
    files.write(cache, cache.read_bytes())  # an import writes it anew
    read = files.read

    def out_of_order_for_a_while(path: Path) -> bytes | None:
        if path == cache:
            raise FAULT
        return read(path)

    with monkeypatch.context() as disk:
        disk.setattr(files, "read", out_of_order_for_a_while)
        control._tick(1)
    assert inbox.look() is not None
    assert control._updater.generation == 0
    control._tick(2)
    assert control._updater.generation == 5
    assert inbox.look() is None


def test_an_order_by_hand_that_met_a_fault_stays(
    control: App, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox = Inbox(Layout(config))
    inbox.drop(order(5))
    with monkeypatch.context() as disk:
        disk.setattr(control._updater, "accept", _out_of_order)
        control._tick(1)
    assert inbox.look() is not None
    control._tick(2)
    assert (control._updater.generation, inbox.look()) == (5, None)


def _out_of_order(*_: object) -> None:
    raise FAULT
