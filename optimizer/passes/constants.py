"""Constant nodes become initializers: quantizers and fusions look for weights there, and only there."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

_TENSORS = {
    "value_float": (helper.get_attribute_value, np.float32),
    "value_floats": (helper.get_attribute_value, np.float32),
    "value_int": (helper.get_attribute_value, np.int64),
    "value_ints": (helper.get_attribute_value, np.int64),
}


class Constants:
    """Moves the value of each Constant node of the main graph into an initializer of its output's name.

    Strings and sparse tensors stay nodes: no initializer holds them here.
    """

    name = "constants to initializers"

    def requires(self, model: onnx.ModelProto) -> str | None:
        """Applies where there is a Constant node with a dense, numeric value."""
        return None if _movable(model) else "no Constant nodes"

    def apply(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Move the values and drop the nodes."""
        for node, tensor in _movable(model):
            model.graph.initializer.append(tensor)
            model.graph.node.remove(node)
        return model

    def ensures(self, model: onnx.ModelProto) -> str | None:
        """No such node is left."""
        return "a Constant node is left" if _movable(model) else None


def _movable(model: onnx.ModelProto) -> list[tuple[onnx.NodeProto, onnx.TensorProto]]:
    outputs = {value.name for value in model.graph.output}
    found = []
    for node in model.graph.node:
        # An output that is a constant stays a node: not every runtime returns an initializer.
        if node.op_type == "Constant" and node.output[0] not in outputs:
            tensor = _tensor(node)
            if tensor is not None:
                found.append((node, tensor))
    return found


def _tensor(node: onnx.NodeProto) -> onnx.TensorProto | None:
    attribute = node.attribute[0]
    if attribute.name == "value":
        tensor = onnx.TensorProto()
        tensor.CopyFrom(attribute.t)
        tensor.name = node.output[0]
        return tensor
    if attribute.name in _TENSORS:
        read, dtype = _TENSORS[attribute.name]
        return numpy_helper.from_array(np.asarray(read(attribute), dtype=dtype), node.output[0])
    return None
