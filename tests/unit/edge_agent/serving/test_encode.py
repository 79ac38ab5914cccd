"""Responses: order, forms, and answers that no form can carry."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edge_agent.serving.codec import Request
from edge_agent.serving.encode import encode
from edge_contract.errors import Reason, RequestRejected
from edge_contract.manifest import Tensor

Y = Tensor("y", "FP32", [-1, 2])
S = Tensor("s", "BYTES", [-1])


def text(*values: bytes) -> np.ndarray:
    array = np.empty(len(values), np.object_)
    array[:] = values
    return array


def test_a_json_answer() -> None:
    request = Request("42", {}, {"y": False})
    encoded = encode("m", "1.2", request, {"y": np.array([[0.5, 2]], np.float32)}, [Y])
    assert encoded.header_length is None
    assert json.loads(encoded.body) == {
        "model_name": "m",
        "model_version": "1.2",
        "id": "42",
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [0.5, 2.0]}],
    }


def test_a_mixed_answer_in_the_order_wanted() -> None:
    results = {"y": np.array([[1, 2]], np.float32), "s": text(b"ab", b"")}
    encoded = encode("m", "1", Request(None, {}, {"s": True, "y": False}), results, [Y, S])
    assert encoded.header_length is not None
    header = json.loads(encoded.body[: encoded.header_length])
    assert [o["name"] for o in header["outputs"]] == ["s", "y"]
    assert header["outputs"][0]["parameters"] == {"binary_data_size": 10}
    assert "data" not in header["outputs"][0]
    assert header["outputs"][1]["data"] == [1.0, 2.0]
    assert "id" not in header
    assert encoded.body[encoded.header_length :] == b"\x02\0\0\0ab\0\0\0\0"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_json_has_no_form_for_what_is_not_finite(value: float) -> None:
    results = {"y": np.array([[1, value]], np.float32)}
    with pytest.raises(RequestRejected, match="output 'y' holds NaN or infinity") as refusal:
        encode("m", "1", Request(None, {}, {"y": False}), results, [Y])
    assert (refusal.value.status, refusal.value.reason) == (500, Reason.NON_FINITE_OUTPUT)
    binary = encode("m", "1", Request(None, {}, {"y": True}), results, [Y])
    assert binary.body.endswith(results["y"].tobytes())


def test_json_has_no_form_for_bytes_that_are_not_utf8() -> None:
    with pytest.raises(RequestRejected, match="output 's' holds bytes that are not UTF-8"):
        encode("m", "1", Request(None, {}, {"s": False}), {"s": text(b"\xff")}, [S])


@pytest.mark.parametrize("array", [np.zeros((1, 2), np.float64), np.zeros(2, np.float32)])
def test_an_answer_of_another_type_or_rank_than_promised(array: np.ndarray) -> None:
    with pytest.raises(RequestRejected, match=r"where it promises y FP32 \[-1, 2\]") as refusal:
        encode("m", "1", Request(None, {}, {"y": True}), {"y": array}, [Y])
    assert refusal.value.status == 500


def test_a_transposed_answer_is_sent_row_by_row() -> None:
    array = np.arange(4, dtype=np.float32).reshape(2, 2).T
    encoded = encode("m", "1", Request(None, {}, {"y": True}), {"y": array}, [Y])
    assert encoded.body.endswith(np.ascontiguousarray(array).tobytes())
