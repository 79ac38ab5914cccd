"""A small image classifier, trained by construction, and data for it.

Images are [samples, 1, 8, 8]; one of the four quarters is brighter. The net is Conv → BatchNormalization →
Relu → Flatten → Gemm: its convolution passes each pixel on with both signs, and the last layer is the ridge
regression of the classes on those features, so that it is right on nearly every sample.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]

SIDE = 8
CLASSES = 4
_SIGNS = (1.0, -1.0, 0.5, -0.5)


def images(count: int, seed: int, noise: float = 0.5) -> tuple[Array, Array]:
    """Images float32 [count, 1, 8, 8] and their classes int64 [count]."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    pixels = rng.normal(0, noise, (count, 1, SIDE, SIDE))
    half = SIDE // 2
    for i, label in enumerate(labels):
        row, column = divmod(int(label), 2)
        pixels[i, 0, row * half : (row + 1) * half, column * half : (column + 1) * half] += 1
    return pixels.astype(np.float32), labels


def split(path: Path, count: int, seed: int, **changed: Array) -> Path:
    """Write a split with the arrays `image` and `label`; `changed` replaces or adds arrays."""
    image, label = images(count, seed)
    np.savez(path, **{"image": image, "label": label, **changed})  # type: ignore[arg-type]
    return path


def classifier(*, batch: int | None = None, opset: int = 17, old_style: bool = False) -> onnx.ModelProto:
    """The trained net. `old_style`: weights are also inputs, and constants are nodes, as old exporters do."""
    weights = _weights()
    nodes = [
        helper.make_node("Conv", ["image", "kernel"], ["conv"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["conv", "scale", "shift", "mean", "variance"], ["norm"]),
        helper.make_node("Relu", ["norm"], ["active"]),
        helper.make_node("Identity", ["active"], ["same"]),
        helper.make_node("Flatten", ["same"], ["flat"]),
        helper.make_node("Gemm", ["flat", "out_weight", "out_bias"], ["logits"]),
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    inputs = [_value("image", [batch or "batch", 1, SIDE, SIDE])]
    if old_style:
        constant = next(t for t in tensors if t.name == "out_bias")
        tensors.remove(constant)
        nodes.insert(0, helper.make_node("Constant", [], ["out_bias"], value=constant))
        inputs += [_value(t.name, list(t.dims)) for t in tensors]
    graph = helper.make_graph(
        nodes, "quarters", inputs, [_value("logits", [batch or "batch", CLASSES])], tensors
    )
    return make(graph, opset)


def make(graph: onnx.GraphProto, opset: int = 17) -> onnx.ModelProto:
    """A checked model around a graph."""
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def save(path: Path, model: onnx.ModelProto) -> Path:
    """Write a model."""
    path.write_bytes(model.SerializeToString())
    return path


def _value(name: str, shape: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _weights() -> dict[str, Array]:
    channels = len(_SIGNS)
    kernel = np.zeros((channels, 1, 3, 3), np.float32)
    kernel[:, 0, 1, 1] = _SIGNS
    scale = np.linspace(0.5, 2.0, channels).astype(np.float32)
    shift = np.full(channels, 0.1, np.float32)
    mean = np.linspace(-0.2, 0.2, channels).astype(np.float32)
    variance = np.linspace(0.5, 1.5, channels).astype(np.float32)
    image, label = images(2000, seed=99)
    convolved = image * np.asarray(_SIGNS, np.float32).reshape(1, -1, 1, 1)
    factor = (scale / np.sqrt(variance + 1e-5)).reshape(1, -1, 1, 1)
    features = (convolved - mean.reshape(1, -1, 1, 1)) * factor + shift.reshape(1, -1, 1, 1)
    flat = np.maximum(features, 0).reshape(len(image), -1)
    padded = np.hstack([flat, np.ones((len(flat), 1))])
    solved = np.linalg.solve(
        padded.T @ padded + 0.1 * np.eye(padded.shape[1]), padded.T @ np.eye(CLASSES)[label]
    )
    return {
        "kernel": kernel,
        "scale": scale,
        "shift": shift,
        "mean": mean,
        "variance": variance,
        "out_weight": solved[:-1].astype(np.float32),
        "out_bias": solved[-1].astype(np.float32),
    }
