"""Weights that are inputs too (files before IR 4) become weights alone, so that others may fold them."""

from __future__ import annotations

import onnx

# The first IR version in which a weight need not be an input, and the one opset 17 came with.
_IR_VERSION = 8


class OverridableWeights:
    """Removes each graph input that has an initializer of its name."""

    name = "weights are not inputs"

    def requires(self, model: onnx.ModelProto) -> str | None:
        """Applies where an input is also a weight."""
        return None if _overridable(model) else "no weight is an input"

    def apply(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Keep the inputs that callers must give."""
        names = _overridable(model)
        kept = [value for value in model.graph.input if value.name not in names]
        del model.graph.input[:]
        model.graph.input.extend(kept)
        model.ir_version = max(model.ir_version, _IR_VERSION)
        return model

    def ensures(self, model: onnx.ModelProto) -> str | None:
        """No input is a weight."""
        return "a weight is still an input" if _overridable(model) else None


def _overridable(model: onnx.ModelProto) -> set[str]:
    return {value.name for value in model.graph.input} & {t.name for t in model.graph.initializer}
