"""BatchNormalization after a convolution folds into its weights: one node less, and none to quantize.

The runtime folds it too when it loads a model, but static quantization needs it done before it looks
for ranges.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from optimizer.passes.base import has_subgraphs, initializers, uses

_DEFAULT_EPSILON = 1e-5


class BatchNorm:
    """w' = w·γ/√(σ²+ε), b' = (b−μ)·γ/√(σ²+ε)+β, in float64, for Conv → BatchNormalization."""

    name = "batch normalization folded"

    def requires(self, model: onnx.ModelProto) -> str | None:
        """Applies where a Conv feeds one BatchNormalization alone and all parameters are weights."""
        if has_subgraphs(model):
            return "the graph has control flow"
        return None if _pairs(model) else "no convolution with batch normalization behind it"

    def apply(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Fold each pair; weights that others share stay as they are beside the new ones."""
        for conv, norm in _pairs(model):
            _fold(model, conv, norm)
        return model

    def ensures(self, model: onnx.ModelProto) -> str | None:
        """No such pair is left."""
        return "a pair is left" if _pairs(model) else None


def _pairs(model: onnx.ModelProto) -> list[tuple[onnx.NodeProto, onnx.NodeProto]]:
    counts = uses(model)
    weights = initializers(model)
    convs = {node.output[0]: node for node in model.graph.node if node.op_type == "Conv"}
    found = []
    for norm in model.graph.node:
        conv = convs.get(norm.input[0]) if norm.op_type == "BatchNormalization" else None
        if conv is None or counts[conv.output[0]] != 1 or not _is_inference(norm):
            continue
        if all(name in weights for name in [*norm.input[1:5], *filter(None, conv.input[1:])]):
            found.append((conv, norm))
    return found


def _is_inference(norm: onnx.NodeProto) -> bool:
    training = any(a.name == "training_mode" and a.i for a in norm.attribute)
    return not training and not any(norm.output[1:])


def _fold(model: onnx.ModelProto, conv: onnx.NodeProto, norm: onnx.NodeProto) -> None:
    weights = initializers(model)
    scale, shift, mean, variance = (_double(weights[name]) for name in norm.input[1:5])
    epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), _DEFAULT_EPSILON)
    factor = scale / np.sqrt(variance + epsilon)
    kernel = numpy_helper.to_array(weights[conv.input[1]])
    has_bias = len(conv.input) > 2 and bool(conv.input[2])
    bias = _double(weights[conv.input[2]]) if has_bias else np.zeros_like(mean)
    shape = (-1,) + (1,) * (kernel.ndim - 1)
    new_kernel = (kernel.astype(np.float64) * factor.reshape(shape)).astype(kernel.dtype)
    new_bias = ((bias - mean) * factor + shift).astype(kernel.dtype)
    output = norm.output[0]
    names = [f"{output}_folded_weight", f"{output}_folded_bias"]
    model.graph.initializer.extend(
        numpy_helper.from_array(value, name)
        for value, name in zip((new_kernel, new_bias), names, strict=True)
    )
    conv.input[:] = [conv.input[0], *names]
    conv.output[:] = [output]
    model.graph.node.remove(norm)


def _double(tensor: onnx.TensorProto) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return numpy_helper.to_array(tensor).astype(np.float64)
