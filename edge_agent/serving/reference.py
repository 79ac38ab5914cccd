"""A fixed single-threaded workload whose time says how fast a machine is, for scaling latencies.

It is the kernels' mix in small: matrix products that fit a cache, and passes over an array that does
not. It ranks machines roughly; it predicts no model's latency.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

_SIDE = 192
_PRODUCTS = 8
_PASS_ELEMENTS = 1 << 20
_REPEATS = 7


def measure_ms() -> float:
    """The workload's time: the median of seven, after one to warm up."""
    rng = np.random.default_rng(0)
    square = rng.random((_SIDE, _SIDE), dtype=np.float32)
    long = rng.random(_PASS_ELEMENTS, dtype=np.float32)
    _once(square, long)
    return statistics.median(_once(square, long) for _ in range(_REPEATS))


def _once(square: np.ndarray, long: np.ndarray) -> float:
    begun_s = time.perf_counter()
    product = square
    for _ in range(_PRODUCTS):
        product = product @ square
        product /= product.max()
    np.maximum(long * np.float32(0.5) + np.float32(0.25), np.float32(0.5)).sum()
    return (time.perf_counter() - begun_s) * 1000
