"""The operator's keys: Ed25519, one PKCS#8 PEM file a role, encrypted with a password.

Which key may sign what is said by the registry's signed metadata, not here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from edge_contract.errors import InputRejected, Reason
from fleet.registry import files

# The four roles of TUF, and the key that signs desired states and commands.
ROLES = ("root", "targets", "snapshot", "timestamp", "operator")
PINNED_ROOT = "root.json"

_ENCRYPTED = b"-----BEGIN ENCRYPTED PRIVATE KEY-----"


class Keys:
    """A folder of keys. A key is read when it is needed, so the rest can be kept elsewhere."""

    def __init__(self, folder: Path, password: Callable[[], bytes]) -> None:
        """`password` is asked only if a key that is needed is encrypted."""
        self.folder = folder
        self._password = password

    def load(self, role: str) -> Ed25519PrivateKey:
        """The private key of `role`. Raises InputRejected: missing, wrong password, not such a key."""
        path = self.folder / f"{role}.pem"
        data = self._read(
            path, f"the {role} key", "name its folder with --keys; a key kept offline is needed for this step"
        )
        password = self._password() if data.lstrip().startswith(_ENCRYPTED) else None
        try:
            key = load_pem_private_key(data, password)
        except (ValueError, TypeError) as e:
            wrong = "wrong password" if password is not None else "not a PEM private key"
            raise InputRejected(
                Reason.BAD_INPUT,
                f"{path}: {wrong}",
                "give the password that was chosen at `edge-fleet registry init`, or restore the file",
            ) from e
        if not isinstance(key, Ed25519PrivateKey):
            raise InputRejected(
                Reason.BAD_INPUT, f"{path}: not an Ed25519 key", "restore the file that init made"
            )
        return key

    def pinned_root(self) -> bytes:
        """The root of trust kept beside the keys, so that a broken-into registry cannot bring its own."""
        return self._read(
            self.folder / PINNED_ROOT,
            "the pinned root",
            "name the folder of keys with --keys, or put the root.json of the day of `registry init` there",
        )

    @staticmethod
    def _read(path: Path, what: str, next_step: str) -> bytes:
        try:
            return path.read_bytes()
        except OSError as e:
            raise InputRejected(
                Reason.BAD_INPUT, f"{path}: {what} cannot be read ({e.strerror})", next_step
            ) from e


def generate() -> dict[str, Ed25519PrivateKey]:
    """A new key for every role."""
    return {role: Ed25519PrivateKey.generate() for role in ROLES}


def save(folder: Path, keys: dict[str, Ed25519PrivateKey], password: bytes) -> None:
    """Write the keys, readable by their owner only; an empty password leaves them unencrypted."""
    protection: KeySerializationEncryption = BestAvailableEncryption(password) if password else NoEncryption()
    for role, key in keys.items():
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection)
        files.write(folder / f"{role}.pem", pem, mode=0o600)
