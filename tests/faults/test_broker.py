"""What a broker can do to a device: die, refuse, fall silent, forget, repeat, hand over, flood.

The real `edge-agent run` against the real mosquitto; where mosquitto cannot be made to misbehave, against
tests/support/broker_double.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from edge_agent.messaging.pace import EVENT
from edge_contract import canonical, wire
from edge_contract.errors import Reason
from tests.faults.conftest import Cases
from tests.support.broker import Mosquitto, free_port
from tests.support.broker_double import BrokerDouble, Published
from tests.support.device import TENANT, Device
from tests.support.http_registry import FolderServer
from tests.support.link import LinkedDevice, mono_ms
from tests.support.operator import Operator
from tests.support.registry_folder import RegistryFolder
from tests.support.waiting import wait_for

QUOTA, NOT_AUTHORIZED, TAKEN_OVER = 0x97, 0x87, 0x8E


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> RegistryFolder:
    return RegistryFolder.create(tmp_path_factory.mktemp("registry"))


@pytest.fixture(scope="module")
def server(registry: RegistryFolder) -> Iterator[FolderServer]:
    running = FolderServer(registry.folder)
    running.start()
    yield running
    running.stop()


@pytest.fixture
def name() -> str:
    return f"box-{uuid.uuid4().hex[:8]}"


Make = Callable[..., Device]


@pytest.fixture
def make(registry: RegistryFolder, server: FolderServer) -> Iterator[Make]:
    made: list[Device] = []

    def device(name: str, broker: Mosquitto | int, **settings: Any) -> Device:
        quick = {"keepalive_s": 5, "reconnect_max_s": 0.5, "will_delay_s": 0} | settings.pop("broker", {})
        settings = {"broker": quick, **settings}
        made.append(
            Device(name, broker=broker, registry_url=server.url, root=registry.root, settings=settings)
        )
        return made[-1].start("run")

    yield device
    for each in made:
        print(each.log[-4000:])
        each.close()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path, port=free_port()) as running:
        yield running


@pytest.fixture
def operator(broker: Mosquitto, name: str, registry: RegistryFolder) -> Iterator[Operator]:
    with Operator(broker.host, broker.port, TENANT, name, registry.operator_key) as running:
        yield running


def ready(operator: Operator) -> None:
    """The device knows the operators' keys and has accepted an order."""
    operator.wait_online()
    operator.desire()
    operator.wait(lambda: operator.state and operator.state.generation == operator.generation, "acceptance")


def names(operator: Operator, topic: str) -> set[tuple[str, int]]:
    return {(r.epoch, r.seq) for r in operator.records(topic)}


# the broker dies


@pytest.mark.thorough
def test_a_broker_killed_with_messages_in_flight(
    make: Make, broker: Mosquitto, operator: Operator, name: str, cases: Cases
) -> None:
    device = make(name, broker, telemetry={"interval_s": 0.05, "resend_s": 1.0, "backlog_rows_per_s": 500})
    operator.wait_online()
    for _ in range(4):
        operator.wait(lambda: len(names(operator, operator.topics.telemetry)) >= 5, "telemetry")
        broker.kill()
        cases.add("broker: messages in flight", "kill -9")
        time.sleep(0.2)
        broker.start()
    last_session = operator.wait_online().session
    operator.wait(lambda: operator.presence and operator.presence.session >= last_session, "presence")
    # What it retained is gone with it; the device says it anew.
    with Operator(broker.host, broker.port, TENANT, name) as late:
        late.wait(lambda: late.presence and late.presence.status == "online", "the presence")
        late.wait(lambda: late.last(late.topics.birth, wire.Birth), "the birth")
        late.wait(lambda: late.state, "the state")

    def whole() -> bool:
        found = names(operator, operator.topics.telemetry)
        return len(found) > 40 and {seq for _, seq in found} == set(range(1, len(found) + 1))

    operator.wait(whole, "every row")
    assert device.process is not None
    assert device.process.poll() is None


def test_an_order_that_the_broker_forgot_is_not_forgotten_by_the_device(
    make: Make, broker: Mosquitto, operator: Operator, name: str, registry: RegistryFolder, cases: Cases
) -> None:
    make(name, broker)
    ready(operator)
    broker.kill()
    cases.add("broker: retained desired state", "lost")
    broker.start()
    with Operator(broker.host, broker.port, TENANT, name, registry.operator_key) as late:
        late.wait_online()
        assert late.command("status").data["state"]["generation"] == operator.generation


