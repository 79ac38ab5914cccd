"""Pure: DSSE envelopes (Dead Simple Signing Envelope v1) with Ed25519 keys.

Source: https://github.com/secure-systems-lab/dsse/blob/master/protocol.md
Which keys are trusted is not decided here: the device learns them from TUF metadata.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Annotated

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec import Meta, Struct

from edge_contract import canonical
from edge_contract.errors import MessageRejected, Reason

LIMIT_BYTES = 256 << 10


class Signature(Struct, frozen=True, forbid_unknown_fields=True):
    """One signature: the key's id and the base64 signature over the envelope's encoding."""

    keyid: Annotated[str, Meta(max_length=128)]
    sig: Annotated[str, Meta(max_length=1024)]


class Envelope(Struct, frozen=True, forbid_unknown_fields=True):
    """A payload with its type and signatures, as it travels."""

    payload: str
    payloadType: Annotated[str, Meta(max_length=256)]  # noqa: N815 - the standard's name
    signatures: Annotated[list[Signature], Meta(max_length=16)]


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """The bytes that are signed: `DSSEv1 SP len(type) SP type SP len(body) SP body`."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def key_id(public: bytes) -> str:
    """Id of a raw 32-byte Ed25519 public key: the SHA-256 of it."""
    return canonical.sha256_hex(public)


def sign(payload: bytes, payload_type: str, keys: list[Ed25519PrivateKey]) -> bytes:
    """Envelope bytes over `payload`, signed by each key."""
    message = pre_authentication_encoding(payload_type, payload)
    signatures = [
        Signature(key_id(key.public_key().public_bytes_raw()), base64.b64encode(key.sign(message)).decode())
        for key in keys
    ]
    body = base64.b64encode(payload).decode()
    return canonical.to_bytes(Envelope(body, payload_type, signatures))


def open_envelope(data: bytes, payload_type: str, trusted: Mapping[str, bytes], threshold: int) -> bytes:
    """The payload, if at least `threshold` different trusted keys signed it.

    `trusted` maps key ids to raw public keys. Raises MessageRejected.
    """
    envelope = _decode(data)
    if envelope.payloadType != payload_type:
        raise MessageRejected(
            Reason.MESSAGE_MALFORMED,
            f"envelope of type {envelope.payloadType!r} where {payload_type!r} belongs",
            "send it on the topic of its type",
        )
    payload = _unbase64(envelope.payload, "$.payload")
    message = pre_authentication_encoding(payload_type, payload)
    known = [s for s in envelope.signatures if s.keyid in trusted]
    if not known:
        raise MessageRejected(
            Reason.UNSIGNED,
            "no signature by a trusted operator key",
            "sign with a key that the registry names: "
            "`edge-fleet registry keys list --check` says which file counts",
        )
    valid = {s.keyid for s in known if _verifies(trusted[s.keyid], s, message)}
    if len(valid) < threshold:
        raise MessageRejected(
            Reason.SIGNATURE_INVALID,
            f"{len(valid)} valid operator signatures, {threshold} needed",
            "sign again; if this repeats, look for whoever alters messages on the broker",
        )
    return payload


def _verifies(public: bytes, signature: Signature, message: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(_unbase64(signature.sig, "$.signatures"), message)
    except InvalidSignature:
        return False
    return True


def _decode(data: bytes) -> Envelope:
    try:
        return canonical.from_bytes(data, Envelope, limit_bytes=LIMIT_BYTES)
    except canonical.DecodeFault as e:
        raise MessageRejected(
            Reason.MESSAGE_MALFORMED,
            f"not a DSSE envelope: {e.problem} at {e.path}",
            "send it with edge-fleet, which signs what it sends",
        ) from e


def _unbase64(text: str, path: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as e:
        raise MessageRejected(
            Reason.MESSAGE_MALFORMED, f"not base64 at {path}", "send it with edge-fleet, which encodes it"
        ) from e
