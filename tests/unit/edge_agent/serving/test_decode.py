"""Requests: every datatype both ways, and every row of bad input, JSON and binary."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_agent.serving.codec import Request
from edge_agent.serving.decode import decode
from edge_agent.serving.encode import encode
from edge_agent.serving.tensors import NUMPY, Array
from edge_contract.errors import Reason, RequestRejected
from edge_contract.manifest import Datatype, Tensor

X = Tensor("x", "FP32", [-1, 3])
Y = Tensor("y", "FP32", [-1, 2])
GOOD = {"name": "x", "shape": [2, 3], "datatype": "FP32", "data": [1, 2, 3, 4.5, 5, 6]}


def from_json(
    document: Any, inputs: list[Tensor] | None = None, outputs: list[Tensor] | None = None
) -> Request:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return decode(body, None, inputs or [X], outputs or [Y])


def from_binary(header: Any, data: bytes, inputs: list[Tensor] | None = None) -> Request:
    encoded = json.dumps(header).encode()
    return decode(encoded + data, len(encoded), inputs or [X], [Y])


def binary_x(size: Any = 24, **changes: Any) -> dict[str, Any]:
    tensor = {"name": "x", "shape": [2, 3], "datatype": "FP32", "parameters": {"binary_data_size": size}}
    return {"inputs": [{**tensor, **changes}]}


def test_json_flat_and_nested_data_are_the_same_array() -> None:
    flat = from_json({"inputs": [GOOD]}).inputs["x"]
    nested = from_json({"inputs": [{**GOOD, "data": [[1, 2, 3], [4.5, 5, 6]]}]}).inputs["x"]
    np.testing.assert_array_equal(flat, np.array([[1, 2, 3], [4.5, 5, 6]], np.float32))
    np.testing.assert_array_equal(nested, flat)
    assert flat.dtype == nested.dtype == np.float32


def test_nesting_of_three_dimensions() -> None:
    tensor = Tensor("t", "INT32", [2, 3, 4])
    expected = np.arange(24, dtype=np.int32).reshape(2, 3, 4)
    item = {"name": "t", "shape": [2, 3, 4], "datatype": "INT32", "data": expected.tolist()}
    np.testing.assert_array_equal(from_json({"inputs": [item]}, [tensor]).inputs["t"], expected)


def test_without_outputs_all_are_wanted_as_json() -> None:
    assert from_json({"inputs": [GOOD]}).wanted == {"y": False}


def test_what_the_request_wants_as_binary() -> None:
    outputs = [Y, Tensor("z", "INT64", [-1])]
    asked = {"inputs": [GOOD], "parameters": {"binary_data_output": True}}
    assert from_json(asked, outputs=outputs).wanted == {"y": True, "z": True}
    asked["outputs"] = [{"name": "z", "parameters": {"binary_data": False}}, {"name": "y"}]
    request = from_json(asked, outputs=outputs)
    assert list(request.wanted.items()) == [("z", False), ("y", True)]


def test_the_id_and_unknown_parameters_are_taken() -> None:
    request = from_json(
        {"id": "7", "inputs": [{**GOOD, "parameters": {"mine": [1]}}], "parameters": {"p": 1}}
    )
    assert request.id == "7"


def test_binary_data_that_starts_at_an_odd_byte_is_aligned() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    for padding in range(4):
        array = from_binary({**binary_x(), "id": "i" * padding}, values.tobytes()).inputs["x"]
        assert array.flags.aligned
        np.testing.assert_array_equal(array, values)


def test_two_binary_tensors_and_a_json_one_keep_their_order() -> None:
    tensors = [Tensor("a", "INT16", [2]), Tensor("b", "FP32", [1]), Tensor("c", "UINT8", [3])]
    header = {
        "inputs": [
            {"name": "c", "shape": [3], "datatype": "UINT8", "parameters": {"binary_data_size": 3}},
            {"name": "b", "shape": [1], "datatype": "FP32", "data": [0.5]},
            {"name": "a", "shape": [2], "datatype": "INT16", "parameters": {"binary_data_size": 4}},
        ]
    }
    inputs = from_binary(header, b"\x01\x02\x03" + struct.pack("<hh", -1, 300), tensors).inputs
    assert inputs["c"].tolist() == [1, 2, 3]
    assert inputs["b"].tolist() == [0.5]
    assert inputs["a"].tolist() == [-1, 300]


def arrays_of(datatype: Datatype) -> st.SearchStrategy[Array]:
    shape = hnp.array_shapes(min_dims=1, max_dims=3, max_side=4)
    if datatype == "BYTES":
        return hnp.arrays(np.object_, shape, elements=st.text(max_size=5).map(str.encode))
    elements: Any = None
    if datatype in ("FP32", "FP64"):
        width = 32 if datatype == "FP32" else 64
        elements = st.floats(allow_nan=False, allow_infinity=False, width=width)
    return hnp.arrays(NUMPY[datatype], shape, elements=elements)


@pytest.mark.parametrize("datatype", list(NUMPY))
@given(data=st.data())
def test_every_datatype_goes_through_both_forms_unchanged(datatype: Datatype, data: st.DataObject) -> None:
    array = data.draw(arrays_of(datatype))
    tensor = Tensor("t", datatype, list(array.shape))
    for binary in (True, False) if datatype != "FP16" else (True,):
        request = Request("id", {}, {"t": binary})
        encoded = encode("m", "1", request, {"t": array}, [tensor])
        again = as_request(encoded.body, encoded.header_length)
        got = decode(again[0], again[1], [tensor], [Y]).inputs["t"]
        assert got.dtype == array.dtype
        assert got.tobytes() == array.tobytes() if datatype != "BYTES" else got.tolist() == array.tolist()


def as_request(body: bytes, header_length: int | None) -> tuple[bytes, int | None]:
    """The outputs of a response as the inputs of a request: both have the same form."""
    header = json.loads(body[:header_length])
    encoded = json.dumps({"inputs": header["outputs"]}).encode()
    if header_length is None:
        return encoded, None
    return encoded + body[header_length:], len(encoded)


# what is wrong → (the document, what the message must name)
BAD_JSON: dict[str, tuple[Any, str]] = {
    "wrong name": ({"inputs": [{**GOOD, "name": "image"}]}, "no input 'image'; it takes x FP32 [-1, 3]"),
    "missing": ({"inputs": []}, "x FP32 [-1, 3] is missing"),
    "twice": ({"inputs": [GOOD, GOOD]}, "'x' is given twice"),
    "wrong type": ({"inputs": [{**GOOD, "datatype": "INT64"}]}, "declared INT64, the model takes x FP32"),
    "no such type": ({"inputs": [{**GOOD, "datatype": "FLOAT"}]}, "declared FLOAT"),
    "wrong rank": ({"inputs": [{**GOOD, "shape": [6]}]}, "shape [6], the model takes x FP32 [-1, 3]"),
    "wrong extent": ({"inputs": [{**GOOD, "shape": [3, 2]}]}, "shape [3, 2]"),
    "empty batch": ({"inputs": [{**GOOD, "shape": [0, 3], "data": []}]}, "shape [0, 3]"),
    "negative extent": ({"inputs": [{**GOOD, "shape": [-1, 3]}]}, "shape [-1, 3]"),
    "too few values": ({"inputs": [{**GOOD, "data": [1, 2]}]}, "2 elements, its shape [2, 3] needs 6"),
    "too many values": ({"inputs": [{**GOOD, "data": [0] * 7}]}, "7 elements"),
    "huge shape": ({"inputs": [{**GOOD, "shape": [10**15, 3]}]}, "needs 3000000000000000"),
    "text for numbers": ({"inputs": [{**GOOD, "data": ["a"] * 6}]}, "'x': its data are not FP32"),
    "bool for numbers": ({"inputs": [{**GOOD, "data": [True] * 6}]}, "'x': its data are not FP32"),
    "null among numbers": ({"inputs": [{**GOOD, "data": [None] * 6}]}, "'x': its data are not FP32"),
    "data is null": ({"inputs": [{**GOOD, "data": None}]}, "'x': its data are not FP32"),
    "data is an object": ({"inputs": [{**GOOD, "data": {"0": 1}}]}, "'x': its data are not FP32"),
    "ragged": ({"inputs": [{**GOOD, "data": [[1, 2, 3], [4, 5]]}]}, "do not have the shape [2, 3]"),
    "nested too deep": ({"inputs": [{**GOOD, "data": [[[1, 2, 3], [4, 5, 6]]]}]}, "'x': its data are not"),
    "beyond FP32": ({"inputs": [{**GOOD, "data": [1e39] * 6}]}, "a value is outside FP32"),
    "no data": ({"inputs": [{k: v for k, v in GOOD.items() if k != "data"}]}, "'x' needs either data or"),
    "data and size": (
        {"inputs": [{**GOOD, "parameters": {"binary_data_size": 24}}]},
        "'x' needs either data or",
    ),
    "unknown key of a tensor": ({"inputs": [{**GOOD, "dtype": "FP32"}]}, "unknown field `dtype`"),
    "unknown key": ({"inputs": [GOOD], "model": "m"}, "unknown field `model`"),
    "no inputs": ({}, "missing required field `inputs`"),
    "inputs is an object": ({"inputs": {"x": GOOD}}, "Expected `array`"),
    "id is a number": ({"id": 7, "inputs": [GOOD]}, "$.id"),
    "not an object": ([], "Expected `object`"),
    "unknown output": ({"inputs": [GOOD], "outputs": [{"name": "q"}]}, "no output 'q'; it gives y FP32"),
    "output twice": ({"inputs": [GOOD], "outputs": [{"name": "y"}] * 2}, "'y' is asked for twice"),
    "flag that is none": (
        {"inputs": [GOOD], "outputs": [{"name": "y", "parameters": {"binary_data": 1}}]},
        "binary_data is not true or false",
    ),
    "shared memory": (
        {"inputs": [{**GOOD, "parameters": {"shared_memory_region": "r"}}]},
        "parameter 'shared_memory_region', which is not supported",
    ),
    "sequences": ({"inputs": [GOOD], "parameters": {"sequence_id": 1}}, "'sequence_id', which is not"),
    "classification": (
        {"inputs": [GOOD], "outputs": [{"name": "y", "parameters": {"classification": 2}}]},
        "'classification', which is not supported",
    ),
}


@pytest.mark.parametrize("row", BAD_JSON)
def test_bad_json_requests(row: str) -> None:
    document, expected = BAD_JSON[row]
    with pytest.raises(RequestRejected) as refusal:
        from_json(document)
    assert refusal.value.status == 400
    assert refusal.value.reason is Reason.BAD_TENSOR
    assert expected in refusal.value.what
    assert refusal.value.next_step


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff\xfe", b'{"parameters": {"p": ' + b"[" * 100_000, b'{"inputs": [NaN]}', b"PK\x03\x04"],
)
def test_bodies_that_are_no_json(body: bytes) -> None:
    with pytest.raises(RequestRejected) as refusal:
        from_json(body)
    assert (refusal.value.status, refusal.value.reason) == (400, Reason.BAD_INPUT)


BAD_BINARY: dict[str, tuple[Any, bytes, str]] = {
    "too short": (binary_x(20), b"\0" * 20, "'x' of shape [2, 3] and type FP32 has 20 bytes of data, 24"),
    "too long": (binary_x(28), b"\0" * 28, "has 28 bytes of data, 24 were expected"),
    "announced more than sent": (binary_x(24), b"\0" * 23, "'x' announces 24 bytes, the body has 23 left"),
    "sent more than announced": (binary_x(24), b"\0" * 25, "1 bytes more than its tensors announce"),
    "negative size": (binary_x(-1), b"\0" * 24, "'x' announces -1 bytes"),
    "size is text": (binary_x("24"), b"\0" * 24, "binary_data_size is not an integer"),
    "size is a truth": (binary_x(True), b"\0", "binary_data_size is not an integer"),
    "wrong name": (binary_x(name="image"), b"\0" * 24, "no input 'image'"),
    "wrong type": (binary_x(datatype="FP64"), b"\0" * 24, "declared FP64"),
    "wrong shape": (binary_x(shape=[6, 1]), b"\0" * 24, "shape [6, 1]"),
    "huge shape": (binary_x(shape=[2**62, 3]), b"\0" * 24, "has 24 bytes of data, 55340232221128654848"),
}


@pytest.mark.parametrize("row", BAD_BINARY)
def test_bad_binary_requests(row: str) -> None:
    header, data, expected = BAD_BINARY[row]
    with pytest.raises(RequestRejected) as refusal:
        from_binary(header, data)
    assert (refusal.value.status, refusal.value.reason) == (400, Reason.BAD_TENSOR)
    assert expected in refusal.value.what


@pytest.mark.parametrize("length", [0, 10_000])
def test_a_json_part_that_is_not_in_the_body(length: int) -> None:
    with pytest.raises(RequestRejected, match="bytes of JSON") as refusal:
        decode(json.dumps(binary_x()).encode(), length, [X], [Y])
    assert refusal.value.reason is Reason.BAD_INPUT


def test_binary_data_without_the_header() -> None:
    with pytest.raises(RequestRejected, match="the body has no binary part"):
        from_json(binary_x())


@pytest.mark.parametrize(
    ("datatype", "value"),
    [
        ("INT8", 128),
        ("UINT8", -1),
        ("INT16", 1 << 15),
        ("UINT32", 1 << 32),
        ("UINT64", 1 << 64),
        ("INT64", 1 << 63),
    ],
)
def test_integers_outside_their_type(datatype: Datatype, value: int) -> None:
    item = {"name": "t", "shape": [1], "datatype": datatype, "data": [value]}
    with pytest.raises(RequestRejected, match="tensor 't'") as refusal:
        from_json({"inputs": [item]}, [Tensor("t", datatype, [1])])
    assert datatype in refusal.value.what


def test_fractions_are_no_integers() -> None:
    item = {"name": "t", "shape": [1], "datatype": "INT32", "data": [1.5]}
    with pytest.raises(RequestRejected, match="not INT32 values: Expected `int`, got `float`"):
        from_json({"inputs": [item]}, [Tensor("t", "INT32", [1])])


def test_fp16_has_no_json_form_in_either_direction() -> None:
    half = Tensor("h", "FP16", [1])
    item = {"name": "h", "shape": [1], "datatype": "FP16", "data": [1.0]}
    with pytest.raises(RequestRejected, match="'h' is FP16, which JSON has no form for"):
        from_json({"inputs": [item]}, [half])
    with pytest.raises(RequestRejected, match="output 'h' is FP16"):
        from_json({"inputs": [GOOD]}, outputs=[half])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\x05\0\0\0ab", "element 0 runs past the end"),
        (b"\x01\0\0\0a\x02\0", "element 1 runs past the end"),
        (b"\x01\0\0\0a", "has 1 elements, its shape \\[2\\] needs 2"),
        (b"\xff\xff\xff\xff", "element 0 runs past the end"),
    ],
)
def test_bytes_elements_that_do_not_add_up(data: bytes, expected: str) -> None:
    item = {"name": "s", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}
    with pytest.raises(RequestRejected, match=expected):
        from_binary({"inputs": [item]}, data, [Tensor("s", "BYTES", [-1])])


def test_a_bool_that_is_neither_0_nor_1() -> None:
    item = {"name": "b", "shape": [2], "datatype": "BOOL", "parameters": {"binary_data_size": 2}}
    with pytest.raises(RequestRejected, match="neither 0 nor 1"):
        from_binary({"inputs": [item]}, b"\x01\x02", [Tensor("b", "BOOL", [2])])


@given(st.binary(max_size=200), st.none() | st.integers(-5, 250))
def test_no_body_breaks_the_decoder(body: bytes, length: int | None) -> None:
    with pytest.raises(RequestRejected):
        decode(body, length, [X], [Y])


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.sampled_from(["name", "shape", "datatype", "data", "parameters"]), JSON_VALUES, st.binary(max_size=30)
)
def test_no_value_of_a_field_breaks_the_decoder(field: str, value: Any, data: bytes) -> None:
    """Whatever a field holds: a request, or a refusal that says why."""
    document = json.dumps({"inputs": [{**GOOD, field: value}]}).encode()
    with suppress(RequestRejected):
        request = decode(document + data, len(document), [X], [Y])
        assert request.inputs["x"].shape[1] == 3
