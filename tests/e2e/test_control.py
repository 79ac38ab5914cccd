"""The control process and its broker: presence, state, orders it must not follow, commands, telemetry.

`edge-agent run` alone, so that these tests also show it living without an inference process.
"""

from __future__ import annotations

import json
import sqlite3
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_contract import canonical, wire
from edge_contract.canonical import sha256_hex
from edge_contract.errors import Reason
from tests.e2e.conftest import MakeSite, Site
from tests.support.broker import Mosquitto, free_port
from tests.support.models import BundleOnDisk, make_bundle
from tests.support.operator import Operator, now_ms
from tests.support.waiting import wait_for

STRANGER = Ed25519PrivateKey.generate()


@pytest.fixture(scope="module")
def site(make_module_site: MakeSite) -> Site:
    site = make_module_site(start="run")
    site.operator.desire()  # an empty set: from here on it knows the operators' keys and has a generation
    site.operator.wait(lambda: site.operator.state and site.state.generation == 1, "the first generation")
    return site


@pytest.fixture
def operator(site: Site) -> Operator:
    return site.operator


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> BundleOnDisk:
    return make_bundle(tmp_path_factory.mktemp("bundle"), "nobody")


# presence, birth, state


def test_it_introduces_itself(site: Site, operator: Operator, mosquitto: Mosquitto) -> None:
    presence = operator.wait_online()
    with Operator(mosquitto.host, mosquitto.port, operator.tenant, operator.device) as late:
        birth = late.wait(lambda: late.last(late.topics.birth, wire.Birth), "the birth")
        assert birth is not None
        assert birth.session == presence.session
        assert birth.facts.cores >= 1
        assert "onnxruntime" in birth.facts.runtimes
        assert "cpu_percent" in birth.metrics
        state = late.wait(lambda: late.state, "the state")
        assert state is not None
        assert (state.serving, state.models) == (False, [])
        assert {h.retained for h in late.heard if h.topic != late.topics.telemetry} == {True}


def test_its_will_speaks_when_it_is_killed_and_a_late_will_can_be_told(make_site: MakeSite) -> None:
    site = make_site(start="run")
    device, operator = site.device, site.operator
    first = operator.wait_online()
    killed_s = time.monotonic()
    device.kill()
    operator.wait(lambda: operator.presence and operator.presence.status == "offline", "the will")
    assert operator.presence is not None
    assert operator.presence.session == first.session
    assert operator.on(operator.topics.presence)[-1].at_s - killed_s >= 0.8  # the configured delay is 1 s
    device.start("run")
    assert operator.wait_online().session > first.session


def test_a_restart_within_the_delay_is_no_absence(make_site: MakeSite) -> None:
    site = make_site(start="run", broker_settings={"will_delay_s": 4})
    operator = site.operator
    first = operator.wait_online()
    site.device.kill()
    site.device.start("run")
    operator.wait(lambda: operator.presence and operator.presence.session > first.session, "the next session")
    statuses = [wire.decode(h.payload, wire.Presence).status for h in operator.on(operator.topics.presence)]
    assert statuses == ["online", "online"]


def test_a_stop_says_goodbye_and_ends_well(make_site: MakeSite) -> None:
    site = make_site(start="run")
    session = site.operator.wait_online().session
    begun_s = time.monotonic()
    assert site.device.stop() == 0
    assert time.monotonic() - begun_s < 3.0
    site.operator.wait(
        lambda: site.operator.presence == wire.Presence(1, "offline", session, site.operator.presence.at_ms),
        "the farewell",
    )
    assert "Traceback" not in site.device.log


