"""Ranges of activations from calibration data, streamed: memory does not grow with the number of samples.

One pass finds minimum and maximum; for percentiles a second one fills a histogram between them. It runs
the model through runtime.py and quantizes nothing.
"""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray

from optimizer import runtime
from optimizer.recipes import PERCENTILE, RangeMethod
from optimizer.runtime import Array, Arrays

BINS = 2048
# Activations of one chunk stay below this.
CHUNK_BYTES = 64 << 20
_MAX_CHUNK = 64

Ranges = dict[str, tuple[float, float]]


def find_ranges(model: onnx.ModelProto, inputs: Arrays, batch: int | None, method: RangeMethod) -> Ranges:
    """Lowest and highest value of each float tensor of the main graph over `inputs`.

    `batch` is the model's fixed batch, None if free. Raises runtime.RuntimeFault.
    """
    names = observable(model)
    chunk = batch or _chunk(model, names, inputs)
    limits = _limits(model, names, inputs, chunk, fixed=batch is not None)
    if method == "minmax":
        return limits
    return _percentiles(model, limits, inputs, chunk, fixed=batch is not None)


def observable(model: onnx.ModelProto) -> list[str]:
    """Names of the float32 values that flow between the nodes of the main graph, inputs included."""
    graph = model.graph
    typed = {
        v.name
        for v in (*graph.input, *graph.value_info, *graph.output)
        if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }
    weights = {t.name for t in graph.initializer}
    flowing = [v.name for v in graph.input] + [name for node in graph.node for name in node.output]
    return [name for name in flowing if name in typed - weights]


def _chunk(model: onnx.ModelProto, names: list[str], inputs: Arrays) -> int:
    """How many samples at a time keep the activations within CHUNK_BYTES."""
    one = {name: value[:1] for name, value in inputs.items()}
    observed = next(runtime.observe(model, names, one, 1, fixed=False))
    size = sum(value.nbytes for value in observed.values())
    return max(1, min(_MAX_CHUNK, CHUNK_BYTES // max(size, 1)))


def _limits(model: onnx.ModelProto, names: list[str], inputs: Arrays, chunk: int, *, fixed: bool) -> Ranges:
    limits: Ranges = {}
    for values in runtime.observe(model, names, inputs, chunk, fixed=fixed):
        for name, value in values.items():
            if value.size:
                low, high = limits.get(name, (np.inf, -np.inf))
                limits[name] = (min(low, float(value.min())), max(high, float(value.max())))
    return limits


def _percentiles(
    model: onnx.ModelProto, limits: Ranges, inputs: Arrays, chunk: int, *, fixed: bool
) -> Ranges:
    counts = {name: np.zeros(BINS, np.int64) for name in limits}
    for values in runtime.observe(model, list(limits), inputs, chunk, fixed=fixed):
        for name, value in values.items():
            counts[name] += histogram(value, *limits[name])
    return {name: percentile_range(counts[name], *limits[name]) for name in limits}


def histogram(value: Array, low: float, high: float) -> NDArray[np.int64]:
    """Counts of `value` in BINS equal bins from `low` to `high`, int64 [BINS]."""
    if high <= low:
        return np.bincount([0], minlength=BINS) * value.size
    scale = BINS / (high - low)
    places = ((value.ravel().astype(np.float64) - low) * scale).astype(np.int64)
    return np.bincount(np.clip(places, 0, BINS - 1), minlength=BINS)


def percentile_range(counts: NDArray[np.int64], low: float, high: float) -> tuple[float, float]:
    """The range that keeps PERCENTILE % of the counted values, the rest cut off half at each end."""
    tail = (1 - PERCENTILE / 100) / 2
    edges = np.linspace(low, high, BINS + 1)
    share = np.cumsum(counts) / max(int(counts.sum()), 1)
    first = int(np.searchsorted(share, tail, side="right"))
    last = int(np.searchsorted(share, 1 - tail, side="left"))
    return float(edges[min(first, BINS - 1)]), float(edges[min(last, BINS - 1) + 1])
