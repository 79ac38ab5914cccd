"""`edge-fleet deploy` against devices that keep the real MQTT seam, on the real mosquitto."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from click.testing import Result
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace

from edge_contract import canonical, dsse, wire
from edge_contract.errors import Reason
from fleet import driver
from fleet.bus import Address, Bus
from tests.support.broker import Mosquitto, free_port
from tests.unit.fleet import samples
from tests.unit.fleet.device_double import Device, commits, now_ms, reverts, stalls

Run = Callable[..., Result]
Refused = Callable[..., str]
Deploy = Callable[..., Result]

SERVES_1 = wire.ModelState("fashion", "idle", version="0.9", digest="9" * 64, outcome="committed", since_ms=1)
DIGITS = wire.ModelState("digits", "idle", version="7", digest="7" * 64, outcome="committed", since_ms=1)


@pytest.fixture
def deploy(run: Run, published: Path, mosquitto: Mosquitto, tenant: str) -> Deploy:
    def invoke(*args: object, code: int = 0) -> Result:
        where = ("--registry", published, "--broker", mosquitto.address, "--tenant", tenant)
        return run("deploy", *args, *where, "--timeout-s", 10, code=code)

    return invoke


@pytest.fixture
def device(
    published: Path, mosquitto: Mosquitto, tenant: str, operators: wire.Operators
) -> Callable[..., Device]:
    def make(name: str, **options: Any) -> Device:
        return Device(mosquitto.address, tenant, name, operators, **options)

    return make


def outcomes(result: Result) -> dict[str, tuple[str, str]]:
    return {d["device"]: (d["outcome"], d["reason"]) for d in samples.json_of(result)["devices"]}


def test_two_devices_commit(deploy: Deploy, device: Callable[..., Device], published: Path) -> None:
    with device("a", models=[SERVES_1, DIGITS], generation=6) as a, device("b") as b:
        result = deploy("fashion@2.0.0", "--device", "a", "--device", "b", "--device", "a", "--json")
    report = samples.json_of(result)
    assert report["ok"]
    assert outcomes(result) == {"a": ("committed", "ok"), "b": ("committed", "ok")}
    assert [d["generation"] for d in report["devices"]] == [7, 1]
    assert [d["serves"] for d in report["devices"]] == ["2.0.0", "2.0.0"]
    ours = wire.DesiredModel("fashion", "2.0.0", samples.reader(published).find("fashion", "2.0.0"))
    assert report["manifest_sha256"] == ours.manifest_sha256
    # The double has verified signature, audience and time. The other model is kept.
    (asked,) = a.desired
    assert asked.models == [wire.DesiredModel("digits", "7", "7" * 64), ours]
    assert [d.models for d in b.desired] == [[ours]]
    assert "a" in result.stderr
    assert "downloading" in result.stderr


def test_a_downgrade_is_allowed_for_this_model_alone(deploy: Deploy, device: Callable[..., Device]) -> None:
    with device("a", models=[DIGITS]) as a:
        deploy("fashion@1.0.0", "--device", "a", "--allow-downgrade")
    (asked,) = a.desired
    assert [(m.name, m.allow_downgrade) for m in asked.models] == [("digits", False), ("fashion", True)]


def test_people_get_lines_and_a_table(deploy: Deploy, device: Callable[..., Device]) -> None:
    with device("a", models=[SERVES_1]):
        text = deploy("fashion@2.0.0", "--device", "a").stdout
    lines = text.splitlines()
    assert any(line.startswith("a ") and line.endswith("s: committed") for line in lines)
    assert lines[-2].split() == [
        "Device",
        "Presence",
        "Serves",
        "Generation",
        "State",
        "Progress",
        "Seconds",
        "Why",
    ]
    assert lines[-1].split()[:5] == ["a", "online", "2.0.0", "1", "committed"]


def test_one_commits_one_reverts_one_is_unknown(
    deploy: Deploy, device: Callable[..., Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "_STATE_WAIT_S", 1.0)
    with device("a"), device("b", script=reverts, models=[SERVES_1]):
        where = ("--device", "a", "--device", "b", "--device", "ghost")
        result = deploy("fashion@2.0.0", *where, "--json", code=3)
    assert outcomes(result) == {
        "a": ("committed", "ok"),
        "b": ("reverted", "error_rate"),
        "ghost": ("no_state", "not_found"),
    }
    ghost = samples.json_of(result)["devices"][2]
    assert "never reported" in ghost["detail"]
    assert samples.json_of(result)["devices"][1]["detail"] == "12 % of requests failed"


def test_the_same_version_again_is_committed_at_once(deploy: Deploy, device: Callable[..., Device]) -> None:
    with device("a") as a:
        deploy("fashion@2.0.0", "--device", "a")
        deploy("fashion@2.0.0", "--device", "a")
        assert [d.generation for d in a.desired] == [1, 2]


def test_a_version_that_failed_before_is_followed_anew(deploy: Deploy, device: Callable[..., Device]) -> None:
    with device("a", script=reverts, models=[SERVES_1]) as a:
        deploy("fashion@2.0.0", "--device", "a", code=3)
        a.script = commits
        assert outcomes(deploy("fashion@2.0.0", "--device", "a", "--json")) == {"a": ("committed", "ok")}


def test_a_device_that_does_not_finish(
    run: Run, published: Path, mosquitto: Mosquitto, tenant: str, device: Callable[..., Device]
) -> None:
    where = ("--registry", published, "--broker", mosquitto.address, "--tenant", tenant)
    with device("a", script=stalls):
        result = run("deploy", "fashion@1.0.0", "--device", "a", *where, "--timeout-s", 1, "--json", code=3)
    assert outcomes(result) == {"a": ("no_answer", "deadline_exceeded")}
    assert "online, last 'downloading'" in samples.json_of(result)["devices"][0]["detail"]


def test_an_offline_device_takes_the_order_when_it_comes_back(
    run: Run, published: Path, mosquitto: Mosquitto, tenant: str, device: Callable[..., Device]
) -> None:
    where = ("--registry", published, "--broker", mosquitto.address, "--tenant", tenant)
    with device("a", models=[DIGITS]):
        pass
    result = run("deploy", "fashion@1.0.0", "--device", "a", *where, "--timeout-s", 1, "--json", code=3)
    assert "the device is offline" in samples.json_of(result)["devices"][0]["detail"]
    # A second order to the sleeper replaces the first and keeps the rest of the set.
    run("deploy", "fashion@2.0.0", "--device", "a", *where, "--timeout-s", 1, code=3)
    with device("a", models=[DIGITS]) as a:
        deadline = time.monotonic() + 5
        while not a.desired and time.monotonic() < deadline:
            time.sleep(0.02)
        (taken,) = a.desired
    assert taken.generation == 2
    assert [(m.name, m.version) for m in taken.models] == [("digits", "7"), ("fashion", "2.0.0")]


def test_an_order_expires_on_the_broker(
    run: Run, published: Path, mosquitto: Mosquitto, tenant: str, device: Callable[..., Device]
) -> None:
    where = ("--registry", published, "--broker", mosquitto.address, "--tenant", tenant)
    with device("a"):
        pass
    run("deploy", "fashion@1.0.0", "--device", "a", *where, "--timeout-s", 1, "--expires-s", 1, code=3)
    deadline = time.monotonic() + 5
    while _retained(mosquitto, wire.Topics(tenant, "a").desired) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _retained(mosquitto, wire.Topics(tenant, "a").desired) == []


def _retained(mosquitto: Mosquitto, topic: str) -> list[tuple[str, bytes]]:
    with Bus(Address(mosquitto.host, mosquitto.port)) as bus:
        return bus.retained([topic], 1)


def test_a_forged_pending_order_is_ignored(deploy: Deploy, device: Callable[..., Device]) -> None:
    """A broker could put any generation there; only an operator's word counts."""
    with device("a") as a:
        forged = wire.Desired(1, a.tenant, "a", 10**9, 0, now_ms() + 10**6, [])
        body = dsse.sign(canonical.to_bytes(forged), wire.DESIRED_TYPE, [Ed25519PrivateKey.generate()])
        a.say_raw(a.topics.desired, body)
        deploy("fashion@2.0.0", "--device", "a")
        assert [d.generation for d in a.desired] == [1]


