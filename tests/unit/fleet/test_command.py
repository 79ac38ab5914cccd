"""`edge-fleet command`: signed, answered on its own topic, matched by correlation data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from click.testing import Result
from msgspec.structs import replace

from edge_contract import wire
from edge_contract.errors import InputRejected, Reason
from fleet import cli
from fleet.commanding import parse_args
from tests.support.broker import Mosquitto
from tests.unit.fleet import samples
from tests.unit.fleet.device_double import Device, now_ms

Run = Callable[..., Result]


@pytest.fixture
def where(registry: Path, mosquitto: Mosquitto, tenant: str) -> tuple[object, ...]:
    keys = registry.parent / "keys"
    return ("--device", "a", "--keys", keys, "--broker", mosquitto.address, "--tenant", tenant)


@pytest.fixture
def device(mosquitto: Mosquitto, tenant: str, operators: wire.Operators) -> Device:
    return Device(mosquitto.address, tenant, "a", operators)


def test_the_commands_are_the_contracts() -> None:
    assert set(cli.COMMANDS) == set(get_args(wire.CommandName))


def test_a_command_and_its_answer(run: Run, where: tuple[object, ...], device: Device) -> None:
    with device:
        result = run("command", "rollback", "--arg", "model=fashion", "--arg", "n=3", *where, "--json")
    answer = samples.json_of(result)
    (asked,) = device.commands
    assert (answer["ok"], answer["id"]) == (True, asked.id)
    assert answer["data"] == {"args": {"model": "fashion", "n": 3}}
    assert (asked.name, asked.args) == ("rollback", {"model": "fashion", "n": 3})
    assert 0 < asked.expires_ms - asked.issued_ms <= 60_000


def test_a_no_of_the_device_is_1_and_one_line(run: Run, where: tuple[object, ...], device: Device) -> None:
    device.answer = lambda c: wire.Result(
        1, c.id, False, Reason.NO_PREVIOUS, "nothing before \x1b[31m1.0", "deploy one", now_ms()
    )
    with device:
        result = run("command", "rollback", "--arg", "model=fashion", *where, code=1)
    assert result.stdout == "a: nothing before  [31m1.0 [no_previous] → deploy one\n"


def test_the_answer_to_another_command_is_not_taken(
    run: Run, where: tuple[object, ...], device: Device, refused: Callable[..., str]
) -> None:
    device.correlate = lambda _: b"something else"
    with device:
        line = refused("command", "status", *where, "--timeout-s", 1, code=5, reason="deadline_exceeded")
    assert "no answer to status within 1 s" in line
    assert len(device.commands) == 1


def test_a_device_that_was_away_does_not_act_on_it_later(
    run: Run, where: tuple[object, ...], device: Device, refused: Callable[..., str]
) -> None:
    refused("command", "rollback", *where, "--timeout-s", 1, code=5, reason="deadline_exceeded")
    with device:
        run("command", "status", *where)
    assert [c.name for c in device.commands] == ["status"]


def test_a_refusal_is_told_at_once(
    where: tuple[object, ...], device: Device, refused: Callable[..., str], operators: wire.Operators
) -> None:
    device.operators = replace(operators, keys=[wire.OperatorKey("0" * 64, "another")])
    with device:
        device.say_raw(device.topics.event, b"no record", retain=False)
        line = refused("command", "status", *where, "--timeout-s", 60, code=8, reason="unsigned")
    assert "a refused the command: no signature by a trusted operator key [unsigned] → try again in" in line
    assert "keys list --check" in line


def test_the_refusal_of_another_command_is_not_this_ones(
    where: tuple[object, ...], device: Device, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        device, "_on_command", lambda _: device._refuse("command 0: no [expired] → x", Reason.EXPIRED)
    )
    with device:
        refused("command", "status", *where, "--timeout-s", 2, code=5, reason="deadline_exceeded")


def test_a_garbled_answer(
    where: tuple[object, ...], device: Device, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    device.raw_answer = b'{"schema":1}'
    with device:
        refused("command", "status", *where, code=8, reason="message_malformed")


def test_arguments() -> None:
    parsed = parse_args(("a=1", "b=1.5", "c=true", "d=x=y", "e=", "f=1.0.0", "g=false"))
    assert parsed == {"a": 1, "b": 1.5, "c": True, "d": "x=y", "e": "", "f": "1.0.0", "g": False}
    for bad in (("a",), ("=1",), ("a=1", "a=2")):
        with pytest.raises(InputRejected):
            parse_args(bad)


def test_bad_input(run: Run, where: tuple[object, ...], refused: Callable[..., str], tmp_path: Path) -> None:
    run("command", "explode", *where, code=2)
    refused("command", "status", "--arg", "x", *where, code=2, reason="bad_input")
    line = refused("command", "status", "--device", "a", "--keys", tmp_path, code=2, reason="bad_input")
    assert "operator.pem" in line
