"""Envelopes: what opens, and what must not."""

from __future__ import annotations

import base64
import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_contract import dsse, wire
from edge_contract.errors import MessageRejected, Reason
from tests.unit.edge_contract.samples import KEY, OPERATORS, SECOND_KEY, STRANGER, raw_public

TYPE = "application/example"
PAYLOAD = b'{"hello":"world"}'
TRUSTED = OPERATORS.trusted()
BOTH = dsse.sign(PAYLOAD, TYPE, [KEY, SECOND_KEY])


def refused(data: bytes, threshold: int = 1) -> MessageRejected:
    with pytest.raises(MessageRejected) as caught:
        dsse.open_envelope(data, TYPE, TRUSTED, threshold)
    return caught.value


def changed(data: bytes, **fields: Any) -> bytes:
    return json.dumps({**json.loads(data), **fields}).encode()


def test_pre_authentication_encoding_is_the_standards_example() -> None:
    assert dsse.pre_authentication_encoding("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


def test_lengths_in_the_encoding_are_of_bytes() -> None:
    assert dsse.pre_authentication_encoding("é", "ü".encode()) == "DSSEv1 2 é 2 ü".encode()


def test_a_key_is_known_by_its_digest() -> None:
    (first, second) = TRUSTED
    assert first == dsse.key_id(raw_public(KEY))
    assert TRUSTED[second] == raw_public(SECOND_KEY)


@pytest.mark.parametrize("threshold", [1, 2])
def test_enough_signatures_open(threshold: int) -> None:
    assert dsse.open_envelope(BOTH, TYPE, TRUSTED, threshold) == PAYLOAD


def test_too_few_signatures_do_not() -> None:
    error = refused(dsse.sign(PAYLOAD, TYPE, [KEY]), threshold=2)
    assert error.reason is Reason.SIGNATURE_INVALID
    assert "1 valid operator signatures, 2 needed" in error.what


def test_one_key_signing_twice_counts_once() -> None:
    assert refused(dsse.sign(PAYLOAD, TYPE, [KEY, KEY]), threshold=2).reason is Reason.SIGNATURE_INVALID


def test_a_strangers_signature_is_no_signature() -> None:
    assert refused(dsse.sign(PAYLOAD, TYPE, [STRANGER])).reason is Reason.UNSIGNED
    assert refused(changed(BOTH, signatures=[])).reason is Reason.UNSIGNED


def test_a_strangers_signature_beside_a_trusted_one_does_no_harm() -> None:
    assert dsse.open_envelope(dsse.sign(PAYLOAD, TYPE, [STRANGER, KEY]), TYPE, TRUSTED, 1) == PAYLOAD


def test_a_stranger_cannot_borrow_a_key_id() -> None:
    envelope = json.loads(dsse.sign(PAYLOAD, TYPE, [STRANGER]))
    envelope["signatures"][0]["keyid"] = dsse.key_id(raw_public(KEY))
    assert refused(json.dumps(envelope).encode()).reason is Reason.SIGNATURE_INVALID


def test_one_bad_signature_does_not_spoil_a_good_one() -> None:
    envelope = json.loads(BOTH)
    envelope["signatures"][0]["sig"] = base64.b64encode(bytes(64)).decode()
    assert dsse.open_envelope(json.dumps(envelope).encode(), TYPE, TRUSTED, 1) == PAYLOAD
    assert refused(json.dumps(envelope).encode(), threshold=2).reason is Reason.SIGNATURE_INVALID


def test_the_type_is_checked_and_signed() -> None:
    other = dsse.sign(PAYLOAD, "application/other", [KEY])
    error = refused(other)
    assert error.reason is Reason.MESSAGE_MALFORMED
    assert "'application/other' where 'application/example' belongs" in error.what
    assert refused(changed(other, payloadType=TYPE)).reason is Reason.SIGNATURE_INVALID


def test_another_payload_under_the_signatures_is_refused() -> None:
    forged = base64.b64encode(PAYLOAD.replace(b"world", b"wOrld")).decode()
    assert refused(changed(BOTH, payload=forged)).reason is Reason.SIGNATURE_INVALID


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (b"", "at $"),
        (b"[]", "at $"),
        (b"{}", "at $"),
        (changed(BOTH, payload=1), "at $.payload"),
        (changed(BOTH, payload="~~~~"), "at $.payload"),
        (changed(BOTH, payload="YQ"), "at $.payload"),
        (changed(BOTH, payload="YQ==\n"), "at $.payload"),
        (changed(BOTH, payload="é"), "at $.payload"),
        (changed(BOTH, extra=1), "at $"),
        (changed(BOTH, signatures={}), "at $.signatures"),
        (changed(BOTH, signatures=[{"keyid": "a"}]), "at $.signatures[0]"),
        (changed(BOTH, signatures=[{"keyid": "a", "sig": "", "cert": ""}]), "at $.signatures[0]"),
        (changed(BOTH, signatures=[{"keyid": "a", "sig": "b"}] * 17), "at $.signatures"),
        (changed(BOTH, signatures=[{"keyid": next(iter(TRUSTED)), "sig": "?"}]), "at $.signatures"),
        (BOTH + b" " * dsse.LIMIT_BYTES, "at $"),
    ],
)
def test_malformed_envelopes_name_the_field(data: bytes, where: str) -> None:
    error = refused(data)
    assert error.reason is Reason.MESSAGE_MALFORMED
    assert error.what.endswith(where)


@given(st.data())
def test_whoever_changes_a_bit_changes_nothing_that_is_believed(data: st.DataObject) -> None:
    """Refused, or (a bit of base64's padding, of a JSON escape) the very payload that was signed."""
    damaged = bytearray(BOTH)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(BOTH) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with suppress(MessageRejected):
        assert dsse.open_envelope(bytes(damaged), TYPE, TRUSTED, 2) == PAYLOAD


@given(st.binary(max_size=64), st.integers(0, 63), st.integers(0, 7))
def test_every_bit_of_a_signature_counts(payload: bytes, byte: int, bit: int) -> None:
    envelope = json.loads(dsse.sign(payload, TYPE, [KEY]))
    signature = bytearray(base64.b64decode(envelope["signatures"][0]["sig"]))
    signature[byte] ^= 1 << bit
    envelope["signatures"][0]["sig"] = base64.b64encode(signature).decode()
    assert refused(json.dumps(envelope).encode()).reason is Reason.SIGNATURE_INVALID


@given(st.binary(max_size=64), st.text(max_size=16))
def test_what_is_signed_opens(payload: bytes, kind: str) -> None:
    try:
        kind.encode()
    except UnicodeEncodeError:
        return
    assert dsse.open_envelope(dsse.sign(payload, kind, [KEY]), kind, TRUSTED, 1) == payload


def test_operators_file_bounds() -> None:
    key = {"public_hex": raw_public(KEY).hex(), "label": "Ada"}
    for bad, where in (
        ({"schema": 1, "threshold": 0, "keys": [key]}, "$.threshold"),
        ({"schema": 1, "threshold": 1, "keys": []}, "$.keys"),
        ({"schema": 1, "threshold": 1, "keys": [key] * 17}, "$.keys"),
        ({"schema": 1, "threshold": 1, "keys": [{**key, "public_hex": "AB" * 32}]}, "$.keys[0].public_hex"),
        ({"schema": 1, "threshold": 1, "keys": [{**key, "public_hex": "ab" * 31}]}, "$.keys[0].public_hex"),
    ):
        with pytest.raises(MessageRejected) as caught:
            wire.decode(json.dumps(bad).encode(), wire.Operators)
        assert caught.value.what.endswith(f"at {where}")
