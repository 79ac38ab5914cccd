"""The runner: what it applies, and what it drops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from optimizer.passes import cleanup
from optimizer.passes.base import PassFailed
from optimizer.passes.outcome import PassOutcome
from tests.unit.optimizer import nets
from tests.unit.optimizer.passes.graphs import model, ops

Outputs = dict[str, NDArray[Any]]
GIVEN = "g (float[2] x) => (float[2] y) { a = Neg(x)  y = Relu(a) }"


class Fake:
    """A pass that does as told."""

    name = "fake"

    def __init__(self, change: Callable[[onnx.ModelProto], None], broken: str | None = None) -> None:
        self.change = change
        self.broken = broken

    def requires(self, model: onnx.ModelProto) -> str | None:
        return None

    def apply(self, model: onnx.ModelProto) -> onnx.ModelProto:
        self.change(model)
        return model

    def ensures(self, model: onnx.ModelProto) -> str | None:
        return self.broken


def swap_relu(found: onnx.ModelProto) -> None:
    found.graph.node[1].op_type = "Abs"


def rename_output(found: onnx.ModelProto) -> None:
    found.graph.node[1].output[0] = found.graph.output[0].name = "z"


def unload(found: onnx.ModelProto) -> None:
    found.graph.node[1].op_type = "NoSuchOperator"


def give_up(found: onnx.ModelProto) -> None:
    raise PassFailed("not with this one")


def stumble(found: onnx.ModelProto) -> None:
    raise KeyError("left")


@pytest.mark.parametrize(
    ("fake", "detail"),
    [
        (Fake(swap_relu), "output 'y' changed by up to "),
        (Fake(rename_output), "inputs or outputs changed"),
        (Fake(unload), "RuntimeFault: "),
        (Fake(give_up), "not with this one"),
        (Fake(stumble), "KeyError: 'left'"),
        (Fake(lambda _: None, broken="a promise"), "a promise"),
    ],
)
def test_a_pass_that_does_not_hold_is_dropped_and_said(
    fake: Fake, detail: str, outputs: Callable[..., Outputs]
) -> None:
    given = model(GIVEN)
    before = given.SerializeToString()
    cleaned, (outcome,) = cleanup.run(given, lambda m: outputs(m, x=(2,)), passes=[fake])
    assert outcome.status == "dropped"
    assert outcome.detail.startswith(detail)
    assert cleaned.SerializeToString() == before


def test_all_passes_on_an_old_export(outputs: Callable[..., Outputs]) -> None:
    given = nets.classifier(opset=11, old_style=True)
    shape = (4, 1, 8, 8)
    cleaned, outcomes = cleanup.run(given, lambda m: outputs(m, image=shape))
    applied = {o.name for o in outcomes if o.status == "applied"}
    assert applied >= {
        *("weights are not inputs", "opset 17", "constants to initializers"),
        *("identities removed", "batch normalization folded"),
    }
    assert not [o for o in outcomes if o.status == "dropped"]
    assert ops(cleaned) == ["Conv", "Relu", "Flatten", "Gemm"]
    np.testing.assert_allclose(
        outputs(cleaned, image=shape)["logits"], outputs(given, image=shape)["logits"], rtol=1e-4, atol=1e-5
    )


def test_a_pass_that_crashed_before_is_left_out_and_each_start_is_told(
    outputs: Callable[..., Outputs],
) -> None:
    started: list[str] = []
    _, outcomes = cleanup.run(
        nets.classifier(opset=11),
        lambda m: outputs(m, image=(1, 1, 8, 8)),
        starting=started.append,
        crashed=["opset 17"],
    )
    assert PassOutcome("opset 17", "dropped", "it crashed the process") in outcomes
    assert "opset 17" not in started
    assert started[-1] == ""


def test_differences() -> None:
    ones = np.ones((2, 2), np.float32)
    assert cleanup.difference({"y": ones}, {"y": ones + 1e-6}) is None
    assert cleanup.difference({"y": ones}, {"y": ones[:1]}) is not None
    assert cleanup.difference({"y": ones}, {"y": ones.astype(np.float64)}) is not None
    assert (
        cleanup.difference({"y": ones.astype(np.int64)}, {"y": np.array([[1, 1], [1, 2]])})
        == "output 'y' changed"
    )
    assert cleanup.difference({"y": ones * np.nan}, {"y": ones * np.nan}) is None
