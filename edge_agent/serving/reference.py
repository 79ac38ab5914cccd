"""A fixed single-threaded workload whose time says how fast a machine is, for scaling latencies.

It is the kernels' mix in small: matrix products, and passes over an array larger than the first cache. It
ranks machines roughly; it predicts no model's latency. Nothing is allocated while the clock runs:
page faults vary more between two runs than CPUs do between machines.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from edge_agent.serving.tensors import Array

_SIDE = 192
_PRODUCTS = 4
_ELEMENTS = 1 << 18
_PASSES = 4
_REPEATS = 51


def measure_ms() -> float:
    """The workload's time: the median of 51, after some to warm up."""
    rng = np.random.default_rng(0)
    square = rng.random((_SIDE, _SIDE), dtype=np.float32) / np.float32(_SIDE)
    product = np.empty_like(square)
    long = rng.random(_ELEMENTS, dtype=np.float32)
    passed = np.empty_like(long)
    times = [_once(square, product, long, passed) for _ in range(_REPEATS + 3)]
    return statistics.median(times[3:])


def _once(square: Array, product: Array, long: Array, passed: Array) -> float:
    begun_s = time.perf_counter()
    for _ in range(_PRODUCTS):
        np.matmul(square, square, out=product)
    for _ in range(_PASSES):
        np.multiply(long, np.float32(0.5), out=passed)
        np.maximum(passed, np.float32(0.1), out=passed)
        passed.sum()
    return (time.perf_counter() - begun_s) * 1000
