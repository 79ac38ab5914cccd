"""The agent and a broker that wants certificates: identity, rights, renewal, and what goes wrong, by name.

mosquitto runs with the files of examples/mosquitto, certificates are those of `edge-fleet certificates`.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import paho.mqtt.client as mqtt
import pytest

from edge_agent.config import Broker
from edge_agent.messaging import tls
from edge_agent.messaging.mailbox import Mailbox
from edge_agent.messaging.mqtt import Connected, Disconnected, MqttClient, Will
from edge_contract import wire
from edge_contract.errors import InputRejected, Reason
from fleet.certificates import Issued
from tests.support.broker import Pki, SecureMosquitto, free_port
from tests.support.device import TENANT, Device
from tests.support.operator import Operator
from tests.support.registry_folder import RegistryFolder
from tests.support.waiting import wait_for


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def broker(pki: Pki, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureMosquitto]:
    with SecureMosquitto(tmp_path_factory.mktemp("broker"), pki, tenant=TENANT) as running:
        yield running


@pytest.fixture
def name() -> str:
    return f"box-{uuid.uuid4().hex[:8]}"


class Line(NamedTuple):
    """A device with its certificate in its own folder, as on a box."""

    device: Device
    operator: Operator
    certificate: Path
    key: Path


def settings(pki: Pki, certificate: Path, key: Path, **more: Any) -> dict[str, Any]:
    files = {"tls_ca": str(pki.ca), "tls_cert": str(certificate), "tls_key": str(key)}
    return {"host": "localhost", **files, **more}


def installed(issued: Issued, folder: Path) -> tuple[Path, Path]:
    """Copied to a device: each file replaced in one step."""
    targets = folder / "device.pem", folder / "device.key"
    for source, target in zip((issued.certificate, issued.key), targets, strict=True):
        shutil.copy(source, f"{target}.new")
        Path(f"{target}.new").rename(target)
    return targets


@pytest.fixture
def make(pki: Pki, broker: SecureMosquitto, registry: RegistryFolder) -> Iterator[Callable[..., Line]]:
    closing: list[Callable[[], object]] = []

    def line(name: str, *, issued: Issued | None = None) -> Line:
        device = Device(
            name, broker=broker.port, registry_url="http://127.0.0.1:9", root=registry.root, settings={}
        )
        closing.append(device.close)
        certificate, key = installed(issued or pki.issue(name), device.folder)
        device.configure(broker=settings(pki, certificate, key))
        staff = pki.issue("operator")
        files = (pki.ca, staff.certificate, staff.key)
        operator = Operator(
            "localhost", broker.port, TENANT, name, registry.operator_key, tls=files
        ).__enter__()
        closing.append(lambda: operator.__exit__(None, None, None))
        return Line(device, operator, certificate, key)

    yield line
    for close in reversed(closing):
        close()


def test_the_whole_conversation_over_mutual_tls(make: Callable[..., Line], name: str) -> None:
    line = make(name)
    device, operator = line.device, line.operator
    operator.publish(operator.topics.desired, b"waits, retained", retain=True)
    device.start("run")
    session = operator.wait_online().session
    operator.wait(lambda: operator.last(operator.topics.birth, wire.Birth), "the birth")
    operator.wait(lambda: operator.state, "the state")
    rows = operator.wait(lambda: operator.records(operator.topics.telemetry), "telemetry")
    operator.acknowledge("tel", rows[0].epoch, rows[0].seq)
    # The garbage of before came down, so reading its own topics is allowed.
    operator.wait(lambda: operator.events("refused"), "the refusal of the retained order")
    # The acknowledgement came down before the next window's telemetry went up.
    operator.wait(
        lambda: operator.records(operator.topics.telemetry)[-1].seq > rows[0].seq + 1, "later telemetry"
    )
    device.kill()
    operator.wait(lambda: operator.presence and operator.presence.status == "offline", "the will")
    assert operator.presence is not None
    assert operator.presence.session == session
    device.start("run")
    assert operator.wait_online().session > session
    operator.wait(
        lambda: [r for r in operator.records(operator.topics.telemetry) if r.epoch != rows[0].epoch],
        "telemetry of the next start",
    )
    known = operator.records(operator.topics.telemetry)
    assert known.count(rows[0]) == 1  # acknowledged, so it did not come again


class Client:
    """Any MQTT client with a certificate, and what the broker told it."""

    def __init__(self, pki: Pki, port: int, name: str, *, client_id: str = "") -> None:
        issued = pki.issue(name)
        self.codes: dict[int, int] = {}
        self.heard: list[str] = []
        self.subscribed = threading.Event()
        self.raw = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2, client_id or f"{name}-x", protocol=mqtt.MQTTv5
        )
        self.raw.tls_set(str(pki.ca), str(issued.certificate), str(issued.key))
        self.raw.on_publish = lambda c, u, mid, reason, p: self.codes.__setitem__(mid, reason.value)
        self.raw.on_message = lambda c, u, m: self.heard.append(m.topic)
        self.raw.on_subscribe = lambda *_: self.subscribed.set()
        self.raw.connect("localhost", port)
        self.raw.loop_start()

    def subscribe(self, *filters: str) -> None:
        self.subscribed.clear()
        self.raw.subscribe([(f, 1) for f in filters])
        assert self.subscribed.wait(10)

    def publish(self, topic: str, payload: bytes = b"x", *, retain: bool = False) -> int:
        """The broker's reason code."""
        mid = self.raw.publish(topic, payload, 1, retain).mid
        wait_for(lambda: mid in self.codes, "the answer")
        return self.codes[mid]

    def close(self) -> None:
        self.raw.disconnect()
        self.raw.loop_stop()


