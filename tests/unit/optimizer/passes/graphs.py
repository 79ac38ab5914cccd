"""Tiny graphs written down in ONNX's text form."""

from __future__ import annotations

import onnx
from onnx import parser


def model(text: str, opset: int = 17, others: str = "", **weights: onnx.TensorProto) -> onnx.ModelProto:
    """A model of the graph in `text`, with more weights by name; `others`: more operator sets."""
    header = f'<ir_version: 8, opset_import: ["" : {opset}{others}]>'
    found: onnx.ModelProto = parser.parse_model(f"{header}\n{text}")
    for name, tensor in weights.items():
        tensor.name = name
        found.graph.initializer.append(tensor)
    onnx.checker.check_model(found)
    return found


def ops(found: onnx.ModelProto) -> list[str]:
    """Operators in the order of the main graph."""
    return [node.op_type for node in found.graph.node]
