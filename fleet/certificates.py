"""Certificates for the broker and its clients: a small CA. Not the registry's trust, which is TUF.

A client's common name is its user name at the broker, by which the access rules go: a device's id, or an
operator's. Keys are ECDSA P-256, as small boxes like them. Who has a CA already needs none of this.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edge_contract.errors import InputRejected, Reason
from fleet.registry import files

_CA = "ca"
CA_CERTIFICATE, CA_KEY = f"{_CA}.pem", f"{_CA}.key"
# A device whose clock is a little behind must not take its certificate for one of the future.
_EARLIER = timedelta(hours=1)

PrivateKey = ec.EllipticCurvePrivateKey


class Issued(NamedTuple):
    """A certificate and its key, as files."""

    certificate: Path
    key: Path
    until: datetime
    hosts: Sequence[str] = ()


def init(folder: Path, password: bytes, *, days: float) -> Issued:
    """Make a CA in `folder`. Raises InputRejected when there is one already."""
    if (folder / CA_KEY).exists() or (folder / CA_CERTIFICATE).exists():
        raise InputRejected(
            Reason.BAD_INPUT, f"{folder} holds a CA already", "issue with it, or name another folder"
        )
    files.make_folder(folder)
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("edgeward broker CA")
    builder = _builder(name, name, key, days).add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    )
    usage = _usage(signs_certificates=True)
    certificate = builder.add_extension(usage, critical=True).sign(key, hashes.SHA256())
    return _write(folder, _CA, certificate, key, password)


def issue(
    folder: Path,
    name: str,
    password: Callable[[], bytes],
    *,
    days: float,
    hosts: Sequence[str] = (),
    out: Path | None = None,
) -> Issued:
    """A certificate for a client called `name`, or, with `hosts`, for a broker reached under these.

    Issuing again replaces the files; without `hosts` it is for those that it was for before. Raises
    InputRejected when the CA, or what is to be replaced, cannot be used.
    """
    if name == _CA:
        raise InputRejected(Reason.BAD_INPUT, f"{name!r} is the CA itself", "choose another name")
    hosts = hosts or _hosts_before((out or folder) / f"{name}.pem")
    ca, ca_key = _load(folder, password)
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        _builder(_name(name), ca.subject, key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
    )
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
    builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    if hosts:
        names = x509.SubjectAlternativeName([_alternative(host) for host in hosts])
        builder = builder.add_extension(names, critical=False)
    certificate = builder.sign(ca_key, hashes.SHA256())
    return _write(out or folder, name, certificate, key, b"")._replace(hosts=hosts)


def _builder(subject: x509.Name, issuer: x509.Name, key: PrivateKey, days: float) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + min(timedelta(days=days), timedelta(0)) - _EARLIER)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _hosts_before(path: Path) -> list[str]:
    """What the certificate that is to be replaced was for; empty when there is none, or it is a client's."""
    try:
        before = x509.load_pem_x509_certificate(path.read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as e:
        raise InputRejected(
            Reason.BAD_INPUT,
            f"{path} is there and is no certificate to renew: {e}",
            "move it away, or name another folder with --out",
        ) from e
    try:
        names = before.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in names]


def _load(folder: Path, password: Callable[[], bytes]) -> tuple[x509.Certificate, PrivateKey]:
    try:
        certificate = x509.load_pem_x509_certificate((folder / CA_CERTIFICATE).read_bytes())
        pem = (folder / CA_KEY).read_bytes()
        secret = password() if b"ENCRYPTED" in pem else None
        key = serialization.load_pem_private_key(pem, secret)
    except OSError as e:
        raise InputRejected(
            Reason.BAD_INPUT,
            f"{folder}: no CA to issue with ({e.strerror}: {e.filename})",
            "make one with `edge-fleet certificates init`",
        ) from e
    except (ValueError, TypeError) as e:
        raise InputRejected(
            Reason.BAD_INPUT, f"{folder}: the CA cannot be used: {e}", "check the password of its key"
        ) from e
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InputRejected(
            Reason.BAD_INPUT, f"{folder / CA_KEY} is not an ECDSA key", "use the tools this CA was made with"
        )
    return certificate, key


def _write(
    folder: Path, stem: str, certificate: x509.Certificate, key: PrivateKey, password: bytes
) -> Issued:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    paths = folder / f"{stem}.pem", folder / f"{stem}.key"
    try:
        files.make_folder(folder)
        files.write(paths[1], pem, mode=0o600)
        files.write(paths[0], certificate.public_bytes(serialization.Encoding.PEM))
    except OSError as e:
        raise InputRejected(
            Reason.BAD_INPUT, f"{folder}: {e.strerror}", "name a folder that can be written"
        ) from e
    return Issued(*paths, certificate.not_valid_after_utc)