@pytest.fixture
def client(pki: Pki, broker: SecureMosquitto) -> Iterator[Callable[..., Client]]:
    made: list[Client] = []

    def connect(name: str, **options: Any) -> Client:
        made.append(Client(pki, broker.port, name, **options))
        return made[-1]

    yield connect
    for each in made:
        each.close()


_NOT_AUTHORIZED = 0x87


def test_a_device_cannot_speak_for_another(make: Callable[..., Line], client: Callable[..., Client]) -> None:
    victim = make("victim-1").operator
    thief = client("thief-1")
    for topic in (victim.topics.presence, victim.topics.event, victim.topics.state, victim.topics.result):
        assert thief.publish(topic, b"{}", retain=True) == _NOT_AUTHORIZED
    assert thief.publish("edge/v1/other-tenant/thief-1/up/event") == _NOT_AUTHORIZED
    own = wire.Topics(TENANT, "thief-1")
    assert thief.publish(own.event) in (0, 0x10)
    assert thief.publish(own.desired) == _NOT_AUTHORIZED  # nor order itself about
    assert victim.heard == []


def test_a_device_cannot_listen_to_another(make: Callable[..., Line], client: Callable[..., Client]) -> None:
    victim = make("victim-2").operator
    victim.publish(victim.topics.desired, b"for the victim alone", retain=True)
    own = wire.Topics(TENANT, "thief-2")
    staff = client("operator", client_id="staff-2")
    thief = client("thief-2")
    # A SUBACK says nothing about rights, so what counts is what arrives.
    thief.subscribe("#", "edge/v1/#", f"{victim.topics.root}/#", victim.topics.desired, f"{own.root}/down/#")
    for topic in (victim.topics.command, victim.topics.ack, victim.topics.desired, own.command):
        staff.publish(topic)
    wait_for(lambda: own.command in thief.heard, "its own message")
    assert set(thief.heard) == {own.command}


def test_a_device_that_takes_anothers_client_id_gets_none_of_its_rights(
    make: Callable[..., Line], client: Callable[..., Client]
) -> None:
    """It can throw the other out for a moment, which is told; the rights go by the certificate."""
    line = make("victim-3")
    line.device.start("run")
    line.operator.wait_online()
    thief = client("thief-3", client_id="victim-3")
    told = line.operator.wait(
        lambda: [e for e in line.operator.events("link") if e.reason is Reason.DUPLICATE_DEVICE], "the alarm"
    )
    assert "'victim-3'" in told[0].detail
    assert thief.publish(line.operator.topics.event) == _NOT_AUTHORIZED


def test_without_a_certificate_nobody_gets_in(pki: Pki, broker: SecureMosquitto) -> None:
    with pytest.raises(AssertionError):  # it never gets its subscription
        bare = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, "bare", protocol=mqtt.MQTTv5)
        bare.tls_set(str(pki.ca))
        joined = threading.Event()
        bare.on_connect = lambda *_: joined.set()
        try:
            bare.connect("localhost", broker.port)
            bare.loop_start()
        except OSError:
            pass
        try:
            assert joined.wait(1.0)
        finally:
            bare.loop_stop()


