"""Signing a registry's metadata, with python-tuf's metadata classes. It writes no file: repository.py does.

Reading and verifying for everyone else is trust.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import NamedTuple, TypeVar

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

# Both packages document these names here without listing them in __all__.
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (  # type: ignore[attr-defined]
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from edge_contract.canonical import sha256_hex
from edge_contract.errors import InputRejected, Reason
from fleet.registry.trust import Target, bad_root, fault, plain

TOP_ROLES = ("root", "targets", "snapshot", "timestamp")
DAY_S = 86400
_PERIODS = "x-edgeward-expires-s"
# When the timestamp was signed, Unix seconds: a device whose clock is behind takes it for the time.
SIGNED_AT = "x-edgeward-signed-at"

Payload = TypeVar("Payload", Root, Targets, Snapshot, Timestamp)


class File(NamedTuple):
    """One metadata file: its name below `metadata/` and its bytes."""

    name: str
    data: bytes


class Periods(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds after which each role's metadata expires. They are kept in the signed root.

    Integers, because TUF's canonical JSON knows no others.
    """

    root: int = 365 * DAY_S
    targets: int = 90 * DAY_S
    snapshot: int = 30 * DAY_S
    timestamp: int = 7 * DAY_S


def first(
    keys: Mapping[str, Ed25519PrivateKey], targets: Mapping[str, Target], periods: Periods, now: datetime
) -> list[File]:
    """The metadata of a new registry, in the order in which it is to be written."""
    root = Root(
        version=1, consistent_snapshot=True, unrecognized_fields={_PERIODS: msgspec.to_builtins(periods)}
    )
    for role in TOP_ROLES:
        root.add_key(CryptoSigner(keys[role]).public_key, role)
    entries = Targets(version=1, targets={name: _entry(name, t) for name, t in targets.items()})
    targets_file = _sign(entries, keys["targets"], now, periods)
    snapshot = Snapshot(version=1, meta={"targets.json": _meta(targets_file, 1)})
    snapshot_file = _sign(snapshot, keys["snapshot"], now, periods)
    timestamp = Timestamp(version=1, snapshot_meta=_meta(snapshot_file, 1))
    return [
        _sign(root, keys["root"], now, periods),
        targets_file,
        snapshot_file,
        _sign(timestamp, keys["timestamp"], now, periods),
    ]


class Draft:
    """A registry's current metadata, to be changed and signed anew: targets, then snapshot, then timestamp.

    Signatures are verified from the pinned root on, so that nothing foreign is signed. Expiry is not:
    renewing what has expired is what this is for.
    """

    def __init__(self, location: str, pinned: bytes, get: Callable[[str], bytes | None]) -> None:
        """`get` returns a metadata file's bytes by name, or None. Raises BundleRejected, InputRejected."""
        self._location = location
        self._get = get
        try:
            self._root = Metadata[Root].from_bytes(pinned).signed
        except (RepositoryError, ValueError) as e:
            raise bad_root(e) from e
        try:
            self._follow_root()
            self._timestamp = self._verified(Timestamp, "timestamp.json", None)
            meta = self._timestamp.snapshot_meta
            self._snapshot = self._verified(Snapshot, f"{meta.version}.snapshot.json", meta)
            meta = self._snapshot.meta["targets.json"]
            self._targets = self._verified(Targets, f"{meta.version}.targets.json", meta)
        except (RepositoryError, ValueError, KeyError) as e:
            raise fault(location, e) from e

    @property
    def targets(self) -> Mapping[str, Target]:
        """What is published, and what `publish` added."""
        return plain(self._targets)

    @property
    def periods(self) -> Periods:
        """Seconds to expiry, as the signed root says. Raises BundleRejected."""
        try:
            return msgspec.convert(self._root.unrecognized_fields[_PERIODS], Periods)
        except (KeyError, msgspec.ValidationError) as e:
            raise fault(self._location, RepositoryError(f"the root's {_PERIODS}: {e}")) from e

    def add(self, name: str, target: Target) -> None:
        """Name one more file in the targets."""
        self._targets.targets[name] = _entry(name, target)

    def sign_root(self, key: Ed25519PrivateKey, now: datetime, periods: Periods) -> File:
        """The same root under a new version and expiry, with `periods` for what is signed from now on."""
        self._root.unrecognized_fields[_PERIODS] = msgspec.to_builtins(periods)
        return self._next(self._root, key, now, periods)

    def sign_targets(self, key: Ed25519PrivateKey, now: datetime) -> File:
        """The next targets metadata; the snapshot signed after it names it."""
        file = self._next(self._targets, key, now, self.periods)
        self._snapshot.meta["targets.json"] = _meta(file, self._targets.version)
        return file

    def sign_snapshot(self, key: Ed25519PrivateKey, now: datetime) -> File:
        """The next snapshot; the timestamp signed after it names it."""
        file = self._next(self._snapshot, key, now, self.periods)
        self._timestamp.snapshot_meta = _meta(file, self._snapshot.version)
        return file

    def sign_timestamp(self, key: Ed25519PrivateKey, now: datetime) -> File:
        """The next timestamp; a reader sees the new state once it is written."""
        return self._next(self._timestamp, key, now, self.periods)

    def _next(self, payload: Payload, key: Ed25519PrivateKey, now: datetime, periods: Periods) -> File:
        role = payload.type
        if CryptoSigner(key).public_key.keyid not in self._root.roles[role].keyids:
            raise InputRejected(
                Reason.TRUST_FAILED,
                f"{self._location}: this {role} key is not the one that the registry's root names",
                "name the folder with this registry's keys with --keys",
            )
        payload.version += 1
        return _sign(payload, key, now, periods)

    def _follow_root(self) -> None:
        while (data := self._get(f"{self._root.version + 1}.root.json")) is not None:
            newer = Metadata[Root].from_bytes(data)
            for judge in (self._root, newer.signed):
                judge.verify_delegate("root", newer.signed_bytes, newer.signatures)
            if newer.signed.version != self._root.version + 1:
                raise RepositoryError(f"root {newer.signed.version} lies where the next one belongs")
            self._root = newer.signed

    def _verified(self, kind: type[Payload], name: str, meta: MetaFile | None) -> Payload:
        data = self._get(name)
        if data is None:
            raise RepositoryError(f"metadata/{name} is missing")
        if meta is not None:
            meta.verify_length_and_hashes(data)
        document = Metadata[Payload].from_bytes(data)
        self._root.verify_delegate(kind.type, document.signed_bytes, document.signatures)
        if not isinstance(document.signed, kind):
            raise RepositoryError(f"metadata/{name} is no {kind.type} metadata")
        if meta is not None and document.signed.version != meta.version:
            raise RepositoryError(f"metadata/{name} has version {document.signed.version}")
        return document.signed


def _sign(payload: Payload, key: Ed25519PrivateKey, now: datetime, periods: Periods) -> File:
    payload.expires = (now + timedelta(seconds=getattr(periods, payload.type))).replace(microsecond=0)
    if isinstance(payload, Timestamp):
        payload.unrecognized_fields[SIGNED_AT] = int(now.timestamp())
    document = Metadata(payload)
    document.sign(CryptoSigner(key))
    name = "timestamp.json" if payload.type == "timestamp" else f"{payload.version}.{payload.type}.json"
    return File(name, document.to_bytes())


def _meta(file: File, version: int) -> MetaFile:
    return MetaFile(version, len(file.data), {"sha256": sha256_hex(file.data)})


def _entry(name: str, target: Target) -> TargetFile:
    return TargetFile(target.length, {"sha256": target.sha256}, name)
