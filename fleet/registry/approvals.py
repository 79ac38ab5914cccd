"""Approvals: a version that needs N of them is signed into the targets only when N named keys have signed it.

An approval is a DSSE envelope over model, version and manifest digest. Who may approve and how many it takes
stands in the signed targets metadata. Until then a version lies under `pending/`, where no device looks; what
lies there is believed only as far as approvals cover it. The envelopes are published with the version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import Meta

# python-tuf documents this name here without listing it in __all__.
from tuf.api.metadata import Targets  # type: ignore[attr-defined]

from edge_contract import canonical, dsse, wire
from edge_contract.errors import BundleRejected, InputRejected, MessageRejected, Reason
from edge_contract.manifest import Manifest, from_bytes, target_name
from fleet.registry import files, shelves

TYPE = "application/vnd.edgeward.approval+json"
FIELD = "x-edgeward-approvals"
MOST_KEYS = 16
_MANIFEST = "manifest.json"
_LIMIT_BYTES = 64 << 10


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many approvals a version needs, and whose count."""

    needed: Annotated[int, Meta(ge=0)] = 0
    # Unlimited when read: a list that is too long has to be read to be shortened.
    keys: list[wire.OperatorKey] = []

    def trusted(self) -> Mapping[str, tuple[str, bytes]]:
        """Key id → label and raw public key."""
        raw = [(key.label, bytes.fromhex(key.public_hex)) for key in self.keys]
        return {dsse.key_id(public): (label, public) for label, public in raw}


