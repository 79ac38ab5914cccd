"""ONNX models by onnxruntime, on the CPU. The only file of the agent that imports onnxruntime.

Execution providers other than the CPU's are not offered: every profile so far is of a CPU.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_agent.serving.backends.base import Spec, inference_failed, one_line
from edge_agent.serving.tensors import Array
from edge_contract.errors import BundleRejected, DeviceUnfit, Reason, RequestRejected
from edge_contract.manifest import Datatype, Tensor

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
    "tensor(string)": "BYTES",
}
_PREFIX = re.compile(r"^\[ONNXRuntimeError\] : \d+ : (\w+) : ")
_FATAL = 4
_OUT_OF_MEMORY = re.compile(r"bad_alloc|[Ff]ailed to allocate memory|bad allocation")
# Names of onnxruntime_session_options_config_keys.h. Smaller initializers stay in the graph.
_PREPACKED = {
    "optimized_model_external_initializers_file_name": "weights.bin",
    "optimized_model_external_initializers_min_size_in_bytes": "1024",
    "save_external_prepacked_constant_initializers": "1",
}


def prepare() -> None:
    """Import onnxruntime. Raises DeviceUnfit."""
    _runtime()


def version() -> str:
    """The version of onnxruntime: its prepared forms are read by no other. Raises DeviceUnfit."""
    return str(_runtime().__version__)


def open(spec: Spec) -> OnnxModel:  # noqa: A001 - the interface's name
    """Load an ONNX model. Raises BundleRejected, MemoryError, or DeviceUnfit without onnxruntime."""
    runtime = _runtime()
    return OnnxModel(spec.model, _session(runtime, spec, _options(runtime, spec)))


def optimise(spec: Spec, folder: Path) -> Path:
    """Write the optimised graph, and beside it its weights, prepacked for this CPU's kernels.

    A session of the two maps the weights: pages that nobody changes are in memory once, however many
    sessions there are, and are read when they are first used.
    """
    runtime = _runtime()
    options = _options(runtime, spec)
    model = folder / "model.onnx"
    options.optimized_model_filepath = str(model)
    for key, value in _PREPACKED.items():
        options.add_session_config_entry(f"session.{key}", value)
    _session(runtime, spec, options)
    return model


def _session(runtime: Any, spec: Spec, options: Any) -> Any:
    try:
        return runtime.InferenceSession(str(spec.model), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime's exceptions have no common base
        if _OUT_OF_MEMORY.search(str(e)):
            raise MemoryError(_message(e)) from e
        raise BundleRejected(
            Reason.LOAD_FAILED,
            f"{spec.model.name} does not load: onnxruntime: {_message(e)}",
            "check that it is a whole ONNX model of an opset this onnxruntime knows",
        ) from e


class OnnxModel:
    """A session. onnxruntime allows concurrent runs of one."""

    def __init__(self, path: Path, session: Any) -> None:
        self._session = session
        self.inputs = [_tensor(path, node) for node in session.get_inputs()]
        self.outputs = [_tensor(path, node) for node in session.get_outputs()]
        self._output_names = [t.name for t in self.outputs]
        self._text_in = [t.name for t in self.inputs if t.datatype == "BYTES"]
        self._text_out = [t.name for t in self.outputs if t.datatype == "BYTES"]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs by name. Raises RequestRejected."""
        feed = dict(inputs)
        for name in self._text_in:
            feed[name] = _to_text(name, feed[name])
        try:
            values = self._session.run(self._output_names, feed)
        except Exception as e:  # onnxruntime's exceptions have no common base
            raise inference_failed("onnxruntime", _message(e)) from e
        results = dict(zip(self._output_names, values, strict=True))
        for name in self._text_out:
            results[name] = _to_bytes(results[name])
        return results

    def close(self) -> None:
        """Drop the session; a run under way keeps its own reference until it ends."""
        self._session = None


def _runtime() -> Any:
    # By default the import itself makes a device id and a database in the user's cache folder and
    # starts an uploader. Only the variable, set before the import, prevents that; the call is for
    # versions that do not know the variable.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        import onnxruntime
    except ImportError as e:
        raise DeviceUnfit(
            Reason.RUNTIME_MISSING,
            f"onnxruntime is not usable here: {one_line(e)}",
            "install edgeward[onnx] on this device, or deploy a bundle made for a TFLite profile",
        ) from e
    onnxruntime.disable_telemetry_events()
    onnxruntime.set_default_logger_severity(_FATAL)
    return onnxruntime


def _options(runtime: Any, spec: Spec) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = spec.threads
    options.inter_op_num_threads = 1
    if spec.prepared:  # as it was written, or the weights beside it would not be those that it wants
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = _FATAL  # its errors come as exceptions; twice on stderr helps nobody
    spinning = "1" if spec.spinning else "0"
    options.add_session_config_entry("session.intra_op.allow_spinning", spinning)
    options.add_session_config_entry("session.inter_op.allow_spinning", spinning)
    return options


def _tensor(path: Path, node: Any) -> Tensor:
    datatype = _DATATYPES.get(node.type)
    if datatype is None:
        raise BundleRejected(
            Reason.MODEL_UNSUPPORTED,
            f"{path.name}: {node.name!r} is a {node.type}, which the inference protocol cannot carry",
            "change the model so that its inputs and outputs are tensors of ordinary types",
        )
    return Tensor(node.name, datatype, [d if isinstance(d, int) else -1 for d in node.shape])


def _to_text(name: str, array: Array) -> Array:
    try:
        return np.array([b.decode() for b in array.ravel()], np.object_).reshape(array.shape)
    except UnicodeDecodeError as e:
        raise RequestRejected(
            400,
            Reason.BAD_TENSOR,
            f"tensor {name!r}: an element is not UTF-8 (byte {e.start}); this model takes text",
            "encode every element as UTF-8",
        ) from e


def _to_bytes(array: Any) -> Array:
    values = np.asarray(array, np.object_)
    encoded = np.empty(values.size, np.object_)
    encoded[:] = [str(v).encode() for v in values.ravel()]
    return encoded.reshape(values.shape)


def _message(error: Exception) -> str:
    return _PREFIX.sub(r"\1: ", one_line(error))