def test_a_device_that_refuses(deploy: Deploy, device: Callable[..., Device]) -> None:
    """Its clock is far ahead, so the order has expired for it."""
    with device("a") as a:
        a.tenant = "another"
        result = deploy("fashion@2.0.0", "--device", "a", "--json", code=3)
    assert outcomes(result) == {"a": ("refused", "wrong_audience")}


def test_a_refusal_that_was_not_settled_in_time_is_named(
    run: Run, published: Path, mosquitto: Mosquitto, tenant: str, device: Callable[..., Device]
) -> None:
    """It may have been for want of new keys, so the deployment waits for another word; none comes."""
    where = ("--registry", published, "--broker", mosquitto.address, "--tenant", tenant)
    with device("a") as a:
        a.operators = replace(a.operators, keys=[wire.OperatorKey("0" * 64, "another")])
        result = run("deploy", "fashion@1.0.0", "--device", "a", *where, "--timeout-s", 3, "--json", code=3)
    assert outcomes(result) == {"a": ("no_answer", "deadline_exceeded")}
    detail = samples.json_of(result)["devices"][0]["detail"]
    assert "the last trouble it told: [unsigned] no signature by a trusted operator key" in detail


def test_garbled_reports_are_named(deploy: Deploy, mosquitto: Mosquitto, tenant: str) -> None:
    with Bus(Address(mosquitto.host, mosquitto.port)) as bus:
        bus.publish(wire.Topics(tenant, "a").state, b'{"schema":9}', retain=True)
        result = deploy("fashion@2.0.0", "--device", "a", "--json", code=3)
    detail = samples.json_of(result)["devices"][0]["detail"]
    assert "its report cannot be read: state message" in detail


