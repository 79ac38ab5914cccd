"""`edge-fleet certificates`: a CA, what it issues, and what it refuses."""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Run = Callable[..., Result]


@pytest.fixture
def folder(run: Run, tmp_path: Path) -> Path:
    made = tmp_path / "ca"
    run("certificates", "init", "--ca", made)
    return made


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_a_ca_with_a_key_that_only_its_owner_reads_and_only_with_the_password(folder: Path) -> None:
    assert (folder / "ca.key").stat().st_mode & 0o777 == 0o600
    assert b"ENCRYPTED" in (folder / "ca.key").read_bytes()
    constraints = certificate(folder / "ca.pem").extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)


def test_a_devices_certificate_carries_its_id_and_is_no_ca(run: Run, folder: Path, tmp_path: Path) -> None:
    done = run("certificates", "issue", "line-3", "--ca", folder, "--out", tmp_path / "d", "--json")
    told: dict[str, Any] = json.loads(done.stdout)
    made = certificate(Path(told["certificate"]))
    assert made.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "line-3"
    assert not made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    purposes = made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(purposes) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    made.verify_directly_issued_by(certificate(folder / "ca.pem"))
    assert Path(told["key"]).stat().st_mode & 0o777 == 0o600
    assert told["until_ms"] == int(made.not_valid_after_utc.timestamp() * 1000)
    # An agent's key has no password: nobody would be there to type it.
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(told["certificate"], told["key"])


def test_a_brokers_certificate_names_its_hosts(run: Run, folder: Path) -> None:
    hosts = ("--host", "broker.example", "--host", "192.168.1.2")
    text = run("certificates", "issue", "broker", "--ca", folder, "--days", "90", *hosts).stdout
    where = "for a broker at broker.example, 192.168.1.2"
    assert f"{folder}/broker.pem and {folder}/broker.key {where}, valid until" in text
    made = certificate(folder / "broker.pem")
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["broker.example"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["192.168.1.2"]
    purposes = made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(purposes) == [ExtendedKeyUsageOID.SERVER_AUTH]


def test_the_same_name_again_renews(run: Run, folder: Path) -> None:
    run("certificates", "issue", "line-3", "--ca", folder)
    first = certificate(folder / "line-3.pem").serial_number
    run("certificates", "issue", "line-3", "--ca", folder)
    assert certificate(folder / "line-3.pem").serial_number != first


def test_a_broker_is_renewed_for_the_hosts_it_had(run: Run, folder: Path) -> None:
    issue = ("certificates", "issue", "broker", "--ca", folder)
    run(*issue, "--host", "broker.example", "--host", "192.168.1.2", "--host", "::1")
    first = certificate(folder / "broker.pem")
    told = json.loads(run(*issue, "--json").stdout)
    second = certificate(folder / "broker.pem")
    assert told["hosts"] == ["broker.example", "192.168.1.2", "::1"]
    assert second.serial_number != first.serial_number
    for kind in (x509.SubjectAlternativeName, x509.ExtendedKeyUsage):
        before, after = (c.extensions.get_extension_for_class(kind).value for c in (first, second))
        assert after == before
    # Others replace them.
    assert json.loads(run(*issue, "--host", "elsewhere", "--json").stdout)["hosts"] == ["elsewhere"]


def test_what_is_refused(
    run: Run, refused: Callable[..., str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused("certificates", "init", "--ca", folder, code=2, reason="bad_input")
    line = refused("certificates", "issue", "x", "--ca", tmp_path / "none", code=2, reason="bad_input")
    assert "edge-fleet certificates init" in line
    refused("certificates", "issue", "../x", "--ca", folder, code=2, reason="bad_input")
    refused("certificates", "issue", "ca", "--ca", folder, code=2, reason="bad_input")
    (folder / "broken.pem").write_text("no certificate")
    line = refused("certificates", "issue", "broken", "--ca", folder, code=2, reason="bad_input")
    assert f"{folder}/broken.pem is there and is no certificate" in line
    monkeypatch.setenv("EDGEWARD_KEY_PASSWORD", "wrong")
    refused("certificates", "issue", "x", "--ca", folder, code=2, reason="bad_input")
