"""The link against a real mosquitto: presence, birth, state, the outbox's way out, reconnecting."""

from __future__ import annotations

import queue
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from msgspec.structs import replace

from edge_agent.config import Broker, Config, Telemetry
from edge_agent.messaging.link import MAX_IN_HAND, Link
from edge_agent.messaging.mailbox import Mailbox
from edge_agent.messaging.mqtt import Connected, Disconnected, Message, MqttClient, Notice, Taken, Will
from edge_agent.messaging.outbox import Outbox
from edge_contract import wire
from edge_contract.errors import InputRejected, MessageRejected, Reason
from edge_contract.profile import Facts
from tests.support.broker import Mosquitto, free_port
from tests.support.operator import Operator, now_ms
from tests.support.waiting import wait_for

FACTS = Facts("x86_64", "cpu", [], 2, 1 << 30, "Linux", "3.11", "0.1.0", {})
STATE = wire.State(schema=1, generation=3, serving=True, models=[], rejected=[], at_ms=1)


def mono_ms() -> int:
    return time.monotonic_ns() // 1_000_000


@pytest.fixture(scope="module")
def mosquitto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path_factory.mktemp("broker")) as broker:
        yield broker


class Device:
    """A link, its outbox and a loop as the control process has one."""

    def __init__(self, broker: Broker, folder: Path, name: str, *, resend_s: float = 30.0) -> None:
        self.outbox = Outbox(folder / "outbox.db", max_bytes=1 << 20, now_ms=mono_ms(), stamp_ms=0)
        telemetry = Telemetry(resend_s=resend_s, backlog_rows_per_s=1000.0)
        config = Config(tenant="acme", device=name, broker=broker, telemetry=telemetry)
        self.told: list[tuple[str, Reason, str]] = []
        self.link = Link(config, self.outbox, 1000, self._birth, now_ms, lambda *e: self.told.append(e))
        self.messages: list[Message] = []
        self.sessions: list[int] = []
        self.losses: list[str] = []

    @staticmethod
    def _birth(session: int, at_ms: int) -> wire.Birth:
        return wire.Birth(1, session, FACTS, ["cpu_percent"], at_ms)

    def start(self) -> Device:
        self.link.start()
        return self

    def turn(self) -> None:
        """One turn of the loop."""
        try:
            event = self.link.inbox.get(timeout=0.02)
        except queue.Empty:
            event = None
        match event:
            case Message():
                self.messages.append(event)
            case Connected():
                self.sessions.append(event.session)
            case Disconnected():
                self.losses.append(event.detail)
        if isinstance(event, Connected | Disconnected | Taken | Notice):
            self.link.handle(event, mono_ms())
        self.link.store(mono_ms())
        self.link.tick(mono_ms())

    def run_until(self, done: Callable[[], object], what: str, timeout_s: float = 15.0) -> None:
        def look() -> object:
            self.turn()
            return done()

        wait_for(look, what, timeout_s=timeout_s, every_s=0)

    def put(self, count: int, stream: str = "tel") -> None:
        for i in range(count):
            priority = 10 if stream == "event" else 1
            self.outbox.put(stream, {"n": i}, priority=priority, now_ms=mono_ms(), life_s=1000)  # type: ignore[arg-type]
        self.link.store(mono_ms())


@pytest.fixture
def make(mosquitto: Mosquitto, tmp_path: Path) -> Iterator[Callable[..., Device]]:
    devices: list[Device] = []

    def device(name: str, *, port: int = 0, resend_s: float = 30.0, **options: object) -> Device:
        broker = Broker(port=port or mosquitto.port, will_delay_s=0, reconnect_max_s=0.5, **options)  # type: ignore[arg-type]
        devices.append(Device(broker, tmp_path / name, name, resend_s=resend_s))
        return devices[-1]

    yield device
    for made in devices:
        if made.link._client.alive:
            made.link.stop()
        made.outbox.close(mono_ms())


@pytest.fixture
def name() -> str:
    return f"d{uuid.uuid4().hex[:8]}"


@pytest.fixture
def operator(mosquitto: Mosquitto, name: str) -> Iterator[Operator]:
    with Operator(mosquitto.host, mosquitto.port, "acme", name) as operator:
        yield operator


@pytest.fixture
def device(make: Callable[..., Device], name: str, operator: Operator) -> Device:
    device = make(name).start()
    # Presence is sent after the subscriptions, so once it is seen, nothing that is sent gets lost.
    device.run_until(lambda: operator.presence is not None, "the connection")
    return device


