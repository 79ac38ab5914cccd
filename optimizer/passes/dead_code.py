"""Nodes, weights and notes on types that no output depends on go."""

from __future__ import annotations

import onnx

from optimizer.passes.base import uses


class DeadCode:
    """Removes what nothing uses, from the outputs backwards."""

    name = "dead code removed"

    def requires(self, model: onnx.ModelProto) -> str | None:
        """Applies where something is unused."""
        return None if _dead_nodes(model) or _dead_weights(model) else "nothing is unused"

    def apply(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Remove nodes until none is unused, then weights and value infos."""
        graph = model.graph
        while dead := _dead_nodes(model):
            for node in dead:
                graph.node.remove(node)
        for tensor in _dead_weights(model):
            graph.initializer.remove(tensor)
        made = {name for node in graph.node for name in node.output}
        kept = [value for value in graph.value_info if value.name in made]
        del graph.value_info[:]
        graph.value_info.extend(kept)
        return model

    def ensures(self, model: onnx.ModelProto) -> str | None:
        """Nothing unused is left."""
        return "something unused is left" if _dead_nodes(model) or _dead_weights(model) else None


def _dead_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    counts = uses(model)
    return [node for node in model.graph.node if not any(counts[name] for name in node.output)]


def _dead_weights(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    counts = uses(model)
    inputs = {value.name for value in model.graph.input}
    return [t for t in model.graph.initializer if not counts[t.name] and t.name not in inputs]
