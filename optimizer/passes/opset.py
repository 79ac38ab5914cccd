"""Older models move to opset 17: the fusions and quantizers of the runtime know its operators best."""

from __future__ import annotations

import onnx
from onnx import version_converter

from optimizer.artifact import opset
from optimizer.passes.base import PassFailed
from optimizer.text import first_line

TARGET = 17


class Opset:
    """Converts to opset 17; a model of that opset or a newer one stays as it is."""

    name = f"opset {TARGET}"

    def requires(self, model: onnx.ModelProto) -> str | None:
        """Applies to models older than the target."""
        found = opset(model)
        return None if found < TARGET else f"the model's opset is {found}"

    def apply(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Raises PassFailed where the converter has no way for an operator: the model keeps its opset."""
        found = opset(model)
        try:
            converted = version_converter.convert_version(model, TARGET)
        except (RuntimeError, ValueError) as e:
            # ConvertError and whatever its C++ throws arrive as these.
            raise PassFailed(f"kept opset {found}: {first_line(e)}") from e
        return converted

    def ensures(self, model: onnx.ModelProto) -> str | None:
        """The model declares the target and is valid."""
        if opset(model) != TARGET:
            return f"opset is {opset(model)}"
        try:
            onnx.checker.check_model(model)
        except onnx.checker.ValidationError as e:
            return f"not valid any more: {first_line(e)}"
        return None
