"""What a pass is, and how passes look at a graph. No pass lives here."""

from __future__ import annotations

from collections import Counter
from typing import Protocol

import onnx

from optimizer.artifact import nodes


class Pass(Protocol):
    """One change of a graph that keeps what the model computes.

    `cleanup.run` calls the three in order, on a copy, and then compares the outputs with those before.
    """

    name: str

    def requires(self, model: onnx.ModelProto) -> str | None:
        """Why this pass does not apply to `model`; None if it does."""
        ...

    def apply(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """The changed model; it may be `model` itself, changed in place."""
        ...

    def ensures(self, model: onnx.ModelProto) -> str | None:
        """Which promise the result breaks; None if it keeps them."""
        ...


class PassFailed(Exception):
    """A pass cannot finish on this model; the model stays as it was, and the message says why."""


def has_subgraphs(model: onnx.ModelProto) -> bool:
    """Whether a node holds a graph (If, Loop, Scan), whose nodes may use any name of the outer one."""
    return any(a.HasField("g") or a.graphs for node in model.graph.node for a in node.attribute)


def uses(model: onnx.ModelProto) -> Counter[str]:
    """How often each value is used: by nodes, those of subgraphs too, and as a graph output."""
    counts = Counter(name for node in nodes(model.graph) for name in node.input if name)
    counts.update(value.name for value in model.graph.output)
    for node in nodes(model.graph):
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                counts.update(value.name for value in inner.output)
    return counts


def initializers(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Weights by name, without those a caller could override through an input of the same name."""
    overridable = {value.name for value in model.graph.input}
    return {t.name: t for t in model.graph.initializer if t.name not in overridable}


def interface(model: onnx.ModelProto) -> tuple[list[str], list[str]]:
    """Names of the real inputs and of the outputs, in order."""
    weights = {t.name for t in model.graph.initializer}
    inputs = [value.name for value in model.graph.input if value.name not in weights]
    return inputs, [value.name for value in model.graph.output]