def test_the_certificate_of_another_device_is_refused_at_the_start(
    make: Callable[..., Line], pki: Pki, name: str
) -> None:
    line = make(name, issued=pki.issue("somebody-else"))
    line.device.start("run")
    assert line.device.process is not None
    assert line.device.process.wait(20) == 2
    last = line.device.log.strip().splitlines()[-1]
    assert f"is for 'somebody-else', but `device` is '{name}' [bad_config] →" in last
    assert "Traceback" not in line.device.log


def test_a_new_certificate_is_taken_without_a_restart(
    make: Callable[..., Line], pki: Pki, broker: SecureMosquitto, name: str
) -> None:
    line = make(name)
    line.device.start("run")
    first = line.operator.wait_online().session
    assert line.device.process is not None
    pid = line.device.process.pid
    installed(pki.issue(name, days=60), line.device.folder)
    line.operator.wait(
        lambda: line.operator.presence and line.operator.presence.session > first, "the next session"
    )
    statuses = [
        wire.decode(h.payload, wire.Presence).status for h in line.operator.on(line.operator.topics.presence)
    ]
    assert set(statuses) == {"online"}  # in order: no will, no absence
    told = line.operator.wait(lambda: line.operator.events("link"), "the event")
    assert "new certificate, valid until" in told[0].detail
    assert "resumed)" in line.device.log
    assert line.device.pid("run") == pid


def test_half_a_new_certificate_is_not_taken(make: Callable[..., Line], pki: Pki, name: str) -> None:
    line = make(name)
    line.device.start("run")
    first = line.operator.wait_online().session
    new = pki.issue(name)
    shutil.copy(new.certificate, line.certificate)  # the key is still the old one
    told = line.operator.wait(lambda: line.operator.events("link"), "the event")
    assert "new certificate not used" in told[0].detail
    assert line.operator.presence is not None
    assert line.operator.presence.session == first
    shutil.copy(new.key, line.key)
    line.operator.wait(
        lambda: line.operator.presence and line.operator.presence.session > first, "the next session"
    )


# what goes wrong, by name


def client_of(config: Broker, name: str) -> tuple[MqttClient, Mailbox]:
    inbox = Mailbox()
    will = Will(f"edge/v1/{TENANT}/{name}/up/presence", lambda session: b"")
    return MqttClient(config, name, will, [f"edge/v1/{TENANT}/{name}/down/#"], 1, inbox), inbox


def first_word(config: Broker, name: str) -> Connected | Disconnected:
    client, inbox = client_of(config, name)
    client.start()
    try:
        found = inbox.get(timeout=15)
        assert isinstance(found, Connected | Disconnected)
        return found
    finally:
        client.stop()


def config_of(pki: Pki, issued: Issued, port: int, **more: Any) -> Broker:
    return Broker(port=port, reconnect_max_s=0.3, **settings(pki, issued.certificate, issued.key, **more))


def test_a_good_certificate_connects(pki: Pki, broker: SecureMosquitto, name: str) -> None:
    assert isinstance(first_word(config_of(pki, pki.issue(name), broker.port), name), Connected)


def test_an_expired_certificate_of_the_device_is_named(pki: Pki, broker: SecureMosquitto, name: str) -> None:
    word = first_word(config_of(pki, pki.issue(name, days=-1), broker.port), name)
    assert isinstance(word, Disconnected)
    assert "this device's certificate has expired" in word.detail


def test_a_certificate_of_a_ca_that_the_broker_does_not_know_is_named(
    pki: Pki, broker: SecureMosquitto, name: str, tmp_path: Path
) -> None:
    word = first_word(config_of(pki, Pki(tmp_path).issue(name), broker.port), name)
    assert isinstance(word, Disconnected)
    assert "does not know the CA of this device's certificate" in word.detail


def test_no_certificate_where_the_broker_wants_one_is_named(
    pki: Pki, broker: SecureMosquitto, name: str
) -> None:
    config = Broker(port=broker.port, host="localhost", tls_ca=str(pki.ca), reconnect_max_s=0.3)
    word = first_word(config, name)
    assert isinstance(word, Disconnected)
    assert "wants a certificate of this device" in word.detail


