"""Pure: tensors as the protocol, the manifest and numpy name them; shapes, samples, sample inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_contract.manifest import Datatype, Tensor

Array = npt.NDArray[Any]

# BYTES are object arrays of `bytes`.
NUMPY: dict[Datatype, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(np.object_),
}
DATATYPES: dict[np.dtype[Any], Datatype] = {v: k for k, v in NUMPY.items()}
FLOATS: frozenset[Datatype] = frozenset({"FP16", "FP32", "FP64"})

# A synthetic sample's extent of a free dimension that is not the first (sequence length, image side).
_FREE_EXTENT = 64


def describe(tensor: Tensor) -> str:
    """`x FP32 [-1, 8]`."""
    return f"{tensor.name} {tensor.datatype} {tensor.shape}"


def describe_all(tensors: Sequence[Tensor]) -> str:
    """All of them, comma-separated."""
    return ", ".join(describe(t) for t in tensors)


def admits(spec: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether an array of `shape` may be given where `spec` is declared; -1 takes any extent of 1 or more."""
    return len(spec) == len(shape) and all(
        n >= 1 and (want in (-1, n)) for want, n in zip(spec, shape, strict=True)
    )


def difference(promised: Sequence[Tensor], found: Sequence[Tensor]) -> str | None:
    """How two interfaces differ, in words, or None.

    A dimension that either side leaves free agrees with any extent: runtimes differ by version in how
    far they infer shapes.
    """
    if [t.name for t in promised] != [t.name for t in found]:
        return f"promises {describe_all(promised)}; the model has {describe_all(found)}"
    for a, b in zip(promised, found, strict=True):
        if a.datatype != b.datatype or not _agree(a.shape, b.shape):
            return f"promises {describe(a)}; the model has {describe(b)}"
    return None


def _agree(a: Sequence[int], b: Sequence[int]) -> bool:
    return len(a) == len(b) and all(m == n or -1 in (m, n) for m, n in zip(a, b, strict=True))


def sample_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of one sample: 1 where the first dimension is free, 64 where another is."""
    return tuple(n if n >= 0 else (1 if axis == 0 else _FREE_EXTENT) for axis, n in enumerate(tensor.shape))


def synthetic(tensor: Tensor, rng: np.random.Generator) -> Array:
    """One sample of random values: floats of [0, 1), integers of [0, 10), false or true, short text.

    Random, not zero: zeros take other paths through some kernels (denormals, sparsity, early exits).
    """
    shape = sample_shape(tensor)
    dtype = NUMPY[tensor.datatype]
    if tensor.datatype in FLOATS:
        return rng.random(shape).astype(dtype)
    if tensor.datatype == "BYTES":
        return np.full(shape, b"edge", dtype)
    return rng.integers(0, 2 if tensor.datatype == "BOOL" else 10, shape).astype(dtype)


def sample(stack: Array, tensor: Tensor, index: int) -> Array | None:
    """Sample `index` of an array of samples as the tensor takes it, or None when it does not fit.

    Samples lie along the first axis: [samples, …] for a tensor [-1, …] or [1, …], [samples·k, …] for
    [k, …], and [samples, *shape] for tensors without a batch axis.
    """
    part: Array | None = None
    if stack.ndim == len(tensor.shape) + 1 and index < len(stack):
        part = np.asarray(stack[index])
    elif stack.ndim == len(tensor.shape):
        rows = max(1, tensor.shape[0]) if tensor.shape else 1
        part = stack[index * rows : (index + 1) * rows] if tensor.shape else stack
    if part is None or not admits(tensor.shape, part.shape):
        return None
    typed = _typed(part, tensor.datatype)
    return None if typed is None else np.ascontiguousarray(typed).reshape(part.shape)


def _typed(array: Array, datatype: Datatype) -> Array | None:
    if datatype != "BYTES":
        return array if array.dtype == NUMPY[datatype] else None
    if array.dtype.kind == "U":
        array = np.char.encode(array, "utf-8")
    return array.astype(np.object_) if array.dtype.kind == "S" else None


def elements(shape: Sequence[int]) -> int:
    """Number of elements; exact whatever the extents."""
    return math.prod(shape)