def test_presence_and_birth_are_retained_and_carry_the_session(
    device: Device, operator: Operator, mosquitto: Mosquitto, name: str
) -> None:
    device.run_until(lambda: operator.last(operator.topics.birth, wire.Birth), "the birth")
    assert operator.presence is not None
    assert (operator.presence.status, operator.presence.session) == ("online", 1001)
    birth = operator.last(operator.topics.birth, wire.Birth)
    assert birth is not None
    assert (birth.session, birth.facts, birth.metrics) == (1001, FACTS, ["cpu_percent"])
    with Operator(mosquitto.host, mosquitto.port, "acme", name) as late:
        late.wait(lambda: late.presence, "the retained presence")
        late.wait(lambda: late.last(late.topics.birth, wire.Birth), "the retained birth")
        assert all(h.retained for h in late.heard)


def test_a_state_is_said_once_per_change(device: Device, operator: Operator) -> None:
    topic = operator.topics.state
    for at_ms in range(20):
        device.link.say_state(replace(STATE, at_ms=at_ms))
        device.turn()
    device.run_until(lambda: operator.on(topic), "the state")
    device.link.say_state(replace(STATE, generation=4))
    device.run_until(lambda: len(operator.on(topic)) == 2, "the next state")
    assert operator.state is not None
    assert operator.state.generation == 4


def test_changes_in_a_hurry_are_said_together(device: Device, operator: Operator) -> None:
    end = time.monotonic() + 1.0
    generation = 0
    while time.monotonic() < end:
        generation += 1
        device.link.say_state(replace(STATE, generation=generation))
        device.turn()
    device.run_until(
        lambda: operator.state is not None and operator.state.generation == generation, "the newest state"
    )
    assert 3 <= len(operator.on(operator.topics.state)) <= 7


def test_a_stop_says_offline_with_its_session(device: Device, operator: Operator) -> None:
    device.run_until(lambda: operator.presence, "online")
    device.link.stop()
    operator.wait(lambda: operator.presence and operator.presence.status == "offline", "the farewell")
    assert operator.presence is not None
    assert operator.presence.session == 1001
    time.sleep(0.2)
    assert [wire.decode(h.payload, wire.Presence).status for h in operator.on(operator.topics.presence)] == [
        "online",
        "offline",
    ]  # no will after an orderly end


def test_rows_wait_for_the_acknowledgement_of_the_controller(device: Device, operator: Operator) -> None:
    device.put(5)
    device.put(2, "event")
    device.run_until(lambda: len(operator.on(operator.topics.telemetry)) == 5, "the telemetry")
    device.run_until(lambda: len(operator.on(operator.topics.event)) == 2, "the events")
    for _ in range(20):
        device.turn()
    assert device.outbox.depth() == 7  # the broker has them, but nobody said that they are stored
    rows = operator.records(operator.topics.telemetry)
    assert [(r.seq, r.payload) for r in rows] == [(i + 1, {"n": i}) for i in range(5)]
    operator.acknowledge("tel", rows[0].epoch, 3)
    device.run_until(lambda: device.messages, "the acknowledgement")
    device.link.acknowledge(device.messages.pop())
    device.turn()
    assert device.outbox.depth() == 4
    with pytest.raises(MessageRejected) as fault:
        device.link.acknowledge(Message(operator.topics.ack, b"{}", "", b""))
    assert fault.value.reason is Reason.MESSAGE_MALFORMED


def test_at_most_a_handful_is_in_the_clients_hands(device: Device, operator: Operator) -> None:
    device.put(100)
    device.link.tick(mono_ms())
    assert device.link._pace.in_hand == MAX_IN_HAND
    device.run_until(lambda: len(operator.on(operator.topics.telemetry)) == 100, "all rows")
    seqs = [r.seq for r in operator.records(operator.topics.telemetry)]
    assert seqs == list(range(1, 101))


def test_what_is_not_acknowledged_comes_again(
    make: Callable[..., Device], name: str, operator: Operator
) -> None:
    device = make(name, resend_s=0.3).start()
    device.put(1)
    device.run_until(lambda: len(operator.on(operator.topics.telemetry)) >= 3, "the row again and again")
    times = [h.at_s for h in operator.on(operator.topics.telemetry)]
    assert times[1] - times[0] >= 0.25
    assert times[2] - times[1] >= 0.5


