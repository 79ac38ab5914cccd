"""What no output depends on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import numpy_helper

from optimizer.passes.dead_code import DeadCode
from tests.unit.optimizer.passes.graphs import model, ops

IF = """
g (float[2] x, bool c) => (float[2] y) {
  used = Relu(x)
  unused = Neg(x)
  y = If (c) <then_branch = t () => (float[2] a) { a = Neg(used) },
              else_branch = e () => (float[2] b) { b = Abs(used) }>
}
"""


def test_unused_nodes_go_with_all_that_fed_only_them(applied: Callable[..., onnx.ModelProto]) -> None:
    given = model(
        "g (float[2] x) => (float[2] y) { a = Neg(x)  b = Abs(a)  c = Add(b, w)  y = Relu(x) }",
        w=numpy_helper.from_array(np.ones(2, np.float32)),
    )
    given.graph.value_info.append(onnx.helper.make_tensor_value_info("a", 1, [2]))
    changed = applied(DeadCode(), given, x=(2,))
    assert ops(changed) == ["Relu"]
    assert not changed.graph.initializer
    assert not changed.graph.value_info


def test_what_a_branch_uses_is_used() -> None:
    changed = DeadCode().apply(model(IF))
    assert ops(changed) == ["Relu", "If"]


def test_nothing_to_do() -> None:
    assert DeadCode().requires(model("g (float[2] x) => (float[2] y) { y = Relu(x) }")) == "nothing is unused"