def test_a_broker_that_comes_later_and_restarts(make_site: MakeSite, tmp_path: Path) -> None:
    broker = Mosquitto(tmp_path, port=free_port())
    site = make_site(start="", broker=broker)
    site.device.start("run")
    wait_for(lambda: "not connected to the broker" in site.device.log, "a vain attempt")
    assert site.device.process is not None
    assert site.device.process.poll() is None
    assert site.device.status()["control"] is True
    # Before it has fetched the operators' keys it takes orders from nobody.
    keys = site.device.layout.trust / "operators.json"
    wait_for(keys.exists, "the operators' keys")
    broker.start()
    try:
        for _ in range(2):
            with Operator(
                broker.host, broker.port, site.operator.tenant, site.device.name, site.registry.operator_key
            ) as operator:
                operator.wait_online()
                operator.wait(lambda o=operator: o.state, "the state")  # type: ignore[misc]
                assert operator.command("status").ok
            broker.kill()
            broker.start()
    finally:
        site.device.stop()
        broker.stop()


# orders it must not follow

Forge = Callable[[Operator, BundleOnDisk], bytes]
FORGED: dict[str, tuple[Reason, Forge]] = {
    "garbage": (Reason.MESSAGE_MALFORMED, lambda o, b: b"\x00 garbage"),
    "not an envelope": (Reason.MESSAGE_MALFORMED, lambda o, b: b'{"models": []}'),
    "too large": (Reason.MESSAGE_MALFORMED, lambda o, b: b"[" + b"1," * 133_000 + b"1]"),
    "unsigned": (Reason.UNSIGNED, lambda o, b: unsigned(o.signed_desired(b, generation=50))),
    "signed by a stranger": (Reason.UNSIGNED, lambda o, b: o.signed_desired(b, generation=50, key=STRANGER)),
    "altered": (Reason.SIGNATURE_INVALID, lambda o, b: altered(o.signed_desired(b, generation=50))),
    "for another device": (
        Reason.WRONG_AUDIENCE,
        lambda o, b: o.signed_desired(b, generation=50, device="other"),
    ),
    "for another tenant": (
        Reason.WRONG_AUDIENCE,
        lambda o, b: o.signed_desired(b, generation=50, tenant="other"),
    ),
    "expired": (
        Reason.EXPIRED,
        lambda o, b: o.signed_desired(b, generation=50, expires_ms=now_ms() - 1000),
    ),
    "older": (Reason.STALE_GENERATION, lambda o, b: o.signed_desired(b, generation=1)),
    "unknown key inside": (
        Reason.MESSAGE_MALFORMED,
        lambda o, b: o.signed_desired(b, generation=50, mood="good"),
    ),
    "a model twice": (Reason.MESSAGE_MALFORMED, lambda o, b: o.signed_desired(b, b, generation=50)),
    "a command": (Reason.MESSAGE_MALFORMED, lambda o, b: o.signed_command("status", "id", {})),
}


def unsigned(envelope: bytes) -> bytes:
    return canonical.to_bytes(json.loads(envelope) | {"signatures": []})


def altered(envelope: bytes) -> bytes:
    document = json.loads(envelope)
    payload = document["payload"]
    document["payload"] = payload[:-8] + ("A" if payload[-8] != "A" else "B") + payload[-7:]
    return canonical.to_bytes(document)


@pytest.fixture(scope="module")
def forged(site: Site, bundle: BundleOnDisk) -> dict[str, bytes]:
    site.operator.desire()
    site.operator.wait(lambda: site.state.generation == 2, "the second generation")
    return {what: forge(site.operator, bundle) for what, (_, forge) in FORGED.items()}


@pytest.mark.parametrize("what", FORGED)
def test_an_order_that_must_not_be_followed_is_refused_and_told(
    operator: Operator, site: Site, forged: dict[str, bytes], what: str
) -> None:
    reason, _ = FORGED[what]
    sha256 = sha256_hex(forged[what])
    operator.publish(operator.topics.desired, forged[what], retain=True)
    operator.wait(lambda: site.state.refused_sha256 == sha256, "the refusal")
    assert f"[{reason.value}] →" in site.state.refused
    assert (site.state.generation, site.state.models) == (2, [])
    operator.wait(
        lambda: [e for e in operator.events("refused") if e.reason is reason], f"the event of {what}"
    )


