"""What serving, bench and preflight ask of a model runtime, and which module answers.

A backend's module is imported when a model asks for it, so one runtime installed is enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from edge_agent.serving.tensors import Array
from edge_contract.errors import Reason, RequestRejected
from edge_contract.manifest import Runtime, Tensor

_MODULES: dict[Runtime, str] = {
    "onnxruntime": "edge_agent.serving.backends.onnx",
    "tflite": "edge_agent.serving.backends.tflite",
}
_MESSAGE_LIMIT = 300


@dataclass(frozen=True, slots=True)
class Spec:
    """What to open and how. `prepared`: `model` is this device's own form, made by `Backend.optimise`."""

    model: Path
    runtime: Runtime
    threads: int = 1
    spinning: bool = False
    prepared: bool = False


class Loaded(Protocol):
    """A model in memory. `run` may be called from several threads at once.

    Arrays are C-contiguous and of the numpy type of their tensor's datatype; BYTES are object arrays
    of `bytes`, both ways.
    """

    @property
    def inputs(self) -> list[Tensor]:
        """The model's inputs, in its order; -1 where a dimension is free."""

    @property
    def outputs(self) -> list[Tensor]:
        """The model's outputs, in its order."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs by name. Raises RequestRejected with INFERENCE_FAILED when the runtime fails."""

    def close(self) -> None:
        """Let go of the model; a run that is under way in another thread still finishes."""


class Backend(Protocol):
    """One runtime."""

    def prepare(self) -> None:
        """Import the runtime. Raises DeviceUnfit when it is not installed."""

    def open(self, spec: Spec) -> Loaded:
        """Load a model.

        Raises BundleRejected (LOAD_FAILED, MODEL_UNSUPPORTED) when it does not load, DeviceUnfit
        when the runtime is not installed, MemoryError when memory does not suffice.
        """

    def version(self) -> str | None:
        """The runtime's version, of which its prepared forms are; None when it has no such form.

        Raises DeviceUnfit when the runtime is not installed.
        """

    def optimise(self, spec: Spec, folder: Path) -> Path:
        """Write the form of `spec.model` that this device would make at each load; returns its model file.

        Only called where `version` is not None. Raises as `open` does.
        """


def prepare(runtime: Runtime) -> None:
    """Import a runtime ahead of time, so that the time of a load is the model's alone. Raises DeviceUnfit."""
    _backend(runtime).prepare()


def open_model(spec: Spec) -> Loaded:
    """Load a model with the backend of its runtime. Raises as `Backend.open` does."""
    return _backend(spec.runtime).open(spec)


def form_version(runtime: Runtime) -> str | None:
    """The version of the runtime that a prepared form is tied to; None where there is no such form."""
    return _backend(runtime).version()


def optimise(spec: Spec, folder: Path) -> Path:
    """Write this device's own form of a model into `folder`. Raises as `Backend.open` does."""
    return _backend(spec.runtime).optimise(spec, folder)


def _backend(runtime: Runtime) -> Backend:
    return cast(Backend, import_module(_MODULES[runtime]))


def one_line(error: BaseException) -> str:
    """A runtime's message on one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MESSAGE_LIMIT else text[: _MESSAGE_LIMIT - 1] + "…"


def inference_failed(runtime: str, detail: str) -> RequestRejected:
    """The error of a run that the runtime gave up."""
    return RequestRejected(
        500,
        Reason.INFERENCE_FAILED,
        f"the model failed on this input: {runtime}: {detail}",
        "check the values of the inputs; if they are in order, deploy a version that can take them",
    )
