"""Models that change as retraining changes them: ONNX files of convolutions with Gaussian weights.

numpy and onnx only. The six changes are those that deltas are judged by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edge_contract import manifest as m
from tests.support import models
from tests.support.models import BundleOnDisk

Layers = Sequence[npt.NDArray[np.float32]]
# Output channels of successive 3×3 convolutions: 12 MB in FP32, 3 MB in INT8.
LARGE = (32, 64, 128, 256, 256, 256, 256, 256, 160)
SMALL = (8, 16, 24, 24)
_LAYER_SHARE = 0.3


def layers(widths: Sequence[int] = LARGE, *, seed: int = 1) -> Layers:
    """Weights as He initialisation draws them, [out, in, 3, 3] each."""
    rng = np.random.default_rng(seed)
    pairs = zip((3, *widths), widths, strict=False)
    return [_normal(rng, (outs, ins, 3, 3), (2 / (ins * 9)) ** 0.5) for ins, outs in pairs]


def one_layer(weights: Layers, seed: int = 2) -> Layers:
    """One layer trained further, the others frozen."""
    rng = np.random.default_rng(seed)
    changed = list(weights)
    changed[1] = weights[1] + _normal(rng, weights[1].shape, weights[1].std() * _LAYER_SHARE)
    return changed


def some_weights(weights: Layers, seed: int = 2) -> Layers:
    """One weight in a hundred changed, anywhere."""
    rng = np.random.default_rng(seed)
    return [
        np.where(rng.random(w.shape) < 0.01, w + _normal(rng, w.shape, w.std() * _LAYER_SHARE), w)
        for w in weights
    ]


def all_weights(weights: Layers, seed: int = 2, *, share: float = 0.001) -> Layers:
    """Every weight moved by `share` of the standard deviation of its layer."""
    rng = np.random.default_rng(seed)
    return [w + _normal(rng, w.shape, w.std() * share) for w in weights]


class Case(NamedTuple):
    """A change, and the file of a model before and after it."""

    name: str
    base: bytes
    new: bytes


CHANGES: dict[str, Callable[[Layers], Layers]] = {
    "one layer": one_layer,
    "1 % of weights": some_weights,
    "all weights by 0.1 % σ": all_weights,
}


FAR = "INT8, all weights by 2 % σ"


def of_model(data: bytes) -> Layers:
    """The convolutions' weights of a trained model."""
    found = (numpy_helper.to_array(tensor) for tensor in onnx.load_from_string(data).graph.initializer)
    return [array for array in found if array.ndim == 4 and array.dtype == np.float32]


def far(before: Layers) -> Case:
    """One case more, beyond the six: retrained rather than touched up."""
    return Case(FAR, int8(before), int8(all_weights(before, share=0.02)))


def cases(before: Layers) -> list[Case]:
    """{FP32, INT8} × the three changes."""
    return [
        Case(f"{kind}, {name}", build(before), build(change(before)))
        for kind, build in (("FP32", fp32), ("INT8", int8))
        for name, change in CHANGES.items()
    ]


def fp32(weights: Layers) -> bytes:
    """The net with float weights, as ONNX bytes."""
    initializers = {f"conv{i}.weight": w for i, w in enumerate(weights)}
    return _model(weights, initializers, lambda i: ([], f"conv{i}.weight"))


def int8(weights: Layers) -> bytes:
    """The net with weights quantized per channel, symmetric, behind DequantizeLinear."""
    initializers: dict[str, npt.NDArray[Any]] = {}
    for i, weight in enumerate(weights):
        scale = (np.abs(weight).reshape(len(weight), -1).max(axis=1) / 127).astype(np.float32)
        steps = np.clip(np.rint(weight / scale[:, None, None, None]), -127, 127).astype(np.int8)
        initializers |= {f"conv{i}.weight_q": steps, f"conv{i}.scale": scale}
        initializers[f"conv{i}.zero"] = np.zeros(len(weight), np.int8)

    def dequantized(i: int) -> tuple[list[onnx.NodeProto], str]:
        inputs = [f"conv{i}.weight_q", f"conv{i}.scale", f"conv{i}.zero"]
        return [helper.make_node("DequantizeLinear", inputs, [f"w{i}"], axis=0)], f"w{i}"

    return _model(weights, initializers, dequantized)


def _model(
    weights: Layers,
    initializers: dict[str, npt.NDArray[Any]],
    source: Callable[[int], tuple[list[onnx.NodeProto], str]],
) -> bytes:
    nodes, last = [], "x"
    for i in range(len(weights)):
        before, weight = source(i)
        nodes += [*before, helper.make_node("Conv", [last, weight], [f"c{i}"], pads=[1] * 4)]
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}"]))
        last = f"r{i}"
    graph = helper.make_graph(
        nodes,
        "weights",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 32, 32])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, ["n", len(weights[-1]), 32, 32])],
        [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in initializers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data: bytes = model.SerializeToString()
    return data


def _normal(rng: np.random.Generator, shape: tuple[int, ...], deviation: float) -> npt.NDArray[np.float32]:
    return rng.normal(0, deviation, shape).astype(np.float32)


def bundle(
    folder: Path,
    name: str,
    version: int,
    *,
    change: float = 0.0,
    features: int = 4096,
    classes: int = 16,
) -> BundleOnDisk:
    """A bundle of the standard net of tests/support/models.py with 64k weights (256 kB).

    `change` is the share of its weights that differ from those with change 0, more with each more.
    """
    x = models.samples(4, features=features)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "W"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["scores"]),
        ],
        "standard",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", features])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", classes])],
        [numpy_helper.from_array(_matrix(change, features, classes), "W")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return models.write_bundle(
        folder / f"{name}-{version}",
        name,
        f"{version}.0.0",
        version,
        model=model.SerializeToString(),
        inputs=[m.Tensor("x", "FP32", [-1, features])],
        outputs=[m.Tensor("scores", "FP32", [-1, classes])],
        golden={"input:x": x, "output:scores": answers(x, change=change, classes=classes)},
        tolerance=m.Tolerance(atol=1e-4, rtol=1e-3),
    )


def answers(x: npt.NDArray[np.float32], *, change: float, classes: int = 16) -> npt.NDArray[np.float32]:
    """What such a bundle answers, computed in numpy."""
    logits = x.astype(np.float64) @ _matrix(change, x.shape[1], classes)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)


def _matrix(change: float, features: int, classes: int) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(5)
    first = _normal(rng, (features, classes), 0.02)
    other = _normal(rng, (features, classes), 0.02)
    return np.where(rng.random(first.shape) < change, other, first)
