"""TFLite models by LiteRT (ai-edge-litert) or, where that has no wheel, tflite-runtime.

Both packages hold the same interpreter; this file is the only one of the agent that imports either.
Text tensors are not supported: the two packages disagree on their form.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from edge_agent.serving.backends.base import Spec, inference_failed, one_line
from edge_agent.serving.tensors import DATATYPES, Array
from edge_contract.errors import BundleRejected, DeviceUnfit, Reason, RequestRejected
from edge_contract.manifest import Tensor

# In order of preference.
_PACKAGES = ("ai_edge_litert.interpreter", "tflite_runtime.interpreter")


def prepare() -> None:
    """Import a TFLite package. Raises DeviceUnfit."""
    _interpreter_class()


def version() -> None:
    """There is no prepared form: an interpreter maps the model's file as it is and packs at each load."""


def optimise(spec: Spec, folder: Path) -> Path:  # noqa: ARG001 - the interface's
    """Never called: see `version`."""
    raise RuntimeError("TFLite has no prepared form")


def open(spec: Spec) -> TfliteModel:  # noqa: A001 - the interface's name
    """Load a TFLite model. Raises BundleRejected, or DeviceUnfit without a TFLite package.

    `spec.spinning` has no counterpart here: the interpreter's threads never spin.
    """
    interpreter_class = _interpreter_class()
    try:
        interpreter = interpreter_class(model_path=str(spec.model), num_threads=spec.threads)
        interpreter.allocate_tensors()
    except Exception as e:  # the packages raise ValueError, RuntimeError and more, by version
        raise BundleRejected(
            Reason.LOAD_FAILED,
            f"{spec.model.name} does not load: tflite: {one_line(e)}",
            "check that it is a whole TFLite model whose operations this runtime knows",
        ) from e
    return TfliteModel(spec.model, interpreter)


class TfliteModel:
    """An interpreter and a lock: it holds the tensors of one run, so runs take turns.

    The interpreter is allocated for one input shape at a time; another batch size resizes it.
    """

    def __init__(self, path: Path, interpreter: Any) -> None:
        self._lock = threading.Lock()
        self._interpreter = interpreter
        taken, given = interpreter.get_input_details(), interpreter.get_output_details()
        self.inputs = [_tensor(path, detail) for detail in taken]
        self.outputs = [_tensor(path, detail) for detail in given]
        self._taken = {d["name"]: d["index"] for d in taken}
        self._given = {d["name"]: d["index"] for d in given}
        self._allocated = {d["name"]: tuple(int(n) for n in d["shape"]) for d in taken}
        if any(t.shape and t.shape[0] == -1 for t in self.inputs):
            self.outputs = [_free_batch(t) for t in self.outputs]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs by name, copied out. Raises RequestRejected."""
        with self._lock:
            try:
                return self._run(inputs)
            except RequestRejected:
                raise
            except Exception as e:  # as above
                self._allocated = {}  # whatever was half-done, the next run allocates anew
                raise inference_failed("tflite", one_line(e)) from e

    def close(self) -> None:
        """Drop the interpreter; a run under way keeps its own reference until it ends."""
        self._interpreter = None

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        interpreter = self._interpreter
        shapes = {name: array.shape for name, array in inputs.items()}
        if shapes != self._allocated:
            for name, shape in shapes.items():
                interpreter.resize_tensor_input(self._taken[name], shape, strict=False)
            interpreter.allocate_tensors()
            self._allocated = shapes
        for name, array in inputs.items():
            interpreter.set_tensor(self._taken[name], array)
        interpreter.invoke()
        return {name: np.asarray(interpreter.get_tensor(index)) for name, index in self._given.items()}


def _interpreter_class() -> Any:
    problems = []
    for package in _PACKAGES:
        try:
            return import_module(package).Interpreter
        except ImportError as e:
            problems.append(one_line(e))
    raise DeviceUnfit(
        Reason.RUNTIME_MISSING,
        f"no TFLite runtime is usable here: {'; '.join(problems)}",
        "install edgeward[tflite] on this device, or deploy a bundle made for an ONNX profile",
    )


def _tensor(path: Path, detail: Mapping[str, Any]) -> Tensor:
    datatype = DATATYPES.get(np.dtype(detail["dtype"]))
    if datatype is None or datatype == "BYTES":
        raise BundleRejected(
            Reason.MODEL_UNSUPPORTED,
            f"{path.name}: {detail['name']!r} is of type {np.dtype(detail['dtype'])}, which is not supported",
            "change the model so that its inputs and outputs are tensors of numbers",
        )
    return Tensor(detail["name"], datatype, [int(n) for n in detail["shape_signature"]])


def _free_batch(tensor: Tensor) -> Tensor:
    """An output of a model whose batch is free; many files still say 1 there."""
    if tensor.shape and tensor.shape[0] == 1:
        return Tensor(tensor.name, tensor.datatype, [-1, *tensor.shape[1:]])
    return tensor
