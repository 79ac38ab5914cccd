"""The MQTT seam against brokers that say no: rights, passwords, certificates, silence."""

from __future__ import annotations

import datetime
import gc
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from edge_contract.errors import Reason, TransferFailed
from fleet import bus
from fleet.bus import Address, Bus
from tests.support.broker import Mosquitto, Pki, SecureMosquitto

Run = Callable[..., Result]
Refused = Callable[..., str]


def test_what_is_published_comes_back(mosquitto: Mosquitto, tenant: str) -> None:
    with Bus(Address(mosquitto.host, mosquitto.port)) as one:
        one.subscribe([f"{tenant}/#"])
        one.publish(f"{tenant}/x", b"1" * 200_000, correlation=b"c")
        message = one.next(5)
        assert message is not None
        assert (message.topic, len(message.payload), message.retained) == (f"{tenant}/x", 200_000, False)
        assert message.correlation == b"c"
        assert one.next(0) is None
        one.publish(f"{tenant}/kept", b"k", retain=True)
        assert one.next(5)
    with Bus(Address(mosquitto.host, mosquitto.port)) as two:
        assert two.retained([f"{tenant}/#"], 5) == [(f"{tenant}/kept", b"k")]


def test_a_broker_that_says_nothing_leaves_no_socket_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus, "_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        one = Bus(Address("127.0.0.1", silent.getsockname()[1]))
        lines: list[object] = []
        real = one._await_connection

        def await_connection() -> None:
            lines.append(one._client.socket())
            real()

        monkeypatch.setattr(one, "_await_connection", await_connection)
        with pytest.raises(TransferFailed, match=r"no MQTT 5 answer within"):
            one.__enter__()
        (line,) = lines
        assert isinstance(line, socket.socket)
        assert line.fileno() == -1


def test_rights_and_passwords(tmp_path: Path, run: Run, refused: Refused) -> None:
    passwords, acl, secret = (tmp_path / name for name in ("passwords", "acl", "secret"))
    subprocess.run(["mosquitto_passwd", "-b", "-c", passwords, "ops", "pässword"], check=True)
    acl.write_text("user ops\ntopic read edge/#\n")
    secret.write_text("pässword\n")
    extra = f"allow_anonymous false\npassword_file {passwords}\nacl_file {acl}"
    with Mosquitto(tmp_path, extra=extra) as broker:
        where = ("--broker", broker.address)
        run("devices", *where, "--username", "ops", "--password-file", secret)
        line = refused("devices", *where, code=5, reason="broker_unreachable")
        assert "Not authorized" in line
        secret.write_text("wrong\n")
        refused(
            *("devices", *where, "--username", "ops", "--password-file", secret),
            code=5,
            reason="broker_unreachable",
        )
        missing = ("--username", "ops", "--password-file", tmp_path / "none")
        refused("devices", *where, *missing, code=2, reason="bad_input")
        address = Address(broker.host, broker.port, username="ops", password="pässword")
        with Bus(address) as connected, pytest.raises(TransferFailed) as caught:
            connected.publish("edge/v1/t/d/down/desired", b"x")
        assert caught.value.reason is Reason.NOT_ALLOWED
        assert "pässword" not in repr(address)


Issuer = tuple[x509.Name, ec.EllipticCurvePrivateKey]


def certificate(folder: Path, name: str, issuer: Issuer | None) -> Issuer:
    """Write NAME.pem and NAME.key; self-signed where there is no issuer."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer_name, issuer_key = issuer or (subject, key)
    now = datetime.datetime.now(datetime.UTC)
    loopback = x509.SubjectAlternativeName([x509.DNSName("localhost")])
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer_name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(loopback, critical=False)
        .sign(issuer_key, hashes.SHA256())
    )
    (folder / f"{name}.pem").write_bytes(built.public_bytes(Encoding.PEM))
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / f"{name}.key").write_bytes(pem)
    return subject, key


# paho does not close the socket of a TLS handshake that failed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_tls_with_client_certificates(tmp_path: Path, run: Run, refused: Refused) -> None:
    ca = certificate(tmp_path, "ca", None)
    certificate(tmp_path, "broker", ca)
    certificate(tmp_path, "ops", ca)
    certificate(tmp_path, "other-ca", None)
    extra = (
        f"cafile {tmp_path}/ca.pem\ncertfile {tmp_path}/broker.pem\nkeyfile {tmp_path}/broker.key\n"
        "require_certificate true"
    )
    with Mosquitto(tmp_path, extra=extra) as broker:
        where = ("devices", "--broker", f"localhost:{broker.port}")
        ours = ("--tls-cert", tmp_path / "ops.pem", "--tls-key", tmp_path / "ops.key")
        run(*where, "--tls-ca", tmp_path / "ca.pem", *ours)
        strange = ("--tls-ca", tmp_path / "other-ca.pem", *ours)
        line = refused(*where, *strange, code=5, reason="broker_unreachable")
        assert "certificate verify failed" in line
        # Without a certificate of its own, or not even in TLS, it is let down, not let in.
        refused(*where, "--tls-ca", tmp_path / "ca.pem", code=5, reason="broker_unreachable")
        refused(*where, code=5, reason="broker_unreachable")
        refused(*where, *ours, code=2, reason="bad_input")
        refused(*where, "--tls-ca", tmp_path / "none.pem", code=2, reason="bad_input")
        refused(*where, "--tls-ca", tmp_path / "ca.key", code=2, reason="bad_input")
    gc.collect()  # what paho left open is to be found here, not in another test


def test_something_that_listens_and_is_no_broker(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus, "_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        line = refused("devices", "--broker", f"127.0.0.1:{port}", code=5, reason="broker_unreachable")
    assert "no MQTT 5 answer" in line


def test_a_name_that_is_not_known(refused: Refused) -> None:
    refused("devices", "--broker", "no-such-host.invalid:1883", code=5, reason="broker_unreachable")


def test_a_broker_that_dies_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus, "_TIMEOUT_S", 0.5)
    with Mosquitto(tmp_path) as broker, Bus(Address(broker.host, broker.port)) as connected:
        broker.kill()
        with pytest.raises(TransferFailed, match="no answer to publish"):
            connected.publish("x", b"y")


def test_failed_handshakes_leave_no_sockets_behind(tmp_path: Path) -> None:
    """As a controller makes them for weeks while the broker's certificate has expired."""
    pki, stranger = Pki(tmp_path / "pki"), Pki(tmp_path / "stranger")
    mine = pki.issue("operator")
    counts = []
    with SecureMosquitto(tmp_path, pki) as broker:
        address = Address("localhost", broker.port, str(stranger.ca), str(mine.certificate), str(mine.key))
        for _ in range(20):
            with pytest.raises(TransferFailed, match="certificate verify failed"), Bus(address):
                pass
            counts.append(len(list(Path("/proc/self/fd").iterdir())))
    assert max(counts) - min(counts) <= 4
