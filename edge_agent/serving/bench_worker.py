"""One model in a process of its own, driven by bench.py: JSON lines on standard input and output.

    {"op": "reference"}                        → {"reference_ms": …}
    {"op": "open", "model": …, "inputs": …, …} → {"load_ms": …}
    {"op": "round", "seconds": …}              → {"latencies_ns": […], "cpu_ns": …}
    {"op": "peak"}                             → {"peak_rss_bytes": …}

An expected failure is an answer, {"error": {"fault": class, "reason": …, "what": …, "next_step": …}};
a crash is an end without one. It decides nothing; bench.py does.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from edge_agent.serving import arrays, reference, rusage, timing
from edge_agent.serving.backends.base import Loaded, Spec, open_model, prepare
from edge_agent.serving.tensors import Array, synthetic
from edge_contract.console import error_dict
from edge_contract.errors import EdgewardError

_SEED = 20240229
_LEAST_RUNS = 3


class Worker:
    """The model under test."""

    def __init__(self) -> None:
        self._model: Loaded | None = None
        self._inputs: dict[str, Array] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what one line asks. Raises EdgewardError."""
        operations = {
            "reference": self._reference,
            "open": self._open,
            "round": self._round,
            "peak": self._peak,
        }
        return operations[request["op"]](request)

    def _reference(self, _request: dict[str, Any]) -> dict[str, Any]:
        return {"reference_ms": reference.measure_ms()}

    def _open(self, request: dict[str, Any]) -> dict[str, Any]:
        spec = Spec(Path(request["model"]), request["runtime"], request["threads"], request["spinning"])
        prepare(spec.runtime)
        begun_s = time.perf_counter()
        self._model = open_model(spec)
        load_ms = (time.perf_counter() - begun_s) * 1000
        self._inputs = _inputs(self._model, request["inputs"])
        timing.warm_up(self._model, self._inputs)
        return {"load_ms": load_ms}

    def _round(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._model is None:
            raise RuntimeError("a round before the model is open")
        begun_ns = time.process_time_ns()
        latencies = timing.latencies_ns(
            self._model, self._inputs, seconds=request["seconds"], least=_LEAST_RUNS
        )
        return {"latencies_ns": latencies, "cpu_ns": time.process_time_ns() - begun_ns}

    def _peak(self, _request: dict[str, Any]) -> dict[str, Any]:
        return {"peak_rss_bytes": rusage.peak_resident_bytes()}


def _inputs(model: Loaded, npz: str | None) -> dict[str, Array]:
    if npz is not None:
        return arrays.first_sample(Path(npz), model.inputs)
    rng = np.random.default_rng(_SEED)
    return {t.name: synthetic(t, rng) for t in model.inputs}


def main() -> None:
    """Answer lines until the input ends."""
    # Libraries print to standard output as they like; the answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except EdgewardError as e:
            answer = {"error": {"fault": type(e).__name__, **error_dict(e)}}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