def test_a_forged_order_that_stays_is_told_once(operator: Operator, site: Site, bundle: BundleOnDisk) -> None:
    """It is looked at again whenever the keys were refreshed; that must not become a stream of events."""
    forged_ = operator.signed_desired(bundle, generation=51, key=STRANGER)
    before = len([e for e in operator.events("refused") if e.reason is Reason.UNSIGNED])
    operator.publish(operator.topics.desired, forged_, retain=True)
    operator.wait(lambda: site.state.refused_sha256 == sha256_hex(forged_), "the refusal")
    site.device.kill()
    site.device.start("run")
    operator.wait(lambda: site.state.refused_sha256 == sha256_hex(forged_), "the refusal again")
    for _ in range(3):
        operator.publish(operator.topics.desired, forged_, retain=True)
    time.sleep(0.5)
    told = [e for e in operator.events("refused") if e.reason is Reason.UNSIGNED]
    assert len(told) - before <= 2  # once by each process


def test_a_good_order_clears_the_refusal(operator: Operator, site: Site) -> None:
    operator.publish(operator.topics.desired, b"garbage", retain=True)
    operator.wait(lambda: site.state.refused, "the refusal")
    operator.desire()
    operator.wait(lambda: site.state.generation == operator.generation, "the next generation")
    assert (site.state.refused, site.state.refused_sha256) == ("", "")


def test_an_order_that_was_followed_may_expire(operator: Operator, site: Site) -> None:
    """It comes again with every connection for as long as it is retained."""
    operator.generation += 1
    order = operator.signed_desired(generation=operator.generation, expires_ms=now_ms() + 2000)
    operator.publish(operator.topics.desired, order, retain=True)
    operator.wait(lambda: site.state.generation == operator.generation, "its acceptance")
    time.sleep(2.1)
    operator.publish(operator.topics.desired, order, retain=True)
    refused = len(operator.events("refused"))
    assert operator.command("status").data["state"]["refused"] == ""
    assert len(operator.events("refused")) == refused


def test_taking_the_order_away_changes_nothing(operator: Operator, site: Site) -> None:
    generation = site.state.generation
    operator.publish(operator.topics.desired, b"", retain=True)
    assert operator.command("status").data["state"]["generation"] == generation


# commands


def test_commands_are_answered_where_asked_and_in_the_common_place(operator: Operator, site: Site) -> None:
    result = operator.command("status")
    assert (result.ok, result.reason) == (True, Reason.OK)
    assert result.data["state"]["generation"] == site.state.generation
    assert result.data["facts"]["cores"] >= 1
    id_ = uuid.uuid4().hex
    operator.publish(
        operator.topics.command,
        operator.signed_command("status", id_, {}),
        response_topic="edge/v1/tests/other/down/desired",
        correlation=b"c",
    )
    operator.wait(lambda: operator.on(operator.topics.result), "the answer")
    heard = operator.on(operator.topics.result)[-1]
    assert (json.loads(heard.payload)["id"], heard.correlation) == (id_, b"c")


def test_the_same_command_again_gets_the_same_answer_also_after_a_kill(
    operator: Operator, site: Site
) -> None:
    id_ = uuid.uuid4().hex
    first = operator.command("status", id_=id_)
    site.device.kill()
    site.device.start("run")
    assert operator.command("status", id_=id_) == first
    assert operator.command("status").at_ms > first.at_ms


BAD_COMMANDS: dict[str, tuple[Reason, Callable[[Operator], bytes]]] = {
    "garbage": (Reason.MESSAGE_MALFORMED, lambda o: b"\xff\xfe"),
    "by a stranger": (Reason.UNSIGNED, lambda o: o.signed_command("rollback", "x1", {}, key=STRANGER)),
    "for another": (Reason.WRONG_AUDIENCE, lambda o: o.signed_command("status", "x2", {}, device="other")),
    "expired": (Reason.EXPIRED, lambda o: o.signed_command("status", "x3", {}, expires_ms=now_ms() - 1)),
    "unknown": (Reason.MESSAGE_MALFORMED, lambda o: o.signed_command("format-disk", "x4", {})),
    "bad id": (Reason.MESSAGE_MALFORMED, lambda o: o.signed_command("status", "../../x", {})),
    "a desired state": (Reason.MESSAGE_MALFORMED, lambda o: o.signed_desired(generation=99)),
}


