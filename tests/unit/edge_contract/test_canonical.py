"""Canonical bytes out, strict values in."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from edge_contract import canonical
from edge_contract.manifest import Tolerance

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NUMBERS = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


class Leaf(Struct, frozen=True, forbid_unknown_fields=True):
    size: int


class Tree(Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    leaves: list[Leaf] = []
    weights: dict[str, float] = {}


def reordered(value: Any) -> Any:
    """The same value with every object's keys in the opposite order."""
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    if isinstance(value, list):
        return [reordered(item) for item in value]
    return value


def other_number_types(value: Any) -> Any:
    """An equal value, with floats for integers and the other way round where that is exact."""
    if isinstance(value, dict):
        return {key: other_number_types(item) for key, item in value.items()}
    if isinstance(value, list):
        return [other_number_types(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


@given(JSON)
def test_decoding_canonical_bytes_gives_the_value_back(value: Any) -> None:
    data = canonical.to_bytes(value)
    assert canonical.parse(data) == value
    assert canonical.to_bytes(canonical.parse(data)) == data


@given(JSON)
def test_the_order_of_keys_does_not_matter(value: Any) -> None:
    assert canonical.to_bytes(reordered(value)) == canonical.to_bytes(value)


@given(JSON)
def test_equal_values_have_equal_bytes(value: Any) -> None:
    assert other_number_types(value) == value
    assert canonical.to_bytes(other_number_types(value)) == canonical.to_bytes(value)


@given(JSON, JSON)
def test_different_values_have_different_bytes(a: Any, b: Any) -> None:
    # Through json, because 1 == True in Python.
    if json.dumps(other_number_types(a)) != json.dumps(other_number_types(b)) and a != b:
        assert canonical.to_bytes(a) != canonical.to_bytes(b)


@given(JSON)
def test_canonical_bytes_are_what_any_json_reader_reads(value: Any) -> None:
    assert json.loads(canonical.to_bytes(value)) == value


def test_canonical_form() -> None:
    value = {"b": [1.5, None, True], "a": "é\n", "": {}}
    assert canonical.to_bytes(value) == '{"":{},"a":"é\\n","b":[1.5,null,true]}'.encode()


def test_an_integer_in_a_float_field_has_the_bytes_of_its_decoded_self() -> None:
    written = canonical.to_bytes(Tolerance(atol=1, rtol=0))
    assert canonical.to_bytes(canonical.from_bytes(written, Tolerance)) == written


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [-float("inf")]}])
def test_non_finite_numbers_do_not_leave(value: Any) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical.to_bytes(value)


@pytest.mark.parametrize(
    ("data", "path", "problem"),
    [
        (b"", "$", "not JSON: Expecting value at character 0"),
        (b'{"a": 1} x', "$", "not JSON: Extra data at character 9"),
        (b'{"a": 01}', "$", "not JSON"),
        (b"{'a': 1}", "$", "not JSON"),
        (b'\xef\xbb\xbf{"a":1}', "$", "not JSON"),
        (b'{"a": "\xff"}', "$", "not UTF-8 (byte 7)"),
        (b'{"a": "\xed\xa0\x80"}', "$", "not UTF-8 (byte 7)"),
        (b'{"a": {"b": [0, "\\ud800"]}}', "$.a.b[1]", "surrogate"),
        (b'{"a": {"\\udfff": 1}}', "$.a", "surrogate"),
        (b'{"a": 1, "a": 1}', "$.a", "duplicate key"),
        (b'{"a": {"b": [{}, {"c": 1, "d": 2, "c": 3}]}}', "$.a.b[1].c", "duplicate key"),
        (b'{"a": 1, "\\u0061": 2}', "$.a", "duplicate key"),
        (b'{"a": [1, NaN]}', "$.a[1]", "not a finite number"),
        (b'{"a": [Infinity]}', "$.a[0]", "not a finite number"),
        (b'{"a": {"b": -Infinity}}', "$.a.b", "not a finite number"),
        (b'{"a": {"b": 1e999}}', "$.a.b", "not a finite number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "$", "not JSON"),
        (b"[" * 34 + b"]" * 34, "$" + "[0]" * 33, "nested deeper than 32"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "$" + ".a" * 33, "nested deeper than 32"),
        (b"[" * 200_000, "$", "nested too deeply"),
    ],
)
def test_what_is_refused_and_where(data: bytes, path: str, problem: str) -> None:
    with pytest.raises(canonical.DecodeFault) as caught:
        canonical.parse(data)
    assert caught.value.path == path
    assert problem in caught.value.problem
    assert str(caught.value) == f"{caught.value.problem} at {path}"


def test_a_surrogate_pair_is_text() -> None:
    assert canonical.parse(b'"\\ud83d\\ude00"') == "\N{GRINNING FACE}"


def test_nesting_up_to_the_limit_is_fine() -> None:
    data = b"[" * 33 + b"]" * 33
    assert canonical.to_bytes(canonical.parse(data)) == data


def test_the_limit_is_in_bytes_and_exact() -> None:
    data = '"éé"'.encode()
    assert canonical.parse(data, limit_bytes=6) == "éé"
    with pytest.raises(canonical.DecodeFault, match="6 bytes, over the limit of 5"):
        canonical.parse(data, limit_bytes=5)


@pytest.mark.parametrize(
    ("data", "path", "problem"),
    [
        (b"[]", "$", "Expected `object`, got `array`"),
        (b"{}", "$", "missing required field `name`"),
        (b'{"name": 1}', "$.name", "Expected `str`, got `int`"),
        (b'{"name": "a", "other": 1}', "$", "unknown field `other`"),
        (b'{"name": "a", "leaves": [{"size": 1}, {"size": "2"}]}', "$.leaves[1].size", "Expected `int`"),
        (b'{"name": "a", "leaves": [{"size": true}]}', "$.leaves[0].size", "Expected `int`, got `bool`"),
        (b'{"name": "a", "leaves": [{"size": 1.5}]}', "$.leaves[0].size", "Expected `int`, got `float`"),
        (b'{"name": "a", "leaves": [{"size": 1, "x": 1}]}', "$.leaves[0]", "unknown field `x`"),
        (b'{"name": "a", "weights": {"w": "1"}}', "$.weights[...]", "Expected `float`, got `str`"),
        (b'{"name": null}', "$.name", "Expected `str`, got `null`"),
    ],
)
def test_types_are_strict(data: bytes, path: str, problem: str) -> None:
    with pytest.raises(canonical.DecodeFault) as caught:
        canonical.from_bytes(data, Tree)
    assert caught.value.path == path
    assert problem in caught.value.problem


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_foreign_bytes_are_a_value_or_a_fault_and_nothing_else(data: bytes) -> None:
    try:
        value = canonical.parse(data)
    except canonical.DecodeFault:
        return
    assert canonical.parse(canonical.to_bytes(value)) == value


def test_digest_is_sha256() -> None:
    assert canonical.sha256_hex(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
