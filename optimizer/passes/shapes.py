"""Every value gets its type and, where it can be known, its shape: quantizers skip what has none."""

from __future__ import annotations

import onnx


class Shapes:
    """ONNX's own shape inference, with constant shapes followed through the graph."""

    name = "shapes inferred"

    def requires(self, model: onnx.ModelProto) -> str | None:
        """Applies where a value has no type yet."""
        return None if _untyped(model) else "all shapes are known"

    def apply(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Lenient: where one operator's shapes are in doubt, the others still get theirs."""
        return onnx.shape_inference.infer_shapes(model, data_prop=True)

    def ensures(self, model: onnx.ModelProto) -> str | None:
        """Standard operators have typed outputs; behind one of another domain they may not."""
        known = _typed(model)
        standard = [node for node in model.graph.node if node.domain in ("", "ai.onnx")]
        if standard and not any(name in known for node in standard for name in node.output):
            return "no value has got a type"
        return None


def _typed(model: onnx.ModelProto) -> set[str]:
    graph = model.graph
    return {v.name for v in (*graph.value_info, *graph.output) if v.type.tensor_type.elem_type}


def _untyped(model: onnx.ModelProto) -> set[str]:
    made = {name for node in model.graph.node for name in node.output if name}
    return made - _typed(model)