def test_bad_commands_are_told_and_not_answered(operator: Operator, site: Site) -> None:
    answers = len([h for h in operator.heard if h.topic.startswith(operator.topics.result)])
    before = len(operator.events("refused"))
    bad = [make(operator) for _, make in BAD_COMMANDS.values()]
    for command in bad:
        operator.publish(operator.topics.command, command, response_topic=operator.topics.result)
    operator.wait(lambda: len(operator.events("refused")) == before + len(BAD_COMMANDS), "all events")
    told = [e.reason for e in operator.events("refused")[before:]]
    assert sorted(told) == sorted(reason for reason, _ in BAD_COMMANDS.values())
    details = [e.detail.partition(": ")[0] for e in operator.events("refused")[before:]]
    # By which the sender knows it.
    assert sorted(details) == sorted(wire.label_of(command) for command in bad)
    assert len([h for h in operator.heard if h.topic.startswith(operator.topics.result)]) == answers
    assert site.state.refused == ""  # that is for desired states


# telemetry and the outbox


def test_telemetry_comes_regularly_and_only_the_acknowledged_is_forgotten(
    operator: Operator, site: Site
) -> None:
    topic = operator.topics.telemetry
    operator.wait(lambda: len({(r.epoch, r.seq) for r in operator.records(topic)}) >= 3, "three windows")
    rows = operator.records(topic)
    window = canonical.from_builtins(rows[-1].payload, wire.Telemetry)
    assert 0.5 < window.window_s < 3.0
    assert window.models == []
    assert window.device["memory_percent"] is not None
    assert 0 < window.device["memory_percent"] < 100
    newest: dict[str, int] = {}  # in each epoch: one for each start of the process
    for row in rows:
        newest[row.epoch] = max(newest.get(row.epoch, 0), row.seq)
    for epoch, seq in newest.items():
        operator.acknowledge("tel", epoch, seq)
    operator.acknowledge("tel", "another-epoch", 1 << 40)
    acknowledged_s = time.monotonic() + 0.3
    operator.wait(lambda: [h for h in operator.on(topic) if h.at_s > acknowledged_s + 2.5], "later windows")
    again = [wire.decode(h.payload, wire.Record) for h in operator.on(topic) if h.at_s > acknowledged_s]
    assert [r for r in again if r.seq <= newest.get(r.epoch, 0)] == []
    assert {r.lost for r in again} == {0}


def _stored_events(outbox: Path, text: str) -> int:
    with sqlite3.connect(f"file:{outbox}?mode=ro", uri=True) as db:
        query = "SELECT COUNT(*) FROM rows WHERE stream = 'event' AND instr(payload, ?)"
        (count,) = db.execute(query, (text,)).fetchone()
    db.close()
    return int(count)


def test_events_of_the_time_without_a_broker_arrive_afterwards(make_site: MakeSite, tmp_path: Path) -> None:
    broker = Mosquitto(tmp_path, port=free_port())
    site = make_site(start="", broker=broker)
    broker.start()
    site.device.start("run")
    key = site.registry.operator_key
    address = (broker.host, broker.port, site.operator.tenant, site.device.name, key)
    try:
        with Operator(*address) as operator:
            operator.wait_online()
            broker.kill()
        (site.device.layout.rejected).parent.mkdir(exist_ok=True)
        site.device.kill()
        site.device.layout.rejected.write_bytes(b"damaged")
        site.device.start("run")  # finds the damage while there is nobody to tell
        wait_for(lambda: _stored_events(site.device.layout.outbox, "rejected.json"), "the stored event")
        site.device.kill()
        site.device.start("run")
        broker.start()
        with Operator(*address) as operator:
            found = operator.wait(lambda: operator.events("storage"), "the event of then")
            assert "rejected.json.damaged" in found[0].detail
    finally:
        site.device.stop()
        broker.stop()
