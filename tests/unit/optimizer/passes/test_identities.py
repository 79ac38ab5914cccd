"""Nodes that pass their input on."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import pytest

from optimizer.passes.identities import Identities
from tests.unit.optimizer.passes.graphs import model, ops

IF = """
g (float[2] x, bool c) => (float[2] y) {
  i = Identity(x)
  y = If (c) <then_branch = t () => (float[2] a) { a = Relu(i) },
              else_branch = e () => (float[2] b) { b = Neg(i) }>
}
"""

DROPOUT = """
g (float[2] x) => (float[2] y) <float r = {0.5}, bool t = {T}> { d = Dropout(x, r, t)  y = Relu(d) }
"""


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("i = Identity(x)  y = Relu(i)", ["Relu"]),
        ("r = Relu(x)  y = Identity(r)", ["Relu"]),
        ("i = Identity(x)  j = Identity(i)  k = Identity(j)  y = Relu(k)", ["Relu"]),
        ("d = Dropout(x)  y = Relu(d)", ["Relu"]),
        ("r = Relu(x)  i = Identity(r)  n = Neg(r)  y = Add(i, n)", ["Relu", "Neg", "Add"]),
    ],
)
def test_they_go(body: str, left: list[str], applied: Callable[..., onnx.ModelProto]) -> None:
    changed = applied(Identities(), model(f"g (float[2] x) => (float[2] y) {{ {body} }}"), x=(2,))
    assert ops(changed) == left
    assert changed.graph.output[0].name == "y"


@pytest.mark.parametrize(
    "text",
    [
        # an input that is an output: something must carry the other name
        "g (float[2] x) => (float[2] y) { y = Identity(x) }",
        # two outputs of one value
        "g (float[2] x) => (float[2] y, float[2] z) { y = Relu(x)  z = Identity(y) }",
        # the mask is used
        "g (float[2] x) => (float[2] y, bool[2] m) { y, m = Dropout(x) }",
        # training
        DROPOUT.replace("T", "1"),
    ],
)
def test_they_stay_where_they_do_something(text: str) -> None:
    assert Identities().requires(model(text)) == "no Identity or Dropout nodes"


def test_dropout_told_not_to_train_goes(applied: Callable[..., onnx.ModelProto]) -> None:
    assert ops(applied(Identities(), model(DROPOUT.replace("T", "0")), x=(2,))) == ["Relu"]


def test_not_beside_control_flow() -> None:
    assert Identities().requires(model(IF)) == "the graph has control flow"