class Approval(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an approver signs."""

    schema: Literal[1]
    name: str
    version: str
    manifest_sha256: str


class Pending(msgspec.Struct, frozen=True):
    """A version that awaits approvals, and by whom it has them: key id → envelope."""

    manifest: Manifest
    data: bytes
    given: Mapping[str, bytes]

    @property
    def sha256(self) -> str:
        """The digest that is approved."""
        return canonical.sha256_hex(self.data)


def policy_for(top: Targets, role: str | None) -> Policy:
    """What the signed targets metadata demands for a role's versions: its own policy, else the registry's.

    Raises BundleRejected.
    """
    delegations = top.delegations
    delegated = (delegations.roles or {}).get(role or "") if delegations else None
    plain: Any = top.unrecognized_fields.get(FIELD, {})
    if delegated is not None:
        plain = delegated.unrecognized_fields.get(FIELD, plain)
    try:
        return msgspec.convert(plain, Policy)
    except msgspec.ValidationError as e:
        raise BundleRejected(
            Reason.TRUST_FAILED,
            f"targets metadata: {FIELD}: {e}",
            "set it again with `edge-fleet registry approvers` and a matching version of edgeward",
        ) from e


def set_policy(top: Targets, role: str | None, policy: Policy) -> None:
    """Demand approvals for a team's versions, or for all that have no policy of their own.

    Raises InputRejected for more approvals than there are distinct keys, and for too many keys.
    """
    distinct = len(policy.trusted())
    if policy.needed > distinct:
        raise InputRejected(
            Reason.BAD_INPUT,
            f"{policy.needed} approvals would be needed, and the approvers have {distinct} different keys",
            "add approvers with --add LABEL=FILE, or set --needed to at most their number",
        )
    if len(policy.keys) > MOST_KEYS:
        raise InputRejected(
            Reason.BAD_INPUT,
            f"there would be {len(policy.keys)} approvers, and {MOST_KEYS} is the most",
            "take off those who left with --remove LABEL, in the same command or before",
        )
    fields = top.unrecognized_fields
    if role is not None:
        if top.delegations is None or not top.delegations.roles:
            raise RuntimeError("no delegations")
        fields = top.delegations.roles[role].unrecognized_fields
    plain = msgspec.to_builtins(policy)
    msgspec.convert(plain, Policy)
    fields[FIELD] = plain


def stage(pending: Path, manifest: Manifest, data: bytes) -> None:
    """Put a version where it awaits approvals; those of another manifest under its name count no more."""
    files.write(_folder(pending, manifest.name, manifest.version) / _MANIFEST, data)


def read(pending: Path, name: str, version: str, policy: Policy) -> Pending:
    """A version that awaits approvals, with those that count. Raises InputRejected when there is none."""
    folder = _folder(pending, name, version)
    try:
        data = (folder / _MANIFEST).read_bytes()
    except OSError as e:
        raise InputRejected(
            Reason.NOT_PUBLISHED,
            f"{name}@{version} does not await approvals",
            "stage it with `edge-fleet registry publish`; see `registry list` for what is here",
        ) from e
    manifest = from_bytes(data)
    if (manifest.name, manifest.version) != (name, version):
        raise BundleRejected(
            Reason.MANIFEST_INVALID,
            f"{folder}: its manifest calls itself {manifest.name}@{manifest.version}",
            "publish the bundle again; look for who altered the file",
        )
    try:
        envelopes = [path.read_bytes() for path in sorted(folder.glob("*.approval"))]
    except OSError as e:
        raise BundleRejected(
            Reason.TRUST_FAILED, f"{e.filename}: {e.strerror}", "remove what is no approval from this folder"
        ) from e
    return Pending(manifest, data, count(envelopes, manifest, canonical.sha256_hex(data), policy))


def every(pending: Path) -> list[tuple[str, str]]:
    """Model and version of all that await approvals."""
    # A folder without a manifest is what a kill while staging left.
    names = sorted(path.parent.name for path in pending.glob(f"*/{_MANIFEST}"))
    return [(name, version) for name, _, version in (n.partition("@") for n in names)]


def count(envelopes: Sequence[bytes], manifest: Manifest, sha256: str, policy: Policy) -> dict[str, bytes]:
    """The approvals that count: one for each named key whose signature over this very manifest holds."""
    expected = _payload(manifest, sha256)
    found: dict[str, bytes] = {}
    for envelope in envelopes:
        for keyid, (_, public) in policy.trusted().items():
            if keyid not in found and _holds(envelope, {keyid: public}, expected):
                found[keyid] = envelope
    return found


def approve(pending: Path, found: Pending, policy: Policy, key: Ed25519PrivateKey) -> str:
    """Sign for a version; returns the approver's label. Raises InputRejected when the key is nobody's."""
    keyid = dsse.key_id(key.public_key().public_bytes_raw())
    known = policy.trusted().get(keyid)
    if known is None:
        raise InputRejected(
            Reason.UNSIGNED,
            f"this key ({keyid[:12]}) is not among those that may approve {found.manifest.name}",
            "have it named with `edge-fleet registry approvers DIR --add LABEL=FILE`",
        )
    envelope = dsse.sign(_payload(found.manifest, found.sha256), TYPE, [key])
    folder = _folder(pending, found.manifest.name, found.manifest.version)
    files.write(folder / f"{keyid}.approval", envelope)
    return known[0]


def forget(pending: Path, name: str, version: str) -> bool:
    """Remove a version from those that await approvals; False when it is not among them."""
    folder = _folder(pending, name, version)
    if not folder.is_dir():
        return False
    files.remove_folder(folder)
    return True


def pack(given: Mapping[str, bytes]) -> bytes:
    """The envelopes as one blob, published with the version."""
    return b"[" + b",".join(given[keyid] for keyid in sorted(given)) + b"]"


def unpack(data: bytes) -> list[bytes]:
    """The other way round. Raises BundleRejected."""
    try:
        plain = canonical.parse(data, limit_bytes=_LIMIT_BYTES)
        return [canonical.to_bytes(item) for item in canonical.from_builtins(plain, list[dict[str, Any]])]
    except canonical.DecodeFault as e:
        raise BundleRejected(
            Reason.TRUST_FAILED, f"approvals: {e.problem} at {e.path}", "restore the blob from a copy"
        ) from e


def labels(given: Mapping[str, bytes], policy: Policy) -> list[str]:
    """Who has approved, for people."""
    return sorted(policy.trusted()[keyid][0] for keyid in given)


def _payload(manifest: Manifest, sha256: str) -> bytes:
    return canonical.to_bytes(Approval(1, manifest.name, manifest.version, sha256))


def _holds(envelope: bytes, trusted: Mapping[str, bytes], expected: bytes) -> bool:
    try:
        return dsse.open_envelope(envelope, TYPE, trusted, 1) == expected
    except MessageRejected:
        return False


def _folder(pending: Path, name: str, version: str) -> Path:
    # Both are names of the manifest's form: no slash, no leading dot.
    if not shelves.is_model(target_name(name, version)):
        raise BundleRejected(
            Reason.MANIFEST_INVALID,
            f"{pending}: {name}@{version} is no model's version",
            "remove this folder; no command of this program makes one of this name",
        )
    return pending / f"{name}@{version}"