# refusals


def test_rows_that_the_acl_refuses_wait_until_it_is_mended(
    make: Make, name: str, registry: RegistryFolder, tmp_path: Path, cases: Cases
) -> None:
    acl = tmp_path / "acl"
    acl.write_text("topic read #\ntopic write edge/v1/tests/+/up/tel\n")
    acl.chmod(0o644)
    with Mosquitto(tmp_path, extra=f"acl_file {acl}") as broker:
        device = make(name, broker, telemetry={"interval_s": 0.2, "resend_s": 1.0})
        with Operator(broker.host, broker.port, TENANT, name, registry.operator_key) as operator:
            operator.wait(lambda: operator.records(operator.topics.telemetry), "telemetry, which is allowed")
            device.layout.rejected.write_bytes(b"damaged")  # makes an event at the next start
            device.kill()
            device.start("run")
            wait_for(lambda: "reason code 0x87" in device.log, "the refusal, told")
            cases.add("broker: PUBACK of an event", "0x87")
            assert operator.records(operator.topics.event) == []
            acl.write_text("topic readwrite #\n")
            broker.reload()
            operator.wait(lambda: operator.events("storage"), "the event that was refused")
            assert len(names(operator, operator.topics.event)) == len(operator.events())


@pytest.mark.thorough
@pytest.mark.parametrize("code", [QUOTA, NOT_AUTHORIZED, 0x80, 0x83])
def test_refused_rows_come_again_and_the_broker_is_not_hammered(
    make: Make, name: str, cases: Cases, code: int
) -> None:
    refusing = True

    def answer(p: Published) -> int:
        return code if refusing and p.topic.endswith(("/tel", "/event")) else 0

    with BrokerDouble(answer) as broker:
        make(name, broker.port, telemetry={"interval_s": 0.1, "resend_s": 0.5})
        topic = wire.Topics(TENANT, name).telemetry
        wait_for(lambda: len(broker.on(topic)) >= 3, "a few attempts")
        cases.add("broker: PUBACK", f"0x{code:02x}")
        begun_s, before = time.monotonic(), len(broker.on(topic))
        time.sleep(3.0)
        attempts = len(broker.on(topic)) - before
        assert attempts <= 1 + (time.monotonic() - begun_s) / 0.5  # of 30 rows that wait by now
        refusing = False
        wait_for(lambda: _whole([p.payload for p in broker.on(topic)], 30), "all rows, from the first on")


def _whole(payloads: list[bytes], count: int) -> bool:
    seqs = {wire.decode(payload, wire.Record).seq for payload in payloads}
    return len(seqs) >= count and seqs == set(range(1, len(seqs) + 1))


@pytest.mark.thorough
def test_nobody_listens(make: Make, broker: Mosquitto, name: str, cases: Cases) -> None:
    """mosquitto says 0x10: rows are kept, few are tried, and all come to whoever subscribes later."""
    make(name, broker, telemetry={"interval_s": 0.1, "resend_s": 1.0, "backlog_rows_per_s": 500})
    time.sleep(3)
    cases.add("broker: PUBACK", "0x10")
    assert broker.log.count(f"Received PUBLISH from {name}") < 25
    with Operator(broker.host, broker.port, TENANT, name) as operator:

        def whole() -> bool:
            found = {seq for _, seq in names(operator, operator.topics.telemetry)}
            return len(found) > 25 and found == set(range(1, len(found) + 1))

        operator.wait(whole, "every row")


# silence


@pytest.mark.thorough
def test_a_broker_that_answers_pings_and_no_publications(make: Make, name: str, cases: Cases) -> None:
    with BrokerDouble(lambda p: None if p.topic.endswith("/tel") else 0) as broker:
        device = make(name, broker.port, telemetry={"interval_s": 0.3})
        topics = wire.Topics(TENANT, name)
        wait_for(lambda: broker.on(topics.telemetry), "telemetry")
        cases.add("broker: PUBACK", "never")
        told = wait_for(
            lambda: [p for p in broker.on(topics.event) if b"link_stalled" in p.payload],
            "the event",
            timeout_s=25,
        )
        assert b"no answer to a publication for 1" in told[0].payload
        assert broker.connects >= 2
        assert "was made anew (1)" in device.log
        broker.code = lambda _: 0
        wait_for(lambda: _whole([p.payload for p in broker.on(topics.telemetry)], 10), "every row")


