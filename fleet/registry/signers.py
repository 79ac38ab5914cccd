"""What signs metadata: a private key in a file, in a security module (PKCS#11) or in a cloud's key service.

The signers are securesystemslib's, found by the scheme of a URI. A key that is not in a file is described by
one: its URI and its public key. Errors of all those libraries end here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, urlsplit

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from securesystemslib.exceptions import UnsupportedLibraryError

# securesystemslib documents these names here without listing them in __all__.
from securesystemslib.signer import (  # type: ignore[attr-defined]
    SIGNER_FOR_URI_SCHEME,
    CryptoSigner,
    Key,
    Signer,
    SSlibKey,
)

from edge_contract import canonical
from edge_contract.errors import EdgewardError, InputRejected, Reason

_TRIAL = b"edgeward: a trial, whether this key can sign"

Secret = Callable[[str], str]

# URI scheme → the extra of this distribution that brings its library.
EXTRAS = {
    "hsm": "fleet-pkcs11",
    "awskms": "fleet-aws",
    "gcpkms": "fleet-gcp",
    "azurekms": "fleet-azure",
}


class Authority(NamedTuple):
    """The keys that may sign for a role, by id, and how many of them it takes."""

    keys: Mapping[str, Key]
    threshold: int


class Remote(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A key that lies elsewhere, as `ROLE.uri` holds it. TUF's own form of a public key."""

    uri: str
    keyid: str
    keytype: str
    scheme: str
    public: str

    def key(self) -> Key:
        """The public key. Raises KeyError, ValueError."""
        return SSlibKey.from_dict(
            self.keyid,
            {"keytype": self.keytype, "scheme": self.scheme, "keyval": {"public": self.public}},
        )


def of_private(key: Ed25519PrivateKey) -> Signer:
    """A signer with a private key that is in this process."""
    return CryptoSigner(key)


def public_of(key: Ed25519PrivateKey) -> Key:
    """The public key of a private one, with its id."""
    return CryptoSigner(key).public_key


def of_remote(remote: Remote, secret: Secret) -> Signer:
    """A signer for a key that lies elsewhere; `secret` is asked for a PIN when it signs.

    Raises InputRejected: unknown scheme, missing library, the service or module says no.
    """
    with _translated(remote.uri):
        return Signer.from_priv_key_uri(remote.uri, remote.key(), secret)


def import_public(uri: str, secret: Secret) -> Remote:
    """Ask the module or service that a URI names for its public key. Raises InputRejected."""
    scheme = urlsplit(uri).scheme
    if scheme not in EXTRAS:
        raise InputRejected(
            Reason.BAD_INPUT,
            f"{uri!r} names no key: the schemes are {', '.join(f'{name}:' for name in EXTRAS)}",
            "write it like hsm:1?label=TOKEN or awskms:alias/NAME",
        )
    with _translated(uri):
        found, key = _IMPORTS[scheme](SIGNER_FOR_URI_SCHEME[scheme], uri, secret)
        return Remote(found, key.keyid, key.keytype, key.scheme, key.keyval["public"])


def read_remote(path: Path) -> Remote:
    """The contents of a `.uri` file. Raises InputRejected."""
    try:
        remote = canonical.from_bytes(path.read_bytes(), Remote)
        remote.key()
    except (OSError, canonical.DecodeFault, ValueError, KeyError) as e:
        raise InputRejected(
            Reason.BAD_INPUT,
            f"{path}: this does not describe a key ({e})",
            "make it with `edge-fleet registry keys add --uri`",
        ) from e
    return remote


def read_public(path: Path) -> Key:
    """A public key in PEM. Raises InputRejected."""
    try:
        return SSlibKey.from_crypto(load_pem_public_key(path.read_bytes()))
    except OSError as e:
        raise InputRejected(
            Reason.BAD_INPUT, f"{path}: the public key cannot be read ({e.strerror})", "name a PEM file"
        ) from e
    except Exception as e:  # cryptography has several kinds for a damaged file
        raise InputRejected(
            Reason.BAD_INPUT,
            f"{path}: not a public key in PEM",
            "name the .pub file that `edge-fleet registry keys new` wrote beside the private key",
        ) from e


def tried(make: Callable[[], Signer], role: str) -> Signer:
    """A signer that has just signed something without a meaning. Raises EdgewardError when it cannot."""
    try:
        signer = make()
        signer.sign(_TRIAL)
    except Exception as e:  # each library has its own kinds
        raise failed(role, e) from e
    return signer


def failed(role: str, error: Exception) -> EdgewardError:
    """What is said when a signer exists but does not sign."""
    cause = error.__cause__ or error
    if isinstance(cause, EdgewardError):
        return cause
    return InputRejected(
        Reason.TRUST_FAILED,
        f"a key of {role} did not sign: {type(cause).__name__} {cause}",
        "check the PIN, the module in PYKCS11LIB, or the rights at the key service; nothing was published",
    )


def _import_hsm(kind: type, uri: str, secret: Secret) -> tuple[str, SSlibKey]:
    parts = urlsplit(uri)
    number = int(parts.path) if parts.path else None
    result: tuple[str, SSlibKey] = kind.import_(number, dict(parse_qsl(parts.query)).get("label"), secret)  # type: ignore[attr-defined]
    return result


def _import_path(kind: type, uri: str, _: Secret) -> tuple[str, SSlibKey]:
    result: tuple[str, SSlibKey] = kind.import_(uri.partition(":")[2])  # type: ignore[attr-defined]
    return result


def _import_azure(kind: type, uri: str, _: Secret) -> tuple[str, SSlibKey]:
    """`azurekms://VAULT.vault.azure.net/keys/NAME/VERSION`; the service names the newest version itself."""
    parts = urlsplit(uri)
    vault, name = parts.netloc.partition(".")[0], parts.path.split("/")[2]
    result: tuple[str, SSlibKey] = kind.import_(vault, name)  # type: ignore[attr-defined]
    return result


_IMPORTS: dict[str, Callable[[type, str, Secret], tuple[str, SSlibKey]]] = {
    "hsm": _import_hsm,
    "awskms": _import_path,
    "gcpkms": _import_path,
    "azurekms": _import_azure,
}


@contextmanager
def _translated(uri: str) -> Iterator[None]:
    try:
        yield
    except EdgewardError:
        raise
    except UnsupportedLibraryError as e:
        extra = EXTRAS.get(urlsplit(uri).scheme, "fleet")
        raise InputRejected(
            Reason.RUNTIME_MISSING,
            f"{uri}: the library for such keys is not installed",
            f"pip install 'edgeward[{extra}]'",
        ) from e
    except Exception as e:  # each library has its own kinds, and none of them is imported here
        raise InputRejected(
            Reason.BAD_INPUT,
            f"{uri}: this key cannot be had: {type(e).__name__} {e}",
            "check the URI, the module in PYKCS11LIB and its PIN, or the rights at the key service",
        ) from e
