"""What a network's exception means, in one sentence and with the next step. It sends and reads nothing."""

from __future__ import annotations

import errno
import os
import ssl
from typing import TypeVar

from urllib3.exceptions import (
    ConnectTimeoutError,
    LocationValueError,
    NameResolutionError,
    NewConnectionError,
    ProtocolError,
    ProxyError,
    ReadTimeoutError,
    SSLError,
)

E = TypeVar("E", bound=BaseException)
_AGAIN = "the device tries again by itself; "
# OpenSSL's X509_V_ERR_ numbers.
_NOT_YET_VALID, _EXPIRED = 9, 10
_UNKNOWN_ISSUER = frozenset({2, 18, 19, 20, 21})
_OTHER_NAME = frozenset({62, 64})


def described(error: BaseException) -> tuple[str, str]:
    """(what happened, the next step)."""
    if isinstance(error, ProxyError):
        what, step = described(error.original_error)
        return f"the proxy failed: {what}", step
    certificate = _within(error, ssl.SSLCertVerificationError)
    if certificate is not None:
        return _bad_certificate(certificate)
    if isinstance(error, SSLError):
        cause = error.args[0] if error.args else error
        return (
            f"TLS failed: {cause}",
            _AGAIN + "check that the port speaks TLS, and which certificates it asks for",
        )
    if isinstance(error, LocationValueError | ValueError):
        return f"this is no address: {error}", "correct [registry] url and the proxy in the environment"
    return _of_connection(error)


def _of_connection(error: BaseException) -> tuple[str, str]:
    if isinstance(error, NameResolutionError):
        return "the host's name cannot be resolved", _AGAIN + "check the name and this device's DNS"
    if isinstance(error, NewConnectionError):
        cause = _within(error, OSError)
        if cause is not None and cause.errno == errno.ECONNREFUSED:
            return "connection refused", _AGAIN + "nobody listens there: check the registry and its port"
        why = os.strerror(cause.errno) if cause is not None and cause.errno else str(error)
        return f"no connection: {why}", _AGAIN + "check the network"
    if isinstance(error, ConnectTimeoutError):
        return "no connection in time", _AGAIN + "check the network and firewalls on the way"
    if isinstance(error, ReadTimeoutError):
        return "no byte in time", _AGAIN + "check the network and the registry's load"
    if isinstance(error, ProtocolError):
        return "the connection was cut", _AGAIN + "check the network if this repeats"
    return str(error), _AGAIN + "check the network and the registry"


def _bad_certificate(error: ssl.SSLCertVerificationError) -> tuple[str, str]:
    code = error.verify_code
    if code in (_EXPIRED, _NOT_YET_VALID):
        state = "has expired" if code == _EXPIRED else "is not valid yet"
        return f"its TLS certificate {state}", "renew it on the server, and check this device's clock"
    if code in _OTHER_NAME:
        return f"its TLS certificate is another host's ({error.verify_message})", "correct [registry] url"
    if code in _UNKNOWN_ISSUER:
        return (
            "its TLS certificate is from an unknown authority",
            "name the authority's file in [registry] tls_ca",
        )
    return f"its TLS certificate is not accepted: {error.verify_message}", "correct it on the server"


def _within(error: BaseException, kind: type[E]) -> E | None:
    """The first error of that kind among this one, its arguments and what caused it."""
    seen: list[BaseException] = []
    waiting: list[object] = [error]
    while waiting:
        one = waiting.pop()
        if not isinstance(one, BaseException) or one in seen:
            continue
        if isinstance(one, kind):
            return one
        seen.append(one)
        waiting += [*one.args, one.__cause__, one.__context__]
    return None