# what comes twice, late or from before


def test_duplicates_of_a_command_are_answered_alike_and_done_once(
    make: Make, broker: Mosquitto, operator: Operator, name: str, cases: Cases
) -> None:
    make(name, broker)
    ready(operator)
    first = operator.command("status", id_="the-same")
    for _ in range(3):
        assert operator.command("status", id_="the-same") == first
        cases.add("broker: command", "duplicate")


@pytest.mark.thorough
def test_duplicates_of_acknowledgements_and_of_others(
    make: Make, broker: Mosquitto, operator: Operator, name: str, cases: Cases
) -> None:
    make(name, broker, telemetry={"interval_s": 0.1})
    rows = operator.wait(lambda: operator.records(operator.topics.telemetry), "a row")
    for seq in (1, 1, 0, 1):
        operator.acknowledge("tel", rows[0].epoch, seq)
    operator.acknowledge("event", rows[0].epoch, 1 << 50)
    operator.acknowledge("tel", "of-another", 1 << 50)
    cases.add("broker: acknowledgement", "duplicate")
    seen = len(operator.on(operator.topics.telemetry))
    operator.wait(lambda: len(operator.on(operator.topics.telemetry)) > seen + 10, "more rows")
    assert [r.seq for r in operator.records(operator.topics.telemetry)].count(1) == 1


def test_a_stale_desired_state(
    make: Make, broker: Mosquitto, operator: Operator, name: str, cases: Cases
) -> None:
    """A broker that was restored from an old image retains the order of then."""
    device = make(name, broker)
    ready(operator)
    old = operator.signed_desired()
    operator.desire()
    operator.wait(lambda: operator.state and operator.state.generation == 2, "the second generation")
    operator.publish(operator.topics.desired, old, retain=True)
    cases.add("broker: desired state", "stale")
    operator.wait(lambda: operator.state and "stale_generation" in operator.state.refused, "the refusal")
    device.kill()
    device.start("run")
    operator.wait(lambda: len(operator.events("refused")) >= 2, "the refusal by the next process")
    assert operator.state is not None
    assert operator.state.generation == 2
    operator.desire()
    operator.wait(lambda: operator.state and operator.state.generation == 3, "the next order")
    assert operator.state.refused == ""