def test_packets_of_two_threads_never_mix(
    device: Device, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The socket's buffer is small, so that half of a packet often waits: no other may get in between."""
    monkeypatch.setattr(paho.Client, "_sock_send", _in_small_pieces)
    stop = threading.Event()
    big = b"x" * 5_000

    def shout() -> None:
        while not stop.is_set():
            paho_client = device.link._client._line.client
            paho_client.publish(operator.topics.result, big, 1).wait_for_publish(5)

    other = threading.Thread(target=shout)
    other.start()
    device.put(500)
    try:
        device.run_until(lambda: len(operator.on(operator.topics.telemetry)) >= 500, "all rows")
    finally:
        stop.set()
        other.join()
    assert device.losses == []
    assert device.sessions == [1001]
    assert {h.payload for h in operator.on(operator.topics.result)} == {big}


def _in_small_pieces(client: paho.Client, data: bytes) -> int:
    """As a slow network takes them; and another thread gets its turn meanwhile."""
    sent = client._sock.send(data[:1000])
    time.sleep(0.0005)
    return sent


def test_messages_come_with_response_topic_and_correlation(device: Device, operator: Operator) -> None:
    operator.publish(operator.topics.command, b"\x00\xff", response_topic="a/b", correlation=b"\x01\x02")
    operator.publish(operator.topics.command, b"plain")
    device.run_until(lambda: len(device.messages) == 2, "both messages")
    assert device.messages == [
        Message(operator.topics.command, b"\x00\xff", "a/b", b"\x01\x02"),
        Message(operator.topics.command, b"plain", "", b""),
    ]
    device.link.reply("", b"\x01\x02", b"answer", mono_ms())
    device.run_until(lambda: operator.on(operator.topics.result), "the answer")
    heard = operator.on(operator.topics.result)[0]
    assert (heard.payload, heard.correlation, heard.retained) == (b"answer", b"\x01\x02", False)


def test_a_retained_desired_state_comes_with_every_connection(
    make: Callable[..., Device], name: str, operator: Operator
) -> None:
    operator.publish(operator.topics.desired, b"the newest", retain=True)
    for _ in range(2):
        device = make(name).start()
        device.run_until(lambda d=device: d.messages, "the desired state")  # type: ignore[misc]
        assert device.messages[0].payload == b"the newest"
        device.link.stop()


def test_what_was_sent_while_the_device_was_away_arrives_later(
    make: Callable[..., Device], name: str, operator: Operator
) -> None:
    device = make(name).start()
    device.run_until(lambda: device.link.connected, "the connection")
    device.turn()
    device.link.stop()
    operator.publish(operator.topics.command, b"while away")
    again = make(name).start()
    again.run_until(lambda: again.messages, "the message")
    assert again.messages[0].payload == b"while away"


def test_the_will_speaks_when_the_connection_breaks(device: Device, operator: Operator) -> None:
    device.run_until(lambda: operator.presence, "online")
    sock = device.link._client._line.client.socket()
    assert sock is not None
    with socket.socket(fileno=sock.fileno()) as alias:
        alias.shutdown(socket.SHUT_RDWR)
        alias.detach()
    device.run_until(lambda: len(device.sessions) == 2, "the next session")
    statuses = {
        (p.status, p.session)
        for p in (wire.decode(h.payload, wire.Presence) for h in operator.on(operator.topics.presence))
    }
    assert ("offline", 1001) in statuses
    device.run_until(
        lambda: (
            operator.presence and (operator.presence.status, operator.presence.session) == ("online", 1002)
        ),
        "online again",
    )


def seqs(operator: Operator) -> set[int]:
    return {r.seq for r in operator.records(operator.topics.telemetry)}


def test_a_broker_that_comes_later_and_goes_and_comes_again(
    make: Callable[..., Device], name: str, tmp_path: Path
) -> None:
    port = free_port()
    device = make(name, port=port, resend_s=0.3).start()
    device.put(3)
    device.link.say_state(STATE)
    device.run_until(lambda: len(device.losses) >= 2, "two vain attempts")
    assert f"127.0.0.1:{port}" in device.losses[0]
    assert device.outbox.depth() == 3
    broker = Mosquitto(tmp_path / "late", port=port)
    try:
        broker.start()
        device.run_until(lambda: device.link.connected, "the first connection")
        with Operator(broker.host, port, "acme", name) as operator:
            device.run_until(lambda: len(seqs(operator)) == 3, "the rows")
            device.run_until(lambda: operator.state, "the state")
        broker.kill()
        device.run_until(lambda: not device.link.connected, "the loss")
        device.put(2)
        broker.start()
        device.run_until(lambda: device.link.connected, "the next connection")
        assert device.sessions == sorted(set(device.sessions))
        with Operator(broker.host, port, "acme", name) as operator:
            device.run_until(lambda: operator.state, "the state, said again")
            device.run_until(lambda: operator.presence, "the presence, said again")
            device.run_until(lambda: len(seqs(operator)) == 5, "all rows")
    finally:
        broker.stop()


@pytest.mark.parametrize("how", ["refuses the user", "hangs up"])
def test_a_broker_that_takes_and_drops_connections_is_not_hammered(
    make: Callable[..., Device], name: str, tmp_path: Path, how: str
) -> None:
    """A wrong password on a thousand devices must not become an attack on the broker."""
    attempts: list[float] = []
    if how == "refuses the user":
        port = free_port()
        broker = Mosquitto(tmp_path / "strict", port=port)
        config = tmp_path / "strict" / "mosquitto" / "mosquitto.conf"
        config.write_text(config.read_text().replace("allow_anonymous true", "allow_anonymous false"))
        broker.start()
        device = make(name, port=port).start()
        stop = broker.stop
    else:
        listener = socket.create_server(("127.0.0.1", 0))
        device = make(name, port=listener.getsockname()[1]).start()

        def drop() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                connection.close()

        thread = threading.Thread(target=drop, daemon=True)
        thread.start()

        def stop() -> None:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            thread.join()

    try:
        end = time.monotonic() + 2.0
        while time.monotonic() < end:
            before = len(device.losses)
            device.turn()
            if len(device.losses) > before:
                attempts.append(time.monotonic())
        assert not device.link.connected
        assert 2 <= len(attempts) <= 40
        if how == "refuses the user":
            assert "Not authorized" in device.losses[0]
    finally:
        stop()


def test_pauses_grow_with_full_jitter_and_begin_anew_after_a_success(
    mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds: list[tuple[float, float]] = []
    enough = threading.Event()

    def uniform(low: float, high: float) -> float:
        bounds.append((low, high))
        if len(bounds) >= 9:
            enough.set()
        return 0.0

    monkeypatch.setattr("edge_agent.messaging.mqtt.random.uniform", uniform)
    config = Broker(port=free_port(), reconnect_max_s=10.0)
    will = Will("edge/v1/acme/x/up/presence", lambda session: b"")
    client = MqttClient(config, "pauses", will, [], 1, Mailbox())
    client.start()
    assert enough.wait(10)
    client.stop()
    assert bounds[:7] == [(0.05, cap) for cap in (0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0)]


@pytest.mark.parametrize("key", ["tls_ca", "password_file"])
def test_files_that_cannot_be_read_are_the_configurations_fault(
    make: Callable[..., Device], name: str, key: str
) -> None:
    with pytest.raises(InputRejected, match="/nowhere") as fault:
        make(name, **{key: "/nowhere", "username": "u"})
    assert fault.value.reason is Reason.BAD_CONFIG


def test_a_password_is_sent(make: Callable[..., Device], name: str, tmp_path: Path) -> None:
    import subprocess

    passwords = tmp_path / "passwords"
    subprocess.run(["mosquitto_passwd", "-b", "-c", str(passwords), "dev", "secret"], check=True)
    (tmp_path / "secret").write_text("secret\n")
    broker = Mosquitto(tmp_path / "strict", extra=f"password_file {passwords}")
    config = tmp_path / "strict" / "mosquitto" / "mosquitto.conf"
    config.write_text(config.read_text().replace("allow_anonymous true", "allow_anonymous false"))
    with broker:
        password_file = str(tmp_path / "secret")
        device = make(name, port=broker.port, username="dev", password_file=password_file).start()
        device.run_until(lambda: device.link.connected, "the connection")


def test_a_dead_thread_is_not_passed_over(make: Callable[..., Device], name: str) -> None:
    """Nor made anew at every turn."""
    device = make(name)
    for _ in range(50):
        device.link.tick(mono_ms())
    assert device.link._client.rebuilt == 1
    ((kind, reason, detail),) = device.told
    assert (kind, reason) == ("link", Reason.LINK_STALLED)
    assert "its thread has ended" in detail
