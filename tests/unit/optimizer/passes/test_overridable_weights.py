"""Weights that are inputs too."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import pytest

from optimizer.passes.overridable_weights import OverridableWeights
from tests.unit.optimizer import nets
from tests.unit.optimizer.passes.graphs import model


def test_weights_are_no_inputs_any_more(applied: Callable[..., onnx.ModelProto]) -> None:
    changed = applied(OverridableWeights(), nets.classifier(old_style=True), image=(2, 1, 8, 8))
    assert [value.name for value in changed.graph.input] == ["image"]


def test_a_file_of_the_old_format_becomes_one_that_may_omit_them() -> None:
    old = nets.classifier(old_style=True)
    old.ir_version = 3
    assert OverridableWeights().apply(old).ir_version == 8


@pytest.mark.parametrize("text", ["g (float[2] x) => (float[2] y) { y = Relu(x) }"])
def test_it_leaves_other_models_alone(text: str) -> None:
    assert OverridableWeights().requires(model(text)) == "no weight is an input"
