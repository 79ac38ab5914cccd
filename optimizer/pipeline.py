"""Builds one candidate from the cleaned model: a recipe in, a file out. What pays is decided elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx

from edge_contract.errors import Reason
from optimizer import runtime
from optimizer.artifact import describe
from optimizer.calibrate import find_ranges
from optimizer.recipes import DynamicInt8, Fp16, Fp32, Recipe, StaticInt8
from optimizer.runtime import Arrays, RuntimeFault
from optimizer.text import first_line


@dataclass(frozen=True, slots=True)
class Source:
    """What every builder gets: the cleaned model, calibration inputs, the model's fixed batch."""

    model: onnx.ModelProto
    inputs: Arrays
    batch: int | None


def build(source: Path, recipe: Recipe, inputs: Arrays, batch: int | None, target: Path) -> None:
    """Write the candidate of `recipe` to `target`. Raises RuntimeFault."""
    model = onnx.load(source)
    builder = _BUILDERS[type(recipe.settings)]
    builder(Source(model, inputs, batch), recipe.settings, target)
    _rewrite(target)


def _fp32(source: Source, _settings: Fp32, target: Path) -> None:
    onnx.save(source.model, target)


def _fp16(source: Source, _settings: Fp16, target: Path) -> None:
    from onnxconverter_common import float16

    try:
        onnx.save(float16.convert_float_to_float16(source.model, keep_io_types=True), target)
    except Exception as e:  # the converter raises whatever its graph walk meets
        raise RuntimeFault(Reason.LOAD_FAILED, f"{type(e).__name__}: {first_line(e)}") from e


def _dynamic_int8(source: Source, settings: DynamicInt8, target: Path) -> None:
    runtime.quantize_dynamic(source.model, settings, target)
    _require_change(target)


def _static_int8(source: Source, settings: StaticInt8, target: Path) -> None:
    ranges = find_ranges(source.model, source.inputs, source.batch, settings.ranges)
    runtime.quantize_static(source.model, settings, ranges, target)
    _require_change(target)


_BUILDERS: dict[type, Callable[..., None]] = {
    Fp32: _fp32,
    Fp16: _fp16,
    DynamicInt8: _dynamic_int8,
    StaticInt8: _static_int8,
}


def _require_change(target: Path) -> None:
    """A quantizer that finds nothing to do writes the model as it was, without a word."""
    if not describe(onnx.load(target)).quantized:
        raise RuntimeFault(Reason.MODEL_UNSUPPORTED, "the quantizer changed nothing in this model")


def _rewrite(target: Path) -> None:
    """Equal models as equal bytes: no notes of the tools, no types that the runtime infers, maps in order."""
    model = onnx.load(target)
    del model.graph.value_info[:]
    own = [entry for entry in model.metadata_props if not entry.key.startswith("onnx.")]
    del model.metadata_props[:]
    model.metadata_props.extend(own)
    model.producer_name, model.producer_version = "edgeward", ""
    target.write_bytes(model.SerializeToString(deterministic=True))
