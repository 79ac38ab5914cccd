"""The child process: `python -m optimizer.worker TASK` does one task and writes its result to a file.

Whatever runs or builds a model happens here, so that a crash of the runtime ends a candidate and not the
run. It decides nothing. child.py starts it.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from edge_contract import canonical
from edge_contract.errors import Reason
from edge_contract.manifest import Tensor
from optimizer.passes.outcome import PassOutcome
from optimizer.recipes import Recipe

# Samples that a cleaned graph's outputs are compared on.
CHECKED_SAMPLES = 16


class Clean(Struct, frozen=True, tag="clean"):
    """Clean `model` up into `target`. `marker` names the pass at work; `crashed` are left out.

    `inputs` maps input names to `.npy` files, here and below; `batch` is the model's fixed batch.
    """

    model: str
    inputs: dict[str, str]
    batch: int | None
    target: str
    marker: str
    crashed: list[str]


class Build(Struct, frozen=True, tag="build"):
    """Build `recipe` from the cleaned `model` into `target`, calibrating on `inputs`."""

    model: str
    recipe: Recipe
    inputs: dict[str, str]
    batch: int | None
    target: str


class Evaluate(Struct, frozen=True, tag="evaluate"):
    """Run `model` on `inputs`, `chunk` samples at a time; outputs go to `folder` as 0.npy, 1.npy, …"""

    model: str
    inputs: dict[str, str]
    chunk: int
    fixed: bool
    folder: str


Task = Clean | Build | Evaluate


class Cleaned(Struct, frozen=True, tag="cleaned"):
    """What became of each pass."""

    passes: list[PassOutcome]


class Built(Struct, frozen=True, tag="built"):
    """The file is there."""


class Evaluated(Struct, frozen=True, tag="evaluated"):
    """The interface as the runtime sees it; outputs lie in the folder in this order."""

    inputs: list[Tensor]
    outputs: list[Tensor]


class Fault(Struct, frozen=True, tag="fault"):
    """The task could not be done."""

    reason: Reason
    what: str


Result = Cleaned | Built | Evaluated | Fault


def main(argv: list[str]) -> None:
    """TASK and RESULT are files; the result is written whatever the libraries print."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    task_path, result_path = map(Path, argv)
    task: Task = canonical.from_bytes(task_path.read_bytes(), Task)  # type: ignore[arg-type]
    result_path.write_bytes(canonical.to_bytes(perform(task)))


def perform(task: Task) -> Result:
    """Do the task in this process."""
    from optimizer.runtime import RuntimeFault

    try:
        if isinstance(task, Clean):
            return _clean(task)
        if isinstance(task, Build):
            return _build(task)
        return _evaluate(task)
    except RuntimeFault as e:
        return Fault(e.reason, e.what)


def _clean(task: Clean) -> Result:
    import onnx

    from optimizer.passes import cleanup
    from optimizer.runtime import Arrays, Model

    samples = {name: value[:CHECKED_SAMPLES] for name, value in _load(task.inputs).items()}
    chunk = task.batch or CHECKED_SAMPLES

    def evaluate(model: onnx.ModelProto) -> Arrays:
        return Model(model).run_all(samples, chunk, fixed=task.batch is not None)

    def mark(name: str) -> None:
        Path(task.marker).write_text(name, encoding="utf-8")

    given = onnx.load(task.model)
    model, outcomes = cleanup.run(given, evaluate, starting=mark, crashed=task.crashed)
    Path(task.target).write_bytes(model.SerializeToString(deterministic=True))
    return Cleaned(outcomes)


def _build(task: Build) -> Result:
    from optimizer import pipeline

    pipeline.build(Path(task.model), task.recipe, _load(task.inputs), task.batch, Path(task.target))
    return Built()


def _evaluate(task: Evaluate) -> Result:
    from optimizer.runtime import Model

    model = Model(Path(task.model))
    outputs = model.run_all(_load(task.inputs), task.chunk, fixed=task.fixed)
    for i, tensor in enumerate(model.outputs):
        np.save(Path(task.folder) / f"{i}.npy", outputs[tensor.name])
    return Evaluated(model.inputs, model.outputs)


def _load(paths: dict[str, str]) -> dict[str, NDArray[Any]]:
    return {name: np.load(path, mmap_mode="r", allow_pickle=False) for name, path in paths.items()}


if __name__ == "__main__":
    main(sys.argv[1:])