def test_what_a_device_says_is_shown_without_terminal_codes(
    deploy: Deploy, device: Callable[..., Device]
) -> None:
    def nasty(model: wire.DesiredModel, before: wire.ModelState | None) -> Sequence[wire.ModelState]:
        last = reverts(model, before)[-1]
        return [replace(last, detail="\x1b[2J\x07[bold]gone\nreally")]

    with device("a", script=nasty, models=[SERVES_1]):
        text = deploy("fashion@2.0.0", "--device", "a", code=3).stdout
    assert "\x1b" not in text
    assert "[2J [bold]gone really" in text


def test_it_survives_a_restart_of_the_broker(
    run: Run, published: Path, tmp_path: Path, tenant: str, operators: wire.Operators
) -> None:
    with Mosquitto(tmp_path) as broker, Device(broker.address, tenant, "a", operators, script=stalls) as a:
        where = ("--registry", published, "--broker", broker.address, "--tenant", tenant, "--timeout-s", 30)
        results: list[Result] = []
        follow = Thread(
            target=lambda: results.append(run("deploy", "fashion@1.0.0", "--device", "a", *where))
        )
        follow.start()
        deadline = time.monotonic() + 10
        while not a.desired and time.monotonic() < deadline:
            time.sleep(0.02)
        (asked,) = a.desired
        broker.restart()
        assert a.wait_for_broker(10)
        a.report(replace(a.state, models=[commits(asked.models[0], None)[-1]], at_ms=now_ms()))
        follow.join(25)
        assert not follow.is_alive()
        assert [r.exit_code for r in results] == [0]


def test_bad_input(run: Run, refused: Refused, published: Path, mosquitto: Mosquitto, tmp_path: Path) -> None:
    where = ("--registry", published, "--broker", mosquitto.address)
    line = refused("deploy", "fashion@9", "--device", "a", *where, code=2, reason="not_published")
    assert "it has 1.0.0, 2.0.0" in line
    refused("deploy", "fashion", "--device", "a", *where, code=2, reason="bad_input")
    refused("deploy", "fashion@1.0.0", "--device", "+", *where, code=2, reason="bad_input")
    refused("deploy", "fashion@1.0.0", "--device", "a/b", *where, code=2, reason="bad_input")
    line = refused(
        "deploy", "fashion@1.0.0", "--device", "a", *where, "--tenant", "#", code=2, reason="bad_input"
    )
    assert "--tenant" in line
    nowhere = ("--broker", f"127.0.0.1:{free_port()}")
    line = refused(
        *("deploy", "fashion@1.0.0", "--device", "a", "--registry", published, *nowhere),
        code=5,
        reason="broker_unreachable",
    )
    assert "Connection refused" in line
    for broken in ("localhost", "localhost:x", ":1", "localhost:99999"):
        refused("devices", "--broker", broken, code=2, reason="bad_input")
    missing = ("--registry", tmp_path / "none", "--keys", published.parent / "keys")
    refused("deploy", "fashion@1.0.0", "--device", "a", *missing, code=2, reason="bad_input")
    absent = ("--registry", "http://127.0.0.1:9", "--keys", published.parent / "keys")
    refused("deploy", "fashion@1.0.0", "--device", "a", *absent, code=5, reason="registry_unreachable")
    unkept = ("--keys", tmp_path / "nokeys")
    refused("deploy", "fashion@1.0.0", "--device", "a", *where, *unkept, code=2, reason="bad_input")


def test_a_key_that_the_registry_does_not_name_sends_nothing(
    refused: Refused, run: Run, published: Path, mosquitto: Mosquitto, tmp_path: Path
) -> None:
    run("registry", "init", tmp_path / "other", "--keys", tmp_path / "strange")
    (tmp_path / "strange" / "root.json").write_bytes((published / "root.json").read_bytes())
    where = ("--registry", published, "--broker", mosquitto.address, "--keys", tmp_path / "strange")
    refused("deploy", "fashion@1.0.0", "--device", "a", *where, code=2, reason=Reason.UNSIGNED.value)