def test_a_broker_of_another_ca_is_named(
    pki: Pki, broker: SecureMosquitto, name: str, tmp_path: Path
) -> None:
    stranger = Pki(tmp_path)
    config = config_of(pki, stranger.issue(name), broker.port, tls_ca=str(stranger.ca))
    word = first_word(config, name)
    assert isinstance(word, Disconnected)
    assert "comes from a CA that is not in tls_ca" in word.detail


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"hosts": ("elsewhere.example",)}, "the broker's certificate is for another host name"),
        ({"hosts": ("localhost",), "days": -1}, "the broker's certificate has expired"),
        ({"hosts": ()}, "the broker's certificate is not one for a server (issued without its hosts)"),
    ],
)
def test_a_broker_with_a_wrong_certificate_is_named(
    how: dict[str, Any], said: str, name: str, tmp_path: Path
) -> None:
    pki = Pki(tmp_path / "pki")
    broker = SecureMosquitto(tmp_path, pki, tenant=TENANT)
    (pki.ca.parent / "broker.pem").unlink()  # or its hosts would be taken over
    pki.issue("broker", **how)
    with broker:
        word = first_word(config_of(pki, pki.issue(name), broker.port), name)
    assert isinstance(word, Disconnected)
    assert said in word.detail


def test_a_port_that_speaks_no_tls_is_named(pki: Pki, name: str) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        connection, _ = listener.accept()
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        connection.close()

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    word = first_word(config_of(pki, pki.issue(name), listener.getsockname()[1]), name)
    listener.close()
    assert isinstance(word, Disconnected)
    assert "does not speak TLS" in word.detail


def test_failed_handshakes_leave_no_sockets_behind(
    pki: Pki, broker: SecureMosquitto, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = Pki(tmp_path)
    monkeypatch.setattr("edge_agent.messaging.mqtt._FIRST_PAUSE_S", 0.01)
    files = settings(pki, *stranger.issue(name)[:2], tls_ca=str(stranger.ca))
    client, inbox = client_of(Broker(port=broker.port, reconnect_max_s=0.02, **files), name)
    client.start()
    counts = []
    try:
        for _ in range(55):
            assert isinstance(inbox.get(timeout=15), Disconnected)
            counts.append(len(list(Path("/proc/self/fd").iterdir())))
    finally:
        client.stop()
    assert max(counts[5:]) - min(counts[5:]) <= 6
    assert counts[-1] <= counts[5] + 4


@pytest.mark.parametrize("what", ["tls_ca", "tls_cert", "tls_key"])
def test_files_that_cannot_be_used_end_the_start(pki: Pki, name: str, tmp_path: Path, what: str) -> None:
    issued = pki.issue(name)
    broken = tmp_path / "broken.pem"
    broken.write_text("no PEM")
    config = config_of(pki, issued, free_port(), **{what: str(broken)})
    with pytest.raises(InputRejected, match=r"\[broker\].*broken.pem") as fault:
        client_of(config, name)
    assert fault.value.reason is Reason.BAD_CONFIG


def test_whose_certificate_it_is(pki: Pki, name: str) -> None:
    assert tls.common_name(str(pki.issue(name).certificate)) == name


# the operator


def fleet(pki: Pki, port: int, who: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    issued = pki.issue(who)
    where = ["--broker", f"localhost:{port}", "--tenant", TENANT, "--tls-ca", str(pki.ca)]
    files = ["--tls-cert", str(issued.certificate), "--tls-key", str(issued.key)]
    command = [sys.executable, "-c", "from fleet.cli import main; main()", *arguments, *where, *files]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_edge_fleet_works_with_an_operators_certificate_and_not_with_a_devices(
    make: Callable[..., Line], pki: Pki, broker: SecureMosquitto, name: str, tmp_path: Path
) -> None:
    line = make(name)
    line.device.start("run")
    line.operator.wait_online()
    listed = fleet(pki, broker.port, "operator", "devices", "--json")
    assert name in [d["device"] for d in json.loads(listed.stdout)["devices"]], listed.stderr
    db = str(tmp_path / "fleet.db")
    watched = fleet(pki, broker.port, "operator", "watch", "--json", "--count", "2", "--db", db)
    assert watched.returncode == 0, watched.stderr
    assert '"type": "record"' in watched.stdout
    nothing = fleet(pki, broker.port, name, "devices", "--json", "--wait-s", "1")
    assert json.loads(nothing.stdout)["devices"] == []
