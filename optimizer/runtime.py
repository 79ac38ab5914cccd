"""onnxruntime: the only file of the optimizer that imports it. Its exceptions do not leave this file.

It runs models for their outputs and builds quantized ones. It measures nothing: latencies come from
`edge-agent bench` (measure.py). Everything here is called in child processes (worker.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_contract.errors import Reason
from edge_contract.manifest import Datatype, Tensor
from edge_contract.profile import IntType
from optimizer.recipes import DynamicInt8, StaticInt8
from optimizer.text import first_line

if TYPE_CHECKING:  # costs a third of a second, and most child processes only run a model
    import onnx

# Unless told before it is imported, it writes a device id and a database below the home directory.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime

Array = NDArray[Any]
Arrays = dict[str, Array]
T = TypeVar("T")

_ERRORS_ONLY = 3
_DATATYPES: dict[str, Datatype] = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
}

# For versions that do not know the variable.
onnxruntime.disable_telemetry_events()
onnxruntime.set_default_logger_severity(_ERRORS_ONLY)


class RuntimeFault(Exception):
    """The runtime could not load, run or build a model. `reason` says which."""

    def __init__(self, reason: Reason, what: str) -> None:
        super().__init__(what)
        self.reason = reason
        self.what = what


class Model:
    """A loaded model. One thread by default: the same outputs on every run and machine of a kind."""

    def __init__(self, source: Path | onnx.ModelProto, threads: int = 1) -> None:
        """Raises RuntimeFault with LOAD_FAILED."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _ERRORS_ONLY
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        given = str(source) if isinstance(source, Path) else source.SerializeToString()
        self._session = _guard(
            Reason.LOAD_FAILED,
            lambda: onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"]),
        )

    @property
    def inputs(self) -> list[Tensor]:
        """Inputs as the runtime sees them."""
        return [_tensor(node) for node in self._session.get_inputs()]

    @property
    def outputs(self) -> list[Tensor]:
        """Outputs as the runtime sees them."""
        return [_tensor(node) for node in self._session.get_outputs()]

    def run(self, feeds: Arrays) -> Arrays:
        """One inference. Raises RuntimeFault with INFERENCE_FAILED."""
        values = _guard(Reason.INFERENCE_FAILED, lambda: self._session.run(None, feeds))
        return {node.name: value for node, value in zip(self._session.get_outputs(), values, strict=True)}

    def run_all(self, inputs: Arrays, chunk: int, *, fixed: bool) -> Arrays:
        """Outputs for every sample, `chunk` at a time; `fixed`: the model takes exactly that many.

        Raises RuntimeFault, also if an output does not have the samples as its first dimension.
        """
        parts: dict[str, list[Array]] = {}
        for feeds, count in chunks(inputs, chunk, fixed=fixed):
            for name, value in self.run(feeds).items():
                size = next(iter(feeds.values())).shape[0]
                if value.ndim == 0 or value.shape[0] != size:
                    raise RuntimeFault(
                        Reason.MODEL_UNSUPPORTED,
                        f"output {name!r} has the shape {list(value.shape)} for {size} samples:"
                        " its first dimension is not the batch",
                    )
                parts.setdefault(name, []).append(value[:count])
        return {name: np.concatenate(values) for name, values in parts.items()}


def chunks(inputs: Arrays, chunk: int, *, fixed: bool) -> Iterator[tuple[Arrays, int]]:
    """Feeds of `chunk` samples, and how many of them are real.

    The last one is shorter, or, if the model's batch is `fixed`, filled up with its own last sample.
    """
    total = next(iter(inputs.values())).shape[0]
    for start in range(0, total, chunk):
        feeds = {name: np.ascontiguousarray(value[start : start + chunk]) for name, value in inputs.items()}
        count = min(chunk, total - start)
        if fixed and count < chunk:
            feeds = {
                name: np.concatenate([value, np.repeat(value[-1:], chunk - count, axis=0)])
                for name, value in feeds.items()
            }
        yield feeds, count


def quantize_dynamic(model: onnx.ModelProto, settings: DynamicInt8, target: Path) -> None:
    """Write `model` with 8-bit weights to `target`. Raises RuntimeFault."""
    from onnxruntime import quantization

    _guard(
        Reason.LOAD_FAILED,
        lambda: quantization.quantize_dynamic(
            model,
            target,
            per_channel=settings.per_channel,
            reduce_range=settings.reduce_range,
            weight_type=_quant_type(settings.weights),
        ),
    )


def quantize_static(
    model: onnx.ModelProto, settings: StaticInt8, ranges: dict[str, tuple[float, float]], target: Path
) -> None:
    """Write `model` as QDQ to `target`; `ranges` bound each activation. Raises RuntimeFault."""
    _guard(Reason.LOAD_FAILED, lambda: _quantize_static(model, settings, ranges, target))


def _quantize_static(
    model: onnx.ModelProto, settings: StaticInt8, ranges: dict[str, tuple[float, float]], target: Path
) -> None:
    from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, TensorsData
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    data = {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()}
    quantizer = QDQQuantizer(
        model,
        settings.per_channel,
        settings.reduce_range,
        _quant_type(settings.weights),
        _quant_type(settings.activations),
        # These are final ranges, however they were found: what the quantizer calls MinMax.
        TensorsData(CalibrationMethod.MinMax, data),
        [],
        [],
        sorted({*QDQRegistry, *QLinearOpsRegistry}),
        {},
    )
    quantizer.quantize_model()
    quantizer.model.save_model_to_file(str(target), use_external_data_format=False)


def observe(
    model: onnx.ModelProto, names: list[str], inputs: Arrays, chunk: int, *, fixed: bool
) -> Iterator[Arrays]:
    """The values `names` inside `model`, chunk by chunk over `inputs`. Raises RuntimeFault."""
    import onnx

    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    present = {value.name for value in opened.graph.output}
    inside = [name for name in names if name not in inputs]
    opened.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in inside
        if name not in present
    )
    session = Model(opened)
    for feeds, _ in chunks(inputs, chunk, fixed=fixed):
        values = {**session.run(feeds), **feeds}
        yield {name: values[name] for name in names}


def _quant_type(kind: IntType) -> Any:
    from onnxruntime.quantization import QuantType

    return QuantType.QUInt8 if kind == "uint8" else QuantType.QInt8


def _tensor(node: Any) -> Tensor:
    datatype = _DATATYPES.get(node.type)
    if datatype is None:
        raise RuntimeFault(Reason.MODEL_UNSUPPORTED, f"{node.name!r} has the type {node.type}")
    return Tensor(node.name, datatype, [d if isinstance(d, int) and d >= 0 else -1 for d in node.shape])


def _guard(reason: Reason, action: Callable[[], T]) -> T:
    """onnxruntime raises classes of its C++ binding without a common base, and its quantizers anything."""
    try:
        return action()
    except Exception as e:
        raise RuntimeFault(reason, f"{type(e).__name__}: {first_line(e)}") from e
