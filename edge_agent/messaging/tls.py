"""TLS to the broker: the context, whose certificate it is, when its files change, and what went wrong.

The certificate's common name is the device's id: mosquitto takes it as the user name, by which the access
rules go. Sockets made here close themselves when a handshake fails, which paho leaves undone.
"""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_agent.config import Broker
from edge_contract.errors import InputRejected, Reason

if TYPE_CHECKING:
    from cryptography import x509

# OpenSSL's X509_V_ERR codes (x509_vfy.h) → what an operator calls them.
_VERIFY = {
    9: "the broker's certificate is not valid yet; is this device's clock right",
    10: "the broker's certificate has expired",
    18: "the broker's certificate is self-signed and not in tls_ca",
    19: "the broker's certificate comes from a CA that is not in tls_ca",
    20: "the broker's certificate comes from a CA that is not in tls_ca",
    21: "the broker's certificate comes from a CA that is not in tls_ca",
    23: "the broker's certificate was revoked",
    26: "the broker's certificate is not one for a server (issued without its hosts)",
    62: "the broker's certificate is for another host name",
    64: "the broker's certificate is for another address",
}
# TLS alerts of the broker → what it thinks of this device.
_ALERTS = {
    "CERTIFICATE_EXPIRED": "the broker says that this device's certificate has expired",
    "UNKNOWN_CA": "the broker does not know the CA of this device's certificate",
    "CERTIFICATE_REQUIRED": "the broker wants a certificate of this device; set tls_cert and tls_key",
    "CERTIFICATE_REVOKED": "the broker says that this device's certificate was revoked",
    "BAD_CERTIFICATE": "the broker refuses this device's certificate",
    "HANDSHAKE_FAILURE": "the broker refuses the handshake; does it want a certificate of this device",
    "WRONG_VERSION_NUMBER": "what answers does not speak TLS; is the port right",
}

Stamp = tuple[tuple[int, int, int], ...]


class Context(ssl.SSLContext):
    """A client's context that remembers why a connection failed: paho reports only that it did."""

    fault = ""


class _Socket(ssl.SSLSocket):
    """Closes itself when the handshake fails, and names what the broker's alerts mean."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except BaseException:
            self.close()
            raise

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        try:
            return super().recv(buflen, flags)
        except ssl.SSLError as e:
            self._remember(e)
            raise

    def send(self, data: Any, flags: int = 0) -> int:
        try:
            return super().send(data, flags)
        except ssl.SSLError as e:
            self._remember(e)
            raise

    def _remember(self, error: ssl.SSLError) -> None:
        context = self.context
        if isinstance(context, Context) and not isinstance(
            error, ssl.SSLWantReadError | ssl.SSLWantWriteError
        ):
            context.fault = explain(error)


def context(config: Broker) -> Context:
    """A context of the files that `config` names. Raises InputRejected."""
    made = Context(ssl.PROTOCOL_TLS_CLIENT)
    made.sslsocket_class = _Socket
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    given = [path for path in (config.tls_ca, config.tls_cert, config.tls_key) if path]
    try:
        made.load_verify_locations(config.tls_ca)
        if config.tls_cert:
            made.load_cert_chain(config.tls_cert, config.tls_key or None, password=_no_password)
    except (OSError, ValueError) as e:
        raise _unusable(" or ".join(given), e, "name PEM files that this user can read") from e
    return made


def check_identity(config: Broker, device: str) -> None:
    """The certificate is this device's, as far as it says. Raises InputRejected.

    Not checked is its validity in time: the clock may be wrong, and the broker judges it anyway.
    """
    if not config.tls_cert:
        return
    name = common_name(config.tls_cert)
    if name != device:
        raise InputRejected(
            Reason.BAD_CONFIG,
            f"[broker] tls_cert {config.tls_cert} is for {name!r}, but `device` is {device!r}",
            f"set device = {name!r}, or install the certificate of {device!r}",
        )


def common_name(path: str) -> str:
    """The common name of the first certificate in a PEM file; empty without one. Raises InputRejected."""
    from cryptography.x509.oid import NameOID

    names = _certificate(path).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def expiry(path: str) -> datetime:
    """When the first certificate in a PEM file ends, in UTC. Raises InputRejected."""
    return _certificate(path).not_valid_after_utc.astimezone(UTC)


def stamp(config: Broker) -> Stamp:
    """What changes when one of the files is replaced."""
    found = []
    for path in (config.tls_ca, config.tls_cert, config.tls_key):
        try:
            status = Path(path).stat() if path else None
        except OSError:
            status = None
        found.append((status.st_mtime_ns, status.st_size, status.st_ino) if status else (0, 0, 0))
    return tuple(found)


def explain(error: Exception) -> str:
    """A failure of a connection in the words of an operator."""
    if isinstance(error, ssl.SSLCertVerificationError):
        told = _VERIFY.get(error.verify_code)
        return f"{told} ({error.verify_message})" if told else f"certificate: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        text = f"{error.reason or error}".upper()
        return next((told for alert, told in _ALERTS.items() if alert in text), f"TLS: {error}")
    return str(error)


def _certificate(path: str) -> x509.Certificate:
    from cryptography import x509  # a megabyte, which a device without a certificate need not spend

    try:
        return x509.load_pem_x509_certificate(Path(path).read_bytes())
    except (OSError, ValueError) as e:
        raise _unusable(path, e, "name a PEM file with the device's certificate") from e


def _no_password() -> str:
    """A key with a password would be asked for at a terminal that a device does not have."""
    raise ValueError("the key is encrypted; a device's key must not be")


def _unusable(what: str, error: Exception, next_step: str) -> InputRejected:
    return InputRejected(Reason.BAD_CONFIG, f"[broker] {what} cannot be used: {error}", next_step)
