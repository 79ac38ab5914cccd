"""Timing single inferences, the same way for the benchmark and for preflight."""

from __future__ import annotations

import time
from collections.abc import Mapping

from edge_agent.serving.backends.base import Loaded
from edge_agent.serving.tensors import Array

_WARM_UP_RUNS = 3


def warm_up(model: Loaded, inputs: Mapping[str, Array]) -> None:
    """A few runs that do not count: first-touch allocation, lazy kernels, caches."""
    for _ in range(_WARM_UP_RUNS):
        model.run(inputs)


def latencies_ns(
    model: Loaded, inputs: Mapping[str, Array], *, seconds: float, least: int, most: int | None = None
) -> list[int]:
    """Times of runs one after the other until `seconds` are over, at least `least`, at most `most`."""
    found: list[int] = []
    end_ns = time.perf_counter_ns() + int(seconds * 1e9)
    while len(found) < least or time.perf_counter_ns() < end_ns:
        begun_ns = time.perf_counter_ns()
        model.run(inputs)
        found.append(time.perf_counter_ns() - begun_ns)
        if len(found) == most:
            break
    return found
