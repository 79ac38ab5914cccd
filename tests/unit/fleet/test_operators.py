"""Two operators have to sign: `deploy` and `command` do it with all keys that they find or are given."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from edge_contract import dsse, wire
from fleet.registry.keys import Keys, signing_keys
from tests.support.broker import Mosquitto
from tests.unit.fleet import samples
from tests.unit.fleet.device_double import Device

Run = Callable[..., Result]
Refused = Callable[..., str]


@pytest.fixture
def two(published: Path, run: Run) -> Path:
    """A registry that names two operators and wants both."""
    run("registry", "keys", "add", published, "operator", "--label", "bob", "--threshold", "2")
    return published


@pytest.fixture
def device(two: Path, mosquitto: Mosquitto, tenant: str) -> Device:
    return Device(mosquitto.address, tenant, "a", samples.reader(two).operators())


@pytest.fixture
def where(two: Path, mosquitto: Mosquitto, tenant: str) -> tuple[object, ...]:
    return ("--device", "a", "--broker", mosquitto.address, "--tenant", tenant)


def test_both_keys_of_the_folder_sign(two: Path, device: Device, where: tuple[object, ...], run: Run) -> None:
    with device:
        run("deploy", "fashion@1.0.0", "--registry", two, *where)
        run("command", "status", "--keys", two.parent / "keys", *where)
    assert [c.name for c in device.commands] == ["status"]


def test_keys_by_file(two: Path, device: Device, where: tuple[object, ...], tmp_path: Path, run: Run) -> None:
    """Each operator brings a key; the folder of keys has only the pinned root."""
    keys, bare = two.parent / "keys", tmp_path / "bare"
    bare.mkdir()
    shutil.copy(keys / "root.json", bare)
    both = ("--operator-key", keys / "operator.pem", "--operator-key", keys / "operator.2.pem")
    with device:
        run("deploy", "fashion@1.0.0", "--registry", two, "--keys", bare, *both, *where)
        run("command", "status", *both, *where)


def test_one_key_is_not_enough(two: Path, where: tuple[object, ...], refused: Refused) -> None:
    one = ("--operator-key", two.parent / "keys" / "operator.pem")
    deploy = ("deploy", "fashion@1.0.0", "--registry", two, *where)
    assert "2 operators have to sign" in refused(*deploy, *one, code=2, reason="unsigned")
    # The same key twice is one signature.
    refused(*deploy, *one, *one, code=2, reason="unsigned")


def test_a_removed_operator_sends_nothing(
    two: Path, where: tuple[object, ...], tmp_path: Path, run: Run, refused: Refused
) -> None:
    gone = shutil.copy(two.parent / "keys" / "operator.pem", tmp_path / "gone.pem")
    run("registry", "keys", "rotate", two, "operator")
    named = samples.reader(two).operators()
    assert (named.threshold, [k.label for k in named.keys]) == (2, ["operator", "bob"])
    deploy = ("deploy", "fashion@1.0.0", "--registry", two, *where)
    refused(*deploy, "--operator-key", gone, code=2, reason="unsigned")


def test_the_envelope_has_no_more_signatures_than_it_takes(two: Path, run: Run) -> None:
    keys = Keys(two.parent / "keys", samples.PASSWORD.encode).operators()
    operators = wire.Operators(1, 1, samples.reader(two).operators().keys)
    assert len(signing_keys(operators, keys)) == 1


def test_an_order_on_a_stick_is_signed_by_as_many(
    two: Path, tmp_path: Path, run: Run, refused: Refused
) -> None:
    export = ("registry", "export", two, "fashion@1.0.0", "--desire", "a", "-o")
    run(*export, tmp_path / "out")
    operators = samples.reader(two).operators()

    def order(folder: Path) -> bytes:
        data = (folder / "desired" / "a.json").read_bytes()
        return dsse.open_envelope(data, wire.DESIRED_TYPE, operators.trusted(), operators.threshold)

    assert wire.decode(order(tmp_path / "out"), wire.Desired).device == "a"
    one = ("--operator-key", two.parent / "keys" / "operator.pem")
    refused(*export, tmp_path / "less", *one, code=2, reason="unsigned")
    assert not (tmp_path / "less").exists()
    run(*export, tmp_path / "both", *one, "--operator-key", two.parent / "keys" / "operator.2.pem")
    assert order(tmp_path / "both")
