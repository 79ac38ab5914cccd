"""The client and its threads: what hangs is given up, what was given up is mute, floods wait outside."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.config import Broker
from edge_agent.messaging import mqtt
from edge_agent.messaging.mailbox import MAX_BYTES, MAX_EVENTS, Mailbox
from edge_agent.messaging.mqtt import Connected, Disconnected, Message, MqttClient, Notice, Taken, Will
from edge_contract import wire
from edge_contract.errors import Reason
from edge_contract.profile import Facts
from tests.support.broker_double import PUBACK, PUBLISH, BrokerDouble, Published
from tests.support.link import LinkedDevice, mono_ms
from tests.support.waiting import wait_for

DOWN = "edge/v1/acme/x/down/cmd"
FACTS = Facts("x86_64", "cpu", [], 2, 1 << 30, "Linux", "3.11", "0.1.0", {})
STATE = wire.State(schema=1, generation=3, serving=True, models=[], rejected=[], at_ms=1)


@pytest.fixture
def broker() -> Iterator[BrokerDouble]:
    with BrokerDouble() as running:
        yield running


class Client:
    """A client and what it told."""

    def __init__(self, port: int) -> None:
        self.inbox = Mailbox()
        will = Will("edge/v1/acme/x/up/presence", lambda session: b"")
        config = Broker(host="localhost", port=port, reconnect_max_s=0.2)
        self.raw = MqttClient(config, "x", will, [DOWN], 100, self.inbox)

    def next(self) -> Any:
        return self.inbox.get(timeout=10)


@pytest.fixture
def client(broker: BrokerDouble) -> Iterator[Client]:
    made = Client(broker.port)
    yield made
    if made.raw.alive:
        made.raw.stop()


def test_a_thread_that_hangs_in_a_name_is_given_up_and_mute(
    broker: BrokerDouble, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    real, hanging = socket.getaddrinfo, {"on": True}

    def getaddrinfo(*arguments: Any, **options: Any) -> Any:
        if hanging["on"]:
            assert released.wait(20)
            raise OSError("the resolver gave up")
        return real(*arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(mqtt, "_GRACE_S", 0.05)
    monkeypatch.setattr(mqtt, "_CONNECT_S", 0.05)
    client.raw.start()
    first = client.raw._line
    assert client.raw.stuck() == ""
    wait_for(lambda: client.raw.stuck() == "connecting", "it to be found stuck")
    # More threads that hang would only add to the trouble.
    assert [client.raw.rebuild() for _ in range(4)] == [True, True, True, False]
    assert client.raw.rebuilt == 3
    hanging["on"] = False
    released.set()
    first.join(10)
    assert not first.is_alive()
    told = [client.next() for _ in range(2)]
    # The last line alone speaks: of the name that failed, and of the next attempt.
    assert [type(t) for t in told] == [Disconnected, Connected]
    wait_for(lambda: not any(line.is_alive() for line in client.raw._lost), "the others to end")
    assert client.inbox.empty()
    assert client.raw.rebuild()
    assert isinstance(client.next(), Connected)


def test_sessions_grow_over_rebuilds(broker: BrokerDouble, client: Client) -> None:
    client.raw.start()
    sessions = []
    for _ in range(3):
        event = client.next()
        assert isinstance(event, Connected)
        sessions.append(event.session)
        client.raw.rebuild()
    assert sessions == sorted(set(sessions))
    assert sessions[0] == 101


def test_nothing_of_a_session_is_sent_again_behind_the_outboxs_back(
    broker: BrokerDouble, client: Client
) -> None:
    broker.code = lambda _: None
    client.raw.start()
    assert isinstance(client.next(), Connected)
    client.raw.publish("a", b"1")
    wait_for(lambda: broker.on("a"), "the publication")
    broker.disconnect(0x8B)
    assert isinstance(client.next(), Disconnected)
    event = client.next()
    assert isinstance(event, Connected)
    client.raw.publish("b", b"2")
    wait_for(lambda: broker.on("b"), "the next publication")
    assert len(broker.on("a")) == 1


def test_answers_carry_their_session_and_code(broker: BrokerDouble, client: Client) -> None:
    broker.code = lambda p: 0x97
    client.raw.start()
    session = client.next().session
    mid = client.raw.publish("a", b"1")
    assert client.next() == Taken(session, mid, 0x97)


def test_a_flood_waits_outside(broker: BrokerDouble, client: Client) -> None:
    client.raw.start()
    assert isinstance(client.next(), Connected)
    count = 1500
    flood = threading.Thread(
        target=lambda: [broker.publish(DOWN, b"%d" % i, mid=i + 1) for i in range(count)], daemon=True
    )
    flood.start()
    wait_for(lambda: client.inbox.qsize() > MAX_EVENTS, "a full inbox")
    time.sleep(0.5)
    assert client.inbox.qsize() <= MAX_EVENTS + 2
    got = [client.next() for _ in range(count)]
    assert [m.payload for m in got if isinstance(m, Message)] == [b"%d" % i for i in range(count)]
    flood.join(5)


def test_a_flood_of_large_messages_is_bounded_by_its_bytes(broker: BrokerDouble, client: Client) -> None:
    client.raw.start()
    assert isinstance(client.next(), Connected)
    body, count = b"x" * wire.LIMIT_BYTES, 40
    flood = threading.Thread(
        target=lambda: [broker.publish(DOWN, body, mid=i + 1) for i in range(count)], daemon=True
    )
    flood.start()
    wait_for(lambda: client.inbox.bytes > MAX_BYTES, "a full inbox")
    time.sleep(0.3)
    assert client.inbox.bytes <= MAX_BYTES + 2 * len(body)
    assert all(isinstance(client.next(), Message) for _ in range(count))
    assert client.inbox.bytes == 0
    flood.join(5)


def test_the_broker_is_told_the_largest_packet(broker: BrokerDouble, client: Client) -> None:
    client.raw.start()
    assert isinstance(client.next(), Connected)
    (packet,) = broker.connect_packets
    assert b"\x27" + (wire.LIMIT_BYTES + (8 << 10)).to_bytes(4, "big") in packet


def publication(topic: bytes, properties: bytes = b"") -> bytes:
    """The body of a PUBLISH at QoS 1."""
    return len(topic).to_bytes(2, "big") + topic + b"\0\1" + bytes([len(properties)]) + properties + b"x"


def test_a_topic_that_is_no_text_is_taken_and_told_once(broker: BrokerDouble, client: Client) -> None:
    client.raw.start()
    assert isinstance(client.next(), Connected)
    for _ in range(3):
        broker.rubbish(PUBLISH, publication(b"\xff\xfe"), flags=2)
    broker.publish(DOWN, b"go on")
    told = [client.next(), client.next()]
    assert told[0] == Notice(Reason.MESSAGE_MALFORMED, "the broker sent a message whose topic is not UTF-8")
    assert told[1] == Message(DOWN, b"go on", "", b"")
    assert client.raw.alive


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        pytest.param(PUBLISH, publication(b"a", b"\x08\x00\x01\xff"), id="response topic"),
        pytest.param(PUBLISH, publication(b"a", b"\x7f\x01"), id="unknown property"),
        pytest.param(PUBLISH, b"\xff\xff", id="topic longer than the packet"),
        pytest.param(PUBACK, b"\x00\x01\x55\x00", id="unknown reason code"),
    ],
)
def test_rubbish_costs_a_session_and_no_more(
    broker: BrokerDouble, client: Client, kind: int, body: bytes
) -> None:
    client.raw.start()
    assert isinstance(client.next(), Connected)
    broker.rubbish(kind, body, flags=2 if kind == PUBLISH else 0)
    lost = client.next()
    if isinstance(lost, Notice):
        assert lost.reason is Reason.LINK_STALLED
        assert "the MQTT client failed" in lost.detail
        lost = client.next()
    assert isinstance(lost, Disconnected)
    assert isinstance(client.next(), Connected)
    assert client.raw.alive


def test_a_thread_that_ended_is_made_anew_counted_and_told(
    broker: BrokerDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failing = threading.Thread.start, {"left": 1}

    def start(self: threading.Thread) -> None:
        if self.name == "mqtt" and failing["left"]:
            failing["left"] -= 1
            raise RuntimeError("can't start new thread")
        real(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    device = LinkedDevice(broker.port, tmp_path)
    try:
        device.until(lambda: device.link.connected, "a connection by the second thread")
        assert [reason for _, reason, _ in device.told] == [Reason.LINK_STALLED]
        assert "its thread has ended or could not be made) and was made anew (1)" in device.told[0][2]
    finally:
        device.close()


def test_a_refused_subscription_is_told(broker: BrokerDouble, client: Client) -> None:
    broker.granted = 0x87
    client.raw.start()
    told = [client.next(), client.next()]
    notice = next(t for t in told if isinstance(t, Notice))
    assert notice.reason is Reason.NOT_ALLOWED
    assert "refused a subscription: Not authorized" in notice.detail


# the link on top of it


def test_an_answer_to_a_command_outlives_the_connection(broker: BrokerDouble, tmp_path: Path) -> None:
    topics = wire.Topics("acme", "x")

    def silent(p: Published) -> int | None:
        return None if p.topic == topics.result and broker.connects == 1 else 0

    broker.code = silent
    device = LinkedDevice(broker.port, tmp_path)
    try:
        device.until(lambda: broker.on(topics.birth), "the connection")
        device.link.reply("", b"c", b"answer", mono_ms())
        device.until(lambda: len(broker.on(topics.result)) == 1, "the answer")
        broker.disconnect(0x8B)
        device.until(lambda: len(broker.on(topics.result)) == 2, "the answer again")
        broker.disconnect(0x8B)
        device.until(lambda: broker.connects == 3 and len(broker.on(topics.birth)) == 3, "the third session")
        assert len(broker.on(topics.result)) == 2
    finally:
        device.close()


def test_after_an_outage_the_newest_comes_first_and_the_backlog_beside_it(
    broker: BrokerDouble, tmp_path: Path
) -> None:
    device = LinkedDevice(broker.port, tmp_path, backlog_rows_per_s=50.0)
    topics = wire.Topics("acme", "x")
    try:
        for n in range(200):
            device.outbox.put("tel", {"n": n}, priority=1, now_ms=mono_ms(), life_s=1e6)
        device.outbox.put("event", {"n": "alert"}, priority=20, now_ms=mono_ms(), life_s=1e6)
        device.link.say_state(STATE)
        device.until(lambda: broker.on(topics.telemetry), "the backlog")
        begun = len(broker.on(topics.telemetry))
        device.outbox.put("tel", {"n": "now"}, priority=1, now_ms=mono_ms(), life_s=1e6)
        device.until(
            lambda: [p for p in broker.on(topics.telemetry) if b'"now"' in p.payload], "the newest row"
        )
        order = [p.topic for p in broker.published]
        assert order.index(topics.state) < order.index(topics.event) < order.index(topics.telemetry)
        at = next(i for i, p in enumerate(broker.on(topics.telemetry)) if b'"now"' in p.payload)
        assert at <= begun + 60  # of 200, on a busy machine
        device.until(lambda: len(broker.on(topics.telemetry)) == 201, "the rest")
    finally:
        device.close()
