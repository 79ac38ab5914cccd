"""Runs a candidate over a split in a child process and hands back its outputs, or why there are none."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_contract.errors import Reason
from edge_contract.manifest import Tensor
from optimizer.child import Children
from optimizer.data import Array
from optimizer.worker import Evaluate, Evaluated, Fault

# Samples in one inference where the model's batch is free: quick, and small in memory.
CHUNK = 32


@dataclass(frozen=True, slots=True)
class Inference:
    """A candidate's outputs over a split, first dimension samples, and its interface."""

    outputs: dict[str, Array]
    interface: Evaluated


def infer(
    children: Children, model: Path, inputs: dict[str, str], *, batch: int | None, singly: bool
) -> Inference | Fault:
    """Outputs of `model` over `inputs` (input name → `.npy` file).

    `batch` is the model's fixed batch. `singly`: one sample at a time, as a device sees them, for models
    whose answer for a sample depends on its neighbours in the batch (dynamic quantization).
    """
    chunk = batch or (1 if singly else CHUNK)
    with tempfile.TemporaryDirectory(prefix="edge-optimize-outputs-") as folder:
        task = Evaluate(str(model), inputs, chunk, batch is not None, folder)
        result = children.run(task)
        if isinstance(result, Fault):
            return result
        if not isinstance(result, Evaluated):
            raise TypeError(result)
        outputs = {t.name: np.load(Path(folder, f"{i}.npy")) for i, t in enumerate(result.outputs)}
    return _finite(Inference(outputs, result))


def _finite(inference: Inference) -> Inference | Fault:
    for name, value in inference.outputs.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            bad = int((~np.isfinite(value.reshape(len(value), -1))).any(axis=1).sum())
            return Fault(
                Reason.NON_FINITE_OUTPUT,
                f"output {name!r} is NaN or infinite for {bad} of {len(value)} samples",
            )
    return inference


def same_interface(reference: Evaluated, other: Evaluated) -> bool:
    """Whether both take and give tensors of the same names and types; free dimensions may be named."""
    return _kinds(reference.inputs) == _kinds(other.inputs) and _kinds(reference.outputs) == _kinds(
        other.outputs
    )


def _kinds(tensors: list[Tensor]) -> list[tuple[str, str]]:
    return [(t.name, t.datatype) for t in tensors]
