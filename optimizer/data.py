"""The three data splits: NPZ files, checked against the model's inputs and against each other.

Arrays are named after the model's inputs; `label` holds the class index for the metric top1. Other arrays
with one row per sample are kept for a metric function. Nothing is pickled, nothing is converted.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edge_contract.errors import InputRejected, Reason
from edge_contract.manifest import Tensor
from optimizer.artifact import NUMPY_NAMES, Artifact

SplitName = Literal["calibration", "selection", "test"]
Array = NDArray[Any]

LABEL = "label"
# Fewer say nothing about the ranges of activations.
MIN_CALIBRATION = 16
# Fewer say nothing about accuracy, whatever the drop allowed.
MIN_SCORED = 16


@dataclass(frozen=True, slots=True)
class Split:
    """One split. `inputs` are the model's, in its order; `extra` is everything else in the file."""

    name: SplitName
    path: Path
    inputs: dict[str, Array]
    extra: dict[str, Array]
    samples: int
    digest: str

    def labels(self) -> Array:
        """The class indices, int [samples]; `require_labels` has checked that they are there."""
        return self.extra[LABEL]


def load(path: Path, name: SplitName, artifact: Artifact) -> Split:
    """The split in the NPZ file at `path`. Raises InputRejected naming the array at fault."""
    arrays = _read(path, name)
    inputs = {t.name: _checked(path, name, arrays, t) for t in artifact.inputs}
    extra = {key: value for key, value in arrays.items() if key not in inputs}
    samples = _samples(path, name, {**inputs, **extra})
    return Split(name, path, inputs, extra, samples, _digest({**inputs, **extra}))


def require_labels(split: Split, classes: int | None) -> None:
    """Check the array `label`: there, integers [samples], within 0..classes-1 where that is known.

    Raises InputRejected.
    """
    label = split.extra.get(LABEL)
    if label is None:
        found = ", ".join([*split.inputs, *split.extra])
        raise _mismatch(
            split.path,
            split.name,
            f"array {LABEL!r} is missing (found: {found}); the metric top1 expects int labels [samples]",
        )
    if label.dtype.kind not in "iu" or label.ndim != 1:
        raise _mismatch(
            split.path,
            split.name,
            f"array {LABEL!r} is {_describe(label)}, expected integers of shape [{split.samples}]",
        )
    low, high = int(label.min()), int(label.max())
    if low < 0 or (classes is not None and high >= classes):
        culprit = low if low < 0 else high
        limit = "0 or more" if classes is None else f"0 to {classes - 1}"
        raise _mismatch(
            split.path, split.name, f"array {LABEL!r} holds {culprit}, expected classes from {limit}"
        )


def require_enough(split: Split, *, minimum: int, why: str) -> None:
    """Raises InputRejected if the split has fewer than `minimum` samples."""
    if split.samples < minimum:
        raise InputRejected(
            Reason.DATA_TOO_SMALL,
            f"{split.name} split {split.path} has {split.samples} samples, {minimum} or more"
            f" are needed: {why}",
            "add samples to it",
        )


def minimum_scored(max_drop: float) -> int:
    """Samples a split needs so that one changed answer weighs no more than the allowed drop."""
    if max_drop <= 0:
        return MIN_SCORED
    return max(MIN_SCORED, math.ceil(1 / max_drop - 1e-9))


def require_disjoint(splits: Sequence[Split]) -> None:
    """Raises InputRejected if two splits share a sample: choice and score would not be independent."""
    seen: dict[bytes, tuple[Split, int]] = {}
    for split in splits:
        own: dict[bytes, int] = {}
        for i, key in enumerate(_sample_digests(split)):
            own.setdefault(key, i)
        shared = [(seen[key], i) for key, i in own.items() if key in seen]
        if shared:
            (other, j), i = shared[0]
            raise InputRejected(
                Reason.DATA_MISMATCH,
                f"{split.name} split {split.path} shares {len(shared)} samples with the {other.name} split"
                f" {other.path} (first: sample {i} is its sample {j})",
                "give splits without a sample in common",
            )
        seen.update({key: (split, i) for key, i in own.items()})


def _read(path: Path, name: SplitName) -> dict[str, Array]:
    if not path.is_file():
        raise InputRejected(
            Reason.DATA_MISMATCH, f"{name} split: {path} is not a file", "give the path of an NPZ file"
        )
    try:
        # Opened here: numpy leaves a file that it cannot read open.
        with path.open("rb") as source:
            archive = np.load(source, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise _mismatch(path, name, "a single array, not an NPZ file")
            return {key: archive[key] for key in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, KeyError) as e:
        raise _mismatch(path, name, f"not a readable NPZ file: {e}") from e


def _checked(path: Path, name: SplitName, arrays: dict[str, Array], tensor: Tensor) -> Array:
    array = arrays.get(tensor.name)
    if array is None:
        raise _mismatch(
            path,
            name,
            f"no array {tensor.name!r}, an input of the model (found: {', '.join(arrays) or 'nothing'})",
        )
    expected = f"{NUMPY_NAMES[tensor.datatype]} {_shape(['samples', *tensor.shape[1:]])}"
    problem = f"array {tensor.name!r} is {_describe(array)}, expected {expected}"
    if array.dtype != np.dtype(NUMPY_NAMES[tensor.datatype]) or array.ndim != len(tensor.shape):
        raise _mismatch(path, name, problem)
    if any(want not in (-1, got) for want, got in zip(tensor.shape[1:], array.shape[1:], strict=True)):
        raise _mismatch(path, name, problem)
    _check_finite(path, name, tensor.name, array)
    return array


def _check_finite(path: Path, name: SplitName, key: str, array: Array) -> None:
    if array.dtype.kind != "f":
        return
    bad = ~np.isfinite(array)
    if bad.any():
        first = int(np.argwhere(bad)[0][0])
        raise _mismatch(
            path,
            name,
            f"array {key!r} holds {int(bad.sum())} values that are NaN or infinite, first in sample {first};"
            " expected finite values",
        )


def _samples(path: Path, name: SplitName, arrays: dict[str, Array]) -> int:
    counts = {key: (value.shape[0] if value.ndim else None) for key, value in arrays.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{key}: {count}" for key, count in counts.items())
        raise _mismatch(path, name, f"arrays differ in their number of samples ({listed})")
    samples = next(iter(counts.values())) or 0
    if samples == 0:
        raise InputRejected(Reason.DATA_TOO_SMALL, f"{name} split {path} is empty", "add samples to it")
    return samples


def _digest(arrays: dict[str, Array]) -> str:
    """SHA-256 over names, types, shapes and contents: the same data zipped anew has the same digest."""
    total = hashlib.sha256()
    for key in sorted(arrays):
        array = arrays[key]
        total.update(f"{key}|{array.dtype.str}|{array.shape}|".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def _sample_digests(split: Split) -> list[bytes]:
    rows = [np.ascontiguousarray(a).reshape(split.samples, -1) for a in split.inputs.values()]
    return [hashlib.sha256(b"".join(r[i].tobytes() for r in rows)).digest() for i in range(split.samples)]


def _describe(array: Array) -> str:
    return f"{array.dtype} {_shape(array.shape)}"


def _shape(dims: Sequence[object]) -> str:
    return "[" + ", ".join("any" if d == -1 else str(d) for d in dims) + "]"


def _mismatch(path: Path, name: SplitName, problem: str) -> InputRejected:
    return InputRejected(
        Reason.DATA_MISMATCH,
        f"{name} split {path}: {problem}",
        "write it with numpy.savez: one array for each model input, under its name, plus label",
    )
