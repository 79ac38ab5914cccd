"""Nodes that pass their input on unchanged go: Identity, and Dropout outside of training."""

from __future__ import annotations

import onnx

from optimizer.passes.base import has_subgraphs, initializers, uses


class Identities:
    """Connects the users of an Identity's or Dropout's output to its input."""

    name = "identities removed"

    def requires(self, model: onnx.ModelProto) -> str | None:
        """Applies where one can go; not beside subgraphs, which may use names of the outer graph."""
        if has_subgraphs(model):
            return "the graph has control flow"
        return None if _removable(model) else "no Identity or Dropout nodes"

    def apply(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Remove one at a time: each removal changes what the next one may do."""
        while candidates := _removable(model):
            _remove(model, candidates[0])
        return model

    def ensures(self, model: onnx.ModelProto) -> str | None:
        """None is left that could go."""
        return "an identity is left" if _removable(model) else None


def _removable(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    counts = uses(model)
    return [node for node in model.graph.node if _is_identity(model, node, counts) and _can_go(model, node)]


def _is_identity(model: onnx.ModelProto, node: onnx.NodeProto, counts: dict[str, int]) -> bool:
    if node.op_type == "Identity":
        return True
    if node.op_type != "Dropout" or any(counts.get(mask) for mask in node.output[1:]):
        return False
    training = node.input[2] if len(node.input) > 2 else ""
    if not training:
        return True
    value = initializers(model).get(training)
    return value is not None and not onnx.numpy_helper.to_array(value).any()


def _can_go(model: onnx.ModelProto, node: onnx.NodeProto) -> bool:
    """A graph output keeps its name, so whatever feeds it must be free to take that name."""
    outputs = {value.name for value in model.graph.output}
    if node.output[0] not in outputs:
        return True
    made = {name for other in model.graph.node for name in other.output}
    return node.input[0] in made and node.input[0] not in outputs


def _remove(model: onnx.ModelProto, node: onnx.NodeProto) -> None:
    source, target = node.input[0], node.output[0]
    model.graph.node.remove(node)
    if target in {value.name for value in model.graph.output}:
        _rename(model, source, target)
    else:
        _rename(model, target, source)


def _rename(model: onnx.ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
