"""Constant nodes to initializers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from optimizer.passes.constants import Constants
from tests.unit.optimizer.passes.graphs import model, ops


@pytest.mark.parametrize(
    ("constant", "expected"),
    [
        ("Constant <value = float[2] {1.0, 2.0}> ()", np.array([1, 2], np.float32)),
        ("Constant <value_float = 3.0> ()", np.array(3, np.float32)),
        ("Constant <value_floats = [3.0, 4.0]> ()", np.array([3, 4], np.float32)),
    ],
)
def test_the_value_becomes_a_weight_of_the_same_name(
    constant: str, expected: np.ndarray, applied: Callable[..., onnx.ModelProto]
) -> None:
    given = model(f"g (float[2] x) => (float[2] y) {{ c = {constant}  y = Add(x, c) }}")
    changed = applied(Constants(), given, x=(2,))
    assert ops(changed) == ["Add"]
    (weight,) = changed.graph.initializer
    assert weight.name == "c"
    value = numpy_helper.to_array(weight)
    assert value.dtype == expected.dtype
    np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize(
    ("constant", "expected"), [("value_int = 2", np.array(2)), ("value_ints = [1, 2]", np.array([1, 2]))]
)
def test_integers_too(constant: str, expected: np.ndarray, applied: Callable[..., onnx.ModelProto]) -> None:
    given = model(
        f"g (float[2] x) => (float[2] y) {{ c = Constant <{constant}> ()"
        "  f = Cast <to = 1> (c)  y = Add(x, f) }"
    )
    (weight,) = applied(Constants(), given, x=(2,)).graph.initializer
    np.testing.assert_array_equal(numpy_helper.to_array(weight), expected)


def test_strings_and_constant_outputs_stay_nodes() -> None:
    text = 'g (float[2] x) => (float[2] y, string s) { y = Relu(x)  s = Constant <value_string = "a"> () }'
    assert Constants().requires(model(text)) == "no Constant nodes"
    text = "g (float[2] x) => (float[2] y, float c) { y = Relu(x)  c = Constant <value_float = 1.0> () }"
    assert Constants().requires(model(text)) == "no Constant nodes"


def test_a_left_node_breaks_the_promise() -> None:
    text = "g (float[2] x) => (float[2] y) { c = Constant <value_float = 1.0> ()  y = Add(x, c) }"
    assert Constants().ensures(model(text)) == "a Constant node is left"
