"""Signing single documents with python-tuf's metadata classes, and the first ones of a new registry.

What is to be signed next is draft.py's. Nothing here writes a file: repository.py does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple, TypeVar

import msgspec

# Both packages document these names here without listing them in __all__.
from securesystemslib.signer import Signer  # type: ignore[attr-defined]
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (  # type: ignore[attr-defined]
    Metadata,
    MetaFile,
    Role,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from edge_contract.canonical import sha256_hex
from fleet.registry import signers
from fleet.registry.signers import Authority
from fleet.registry.trust import Target

TOP_ROLES = ("root", "targets", "snapshot", "timestamp")
DAY_S = 86400
PERIODS = "x-edgeward-expires-s"
# When the timestamp was signed, Unix seconds: a device whose clock is behind takes it for the time.
SIGNED_AT = "x-edgeward-signed-at"

Payload = TypeVar("Payload", Root, Targets, Snapshot, Timestamp)


class File(NamedTuple):
    """One metadata file: its role, its name below `metadata/` and its bytes."""

    role: str
    name: str
    data: bytes


class Periods(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds after which each role's metadata expires. They are kept in the signed root.

    Integers, because TUF's canonical JSON knows no others. Delegated roles expire like targets.
    """

    root: int = 365 * DAY_S
    targets: int = 90 * DAY_S
    snapshot: int = 30 * DAY_S
    timestamp: int = 7 * DAY_S


def first(
    made: Mapping[str, Sequence[Signer]],
    thresholds: Mapping[str, int],
    targets: Mapping[str, Target],
    periods: Periods,
    now: datetime,
) -> list[File]:
    """The metadata of a new registry, in the order in which it is to be written."""
    root = Root(
        version=1, consistent_snapshot=True, unrecognized_fields={PERIODS: msgspec.to_builtins(periods)}
    )
    for role in TOP_ROLES:
        keys = {signer.public_key.keyid: signer.public_key for signer in made[role]}
        set_authority(root, role, Authority(keys, thresholds.get(role, 1)))
    entries = Targets(version=1, targets={name: entry(name, t) for name, t in targets.items()})
    targets_file = sign(entries, "targets", made["targets"], now, periods, root)
    snapshot = Snapshot(version=1, meta={"targets.json": meta_of(targets_file, 1)})
    snapshot_file = sign(snapshot, "snapshot", made["snapshot"], now, periods, root)
    timestamp = Timestamp(version=1, snapshot_meta=meta_of(snapshot_file, 1))
    return [
        sign(root, "root", made["root"], now, periods, root),
        targets_file,
        snapshot_file,
        sign(timestamp, "timestamp", made["timestamp"], now, periods, root),
    ]


def sign(
    payload: Payload,
    role: str,
    with_: Sequence[Signer],
    now: datetime,
    periods: Periods,
    *judges: Root | Targets,
) -> File:
    """A document's bytes, signed by each signer and checked by those who will judge it.

    Raises InputRejected when a signer does not sign. That the signatures do not suffice is a mistake of
    ours: RuntimeError.
    """
    payload.expires = (now + timedelta(seconds=getattr(periods, payload.type))).replace(microsecond=0)
    if isinstance(payload, Timestamp):
        payload.unrecognized_fields[SIGNED_AT] = int(now.timestamp())
    document = Metadata(payload)
    for signer in with_:
        try:
            document.sign(signer, append=True)
        except RepositoryError as e:  # python-tuf makes one of whatever the signer raised
            raise signers.failed(role, e) from e
    for judge in judges:
        try:
            judge.verify_delegate(role, document.signed_bytes, document.signatures)
        except RepositoryError as e:
            raise RuntimeError(f"{role}: {e}") from e
    name = "timestamp.json" if role == "timestamp" else f"{payload.version}.{role}.json"
    return File(role, name, document.to_bytes())


def set_authority(root: Root, role: str, authority: Authority) -> None:
    """Make these the keys of one of the root's roles; keys that no role uses any more go."""
    root.roles[role] = Role(list(authority.keys), authority.threshold)
    root.keys.update(authority.keys)
    used = {keyid for other in root.roles.values() for keyid in other.keyids}
    root.keys = {keyid: key for keyid, key in root.keys.items() if keyid in used}


def meta_of(file: File, version: int) -> MetaFile:
    """How a snapshot or timestamp names a file."""
    return MetaFile(version, len(file.data), {"sha256": sha256_hex(file.data)})


def entry(name: str, target: Target, custom: Mapping[str, object] | None = None) -> TargetFile:
    """How targets metadata names a file."""
    extra = {"custom": dict(custom)} if custom else None
    return TargetFile(target.length, {"sha256": target.sha256}, name, extra)
