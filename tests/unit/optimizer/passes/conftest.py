"""How pass tests run a model: in this process, on one thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from optimizer.passes.base import Pass
from optimizer.runtime import Model

Outputs = dict[str, NDArray[Any]]


@pytest.fixture
def outputs() -> Callable[..., Outputs]:
    """Outputs of a model for random inputs of the shape that is asked for."""

    def run(model: onnx.ModelProto, **shapes: tuple[int, ...]) -> Outputs:
        rng = np.random.default_rng(3)
        return Model(model).run({k: rng.normal(size=v).astype(np.float32) for k, v in shapes.items()})

    return run


@pytest.fixture
def applied(outputs: Callable[..., Outputs]) -> Callable[..., onnx.ModelProto]:
    """Apply a pass to a copy, check its promise and that the outputs stay; returns the result."""

    def apply(item: Pass, model: onnx.ModelProto, **shapes: tuple[int, ...]) -> onnx.ModelProto:
        assert item.requires(model) is None
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        changed = item.apply(copy)
        assert item.ensures(changed) is None
        assert item.requires(changed) is not None, "a second run would find more to do"
        before, after = outputs(model, **shapes), outputs(changed, **shapes)
        assert before.keys() == after.keys()
        for name, value in before.items():
            np.testing.assert_allclose(after[name], value, rtol=1e-4, atol=1e-5)
        return changed

    return apply