def test_the_will_of_an_old_session_after_a_new_one(
    make: Make, broker: Mosquitto, operator: Operator, name: str, cases: Cases
) -> None:
    make(name, broker)
    session = operator.wait_online().session
    late = wire.Presence(1, "offline", session - 1, time.time_ns() // 1_000_000)
    operator.publish(operator.topics.presence, canonical.to_bytes(late), retain=True)
    cases.add("broker: will", "of an old session")
    command = [sys.executable, "-c", "from fleet.cli import main; main()", "devices", "--json"]
    where = ["--broker", broker.address, "--tenant", TENANT, "--wait-s", "2"]
    done = subprocess.run([*command, *where], capture_output=True, text=True, timeout=60, check=True)
    (found,) = json.loads(done.stdout)["devices"]
    assert (found["device"], found["online"], found["session"]) == (name, True, session)


# bounds


@pytest.mark.thorough
def test_a_full_session_queue_hides_no_order(
    make: Make, name: str, registry: RegistryFolder, tmp_path: Path, cases: Cases
) -> None:
    """What came while the device was away fills its queue at the broker; the newest is dropped there."""
    with (
        Mosquitto(tmp_path, extra="max_queued_messages 20\nmax_inflight_messages 5") as broker,
        Operator(broker.host, broker.port, TENANT, name, registry.operator_key) as operator,
    ):
        device = make(name, broker)
        ready(operator)
        device.kill()
        for _ in range(100):
            operator.publish(operator.topics.command, b"garbage")
        assert "dropped" in broker.log.lower() or "queue" in broker.log.lower()
        generation = operator.generation + 1
        operator.desire()
        cases.add("broker: session queue", "full")
        device.start("run")
        operator.wait(
            lambda: operator.state and operator.state.generation == generation, "the order", timeout_s=25
        )


@pytest.mark.parametrize(
    "where", ["desired", *(pytest.param(w, marks=pytest.mark.thorough) for w in ("command", "ack"))]
)
def test_ten_thousand_garbage_messages(
    make: Make, broker: Mosquitto, operator: Operator, name: str, cases: Cases, where: str
) -> None:
    device = make(name, broker, telemetry={"interval_s": 0.5})
    ready(operator)
    assert device.process is not None
    process = psutil.Process(device.process.pid)
    cpu_s, memory = sum(process.cpu_times()[:2]), process.memory_info().rss
    flood(operator, getattr(operator.topics, where), 10_000)
    cases.add(f"broker: {where}", "10,000 garbage messages")
    assert operator.command("status", timeout_s=60).ok
    used_s = sum(process.cpu_times()[:2]) - cpu_s
    assert used_s < 15, f"{used_s:.1f} s of CPU for 10,000 messages"
    assert process.memory_info().rss - memory < 30 << 20
    told = [e for e in operator.events("refused") if e.reason is Reason.MESSAGE_MALFORMED]
    assert 1 <= len(told) <= 80
    seen = len(operator.on(operator.topics.telemetry))
    operator.wait(lambda: len(operator.on(operator.topics.telemetry)) > seen, "telemetry goes on")


def flood(operator: Operator, topic: str, count: int) -> None:
    """As fast as the broker takes them, each different."""
    infos = [operator._client.publish(topic, b'{"n": %d, "x": [' % i, 1) for i in range(count)]
    infos[-1].wait_for_publish(60)
    assert infos[-1].is_published()


# two of them


@pytest.mark.thorough
def test_two_devices_with_one_id_are_named(
    make: Make, broker: Mosquitto, operator: Operator, name: str, cases: Cases
) -> None:
    """mosquitto 2.0.11 throws the older one out without a word, so it is told from the pattern."""
    first = make(name, broker)
    operator.wait_online()
    second = make(name, broker)
    cases.add("broker: session", "taken over without a word")
    told = operator.wait(
        lambda: [e for e in operator.events("link") if e.reason is Reason.DUPLICATE_DEVICE], "the event", 40
    )
    assert f"perhaps another client connects as '{name}'" in told[0].detail
    assert "two devices may have one id" in first.log + second.log


def test_a_broker_that_says_that_a_session_was_taken_over(make: Make, name: str, cases: Cases) -> None:
    with BrokerDouble() as broker:
        device = make(name, broker.port)
        topics = wire.Topics(TENANT, name)
        wait_for(lambda: broker.on(topics.birth), "the device")
        broker.disconnect(TAKEN_OVER)
        cases.add("broker: session", "taken over (0x8e)")
        told = wait_for(
            lambda: [p for p in broker.on(topics.event) if b"duplicate_device" in p.payload], "the event"
        )
        assert f"another client connected to the broker as '{name}'".encode() in told[0].payload
        for births in (2, 3, 4):
            wait_for(lambda n=births: len(broker.on(topics.birth)) == n, "the device again")  # type: ignore[misc]
            broker.disconnect(TAKEN_OVER)
        wait_for(lambda: len(broker.on(topics.birth)) == 5, "the device again")
        assert device.log.count("two devices may have one id") == 2  # the log and its event, once


# clocks


@pytest.mark.parametrize(
    ("year", "step_ms"), [("1970", -1_790_000_000_000), ("+10 years", 3650 * 86_400_000)]
)
def test_steps_of_the_wall_clock_delay_and_expire_nothing(
    tmp_path: Path, cases: Cases, year: str, step_ms: int
) -> None:
    with BrokerDouble() as broker:
        device = LinkedDevice(broker.port, tmp_path, resend_s=0.3)
        topics = wire.Topics("acme", "x")
        device.until(lambda: broker.on(topics.birth), "the connection")
        device.outbox.put("event", {"n": 1}, priority=EVENT, now_ms=mono_ms(), life_s=60)
        device.link.say_state(wire.State(1, 3, True, [], [], device.wall_ms))
        device.until(lambda: broker.on(topics.event), "the row")
        device.wall_ms += step_ms
        cases.add("outbox timers", f"clock {year}")
        device.until(lambda: len(broker.on(topics.event)) >= 3, "the row again and again")
        device.link.say_state(wire.State(1, 4, True, [], [], device.wall_ms))
        device.until(lambda: len(broker.on(topics.state)) >= 2, "the new state")
        assert device.outbox.depth() == 1
        device.close()
