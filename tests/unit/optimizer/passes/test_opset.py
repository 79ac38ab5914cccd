"""Older models to opset 17."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import pytest

from optimizer.artifact import opset
from optimizer.passes.base import PassFailed
from optimizer.passes.opset import Opset
from tests.unit.optimizer import nets
from tests.unit.optimizer.passes.graphs import model


@pytest.mark.parametrize("old", [9, 11, 13])
def test_an_older_model_is_upgraded(old: int, applied: Callable[..., onnx.ModelProto]) -> None:
    changed = applied(Opset(), nets.classifier(opset=old), image=(2, 1, 8, 8))
    assert opset(changed) == 17


@pytest.mark.parametrize("new", [17, 18])
def test_a_newer_one_stays(new: int) -> None:
    assert Opset().requires(nets.classifier(opset=new)) == f"the model's opset is {new}"


def test_what_the_converter_cannot_do_is_said() -> None:
    given = model(
        "g (float[2,3,4,4] x, float[3] s, float[3] b, float[3] m, float[3] v) => (float[2,3,4,4] y)"
        " { y = BatchNormalization <spatial = 0> (x, s, b, m, v) }",
        8,
    )
    with pytest.raises(PassFailed, match=r"^kept opset 8: .*spatial"):
        Opset().apply(given)


def test_a_model_that_did_not_change_breaks_the_promise() -> None:
    assert Opset().ensures(nets.classifier(opset=11)) == "opset is 11"
