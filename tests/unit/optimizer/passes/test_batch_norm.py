"""BatchNormalization into the convolution before it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from optimizer.passes.batch_norm import BatchNorm
from tests.unit.optimizer.passes.graphs import model, ops

RNG = np.random.default_rng(5)


def weights(**shapes: tuple[int, ...]) -> dict[str, onnx.TensorProto]:
    return {
        name: numpy_helper.from_array(RNG.uniform(0.5, 1.5, shape).astype(np.float32))
        for name, shape in shapes.items()
    }


NORM = {"s": (6,), "b": (6,), "m": (6,), "v": (6,)}


@pytest.mark.parametrize(
    ("conv", "kernel"),
    [
        ("Conv(x, w)", (6, 4, 3, 3)),
        ("Conv(x, w, bias)", (6, 4, 3, 3)),
        ("Conv <group = 2> (x, w)", (6, 2, 3, 3)),
    ],
)
@pytest.mark.parametrize("epsilon", ["", "<epsilon = 0.01>"])
def test_it_folds(
    conv: str, kernel: tuple[int, ...], epsilon: str, applied: Callable[..., onnx.ModelProto]
) -> None:
    given = model(
        f"g (float[N,4,5,5] x) => (float[N,6,3,3] y)"
        f" {{ c = {conv}  n = BatchNormalization {epsilon} (c, s, b, m, v)  y = Relu(n) }}",
        **weights(w=kernel, bias=(6,), **NORM),
    )
    assert ops(applied(BatchNorm(), given, x=(2, 4, 5, 5))) == ["Conv", "Relu"]


def test_a_kernel_that_others_use_is_left_to_them(applied: Callable[..., onnx.ModelProto]) -> None:
    given = model(
        "g (float[N,4,5,5] x) => (float[N,6,3,3] y)"
        " { c = Conv(x, w)  n = BatchNormalization(c, s, b, m, v)  d = Conv(x, w)  y = Add(n, d) }",
        **weights(w=(6, 4, 3, 3), **NORM),
    )
    assert ops(applied(BatchNorm(), given, x=(1, 4, 5, 5))) == ["Conv", "Conv", "Add"]


@pytest.mark.parametrize(
    "body",
    [
        # the convolution's own result is used as well
        "c = Conv(x, w)  n = BatchNormalization(c, s, b, m, v)  y = Add(n, c)",
        # nothing to fold into
        "c = Relu(x)  y = BatchNormalization(c, s, b, m, v)",
        # statistics of the batch itself
        "c = Conv(x, w)  y, m2, v2 = BatchNormalization <training_mode = 1> (c, s, b, m, v)",
        # parameters that are computed
        "c = Conv(x, w)  t = Neg(s)  y = BatchNormalization(c, t, b, m, v)",
    ],
)
def test_it_stays_where_folding_would_change_something(body: str) -> None:
    given = model(
        f"g (float[N,6,5,5] x) => (float[N,6,5,5] y) {{ {body} }}", **weights(w=(6, 6, 1, 1), **NORM)
    )
    assert BatchNorm().requires(given) == "no convolution with batch normalization behind it"
