"""Types and shapes of all values."""

from __future__ import annotations

from collections.abc import Callable

import onnx

from optimizer.passes.shapes import Shapes
from tests.unit.optimizer.passes.graphs import model


def test_every_value_gets_its_shape(applied: Callable[..., onnx.ModelProto]) -> None:
    given = model("g (float[N,3] x) => (float[N,3] y) { a = Relu(x)  b = Neg(a)  y = Abs(b) }")
    changed = applied(Shapes(), given, x=(2, 3))
    infos = changed.graph.value_info
    found = {v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim] for v in infos}
    assert found == {"a": ["N", 3], "b": ["N", 3]}


def test_what_stays_unknown_hinders_nobody_else() -> None:
    text = "g (float[2] x) => (float[N] y) { a = Relu(x)  b = com.other.Thing(a)  y = Relu(b) }"
    changed = Shapes().apply(model(text, others=', "com.other": 1'))
    assert [v.name for v in changed.graph.value_info] == ["a"]
    assert Shapes().ensures(changed) is None


def test_a_model_without_any_type_breaks_the_promise() -> None:
    given = model("g (float[2] x) => (float[2] y) { a = Relu(x)  y = Relu(a) }")
    given.graph.output[0].ClearField("type")
    assert Shapes().ensures(given) == "no value has got a type"


def test_nothing_to_do() -> None:
    assert (
        Shapes().requires(model("g (float[2] x) => (float[2] y) { y = Relu(x) }")) == "all shapes are known"
    )
