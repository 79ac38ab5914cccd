"""Counting what is served, and the counts as Prometheus text.

Counts only: no input, no output leaves through here. Windows, rates and quantiles are taken by whoever reads.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from edge_agent.serving import rusage
from edge_agent.serving.tensors import FLOATS, Array
from edge_agent.stats import BOUNDS_MS, VersionStats, bucket, empty_latency
from edge_contract.errors import Reason
from edge_contract.manifest import Manifest, Tensor

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Outputs with more classes than this are rarely class scores, and their histogram would be large.
_MAX_CLASSES = 1000
# Every third bound, about a factor of two: enough to read, and a third of the lines.
_SHOWN_BOUNDS = range(2, len(BOUNDS_MS), 3)


class VersionCounters:
    """Counts of one loaded version since it was loaded.

    Invariant: workers add and the event loop reads; each holds the lock, for microseconds.
    """

    def __init__(self, manifest: Manifest, digest: str, loaded_ms: int) -> None:
        self._lock = threading.Lock()
        self._name, self._version = manifest.name, manifest.version
        self._digest, self._loaded_ms = digest, loaded_ms
        self._floats = [t.name for t in manifest.outputs if t.datatype in FLOATS]
        self._top1 = {t.name: np.zeros(t.shape[1], np.int64) for t in manifest.outputs if is_scores(t)}
        self._latency = empty_latency()
        self._latency_sum_ms = 0.0
        self._requests = 0
        self._non_finite = 0
        self._errors: Counter[Reason] = Counter()

    def answered(self, latency_ms: float, outputs: Mapping[str, Array]) -> None:
        """Count one answer. `latency_ms` runs from the whole request received to the answer encoded."""
        finite = all(bool(np.isfinite(outputs[name]).all()) for name in self._floats)
        # NaN is not a decision: such an answer counts as non-finite only.
        decisions = self._decisions(outputs) if finite else {}
        with self._lock:
            self._requests += 1
            self._non_finite += not finite
            self._latency[bucket(latency_ms)] += 1
            self._latency_sum_ms += latency_ms
            for name, counts in decisions.items():
                self._top1[name] += counts

    def failed(self, latency_ms: float, reason: Reason) -> None:
        """Count one request that this version could not answer. Requests at fault themselves do not count."""
        with self._lock:
            self._requests += 1
            self._errors[reason] += 1
            self._non_finite += reason is Reason.NON_FINITE_OUTPUT
            self._latency[bucket(latency_ms)] += 1
            self._latency_sum_ms += latency_ms

    def errors(self) -> dict[Reason, int]:
        """Errors by reason."""
        with self._lock:
            return dict(self._errors)

    def latency_sum_s(self) -> float:
        """All latencies together, in seconds."""
        return self._latency_sum_ms / 1000

    def snapshot(self) -> VersionStats:
        """The counts now."""
        with self._lock:
            return VersionStats(
                name=self._name,
                version=self._version,
                digest=self._digest,
                loaded_ms=self._loaded_ms,
                requests=self._requests,
                errors=self._errors.total(),
                non_finite=self._non_finite,
                latency_counts=list(self._latency),
                top1_counts={name: counts.tolist() for name, counts in self._top1.items()},
            )

    def _decisions(self, outputs: Mapping[str, Array]) -> dict[str, Array]:
        return {
            name: np.bincount(outputs[name].argmax(axis=1), minlength=len(counts))
            for name, counts in self._top1.items()
            # A model may answer otherwise than it declares; that is no reason to fail its request.
            if outputs[name].shape[1:] == counts.shape
        }


def is_scores(tensor: Tensor) -> bool:
    """Whether an output looks like class scores: float [N, C], 2 to 1000 classes."""
    return tensor.datatype in FLOATS and len(tensor.shape) == 2 and 2 <= tensor.shape[1] <= _MAX_CLASSES


def render(
    versions: Iterable[tuple[VersionCounters, bool]],
    *,
    rejected: Mapping[Reason, int],
    waiting: int,
    running: int,
    started_ms: int,
) -> str:
    """Prometheus text. `versions` come with whether they serve now; retired ones keep their last counts."""
    lines: list[str] = []
    lines += _family("edgeward_rejected_total", "counter", "Requests refused, by reason.")
    lines += [f'edgeward_rejected_total{{reason="{r}"}} {n}' for r, n in sorted(rejected.items())]
    lines += _gauge("edgeward_queue_waiting", "Requests waiting for a worker.", waiting)
    lines += _gauge("edgeward_queue_running", "Requests in a worker.", running)
    lines += _versions(list(versions))
    lines += _gauge("process_resident_memory_bytes", "Resident memory.", rusage.resident_bytes())
    lines += _gauge("edgeward_private_memory_bytes", "Memory that is no file's.", rusage.private_bytes())
    lines += _gauge("process_cpu_seconds_total", "CPU time.", _cpu_s(), "counter")
    lines += _gauge("process_start_time_seconds", "Start, Unix time.", started_ms / 1000)
    return "\n".join(lines) + "\n"


def _versions(versions: list[tuple[VersionCounters, bool]]) -> Iterator[str]:
    seen = [(counters, counters.snapshot(), serves) for counters, serves in versions]
    yield from _family("edgeward_model_serving", "gauge", "1 for the version of a model that serves now.")
    for _, v, serves in seen:
        yield f'edgeward_model_serving{{{_labels(v)},digest="{v.digest}"}} {int(serves)}'
    yield from _family("edgeward_requests_total", "counter", "Inference requests a version took.")
    for _, v, _ in seen:
        yield f"edgeward_requests_total{{{_labels(v)}}} {v.requests}"
    yield from _family("edgeward_errors_total", "counter", "Requests a version failed on, by reason.")
    for counters, v, _ in seen:
        for reason, n in sorted(counters.errors().items()):
            yield f'edgeward_errors_total{{{_labels(v)},reason="{reason}"}} {n}'
    yield from _family("edgeward_non_finite_total", "counter", "Answers with NaN or infinity.")
    for _, v, _ in seen:
        yield f"edgeward_non_finite_total{{{_labels(v)}}} {v.non_finite}"
    yield from _family("edgeward_latency_seconds", "histogram", "From request received to answer encoded.")
    for counters, v, _ in seen:
        yield from _histogram(v, counters.latency_sum_s())


def _histogram(v: VersionStats, sum_s: float) -> Iterator[str]:
    name, labels = "edgeward_latency_seconds", _labels(v)
    for i in _SHOWN_BOUNDS:
        count = sum(v.latency_counts[: i + 1])
        yield f'{name}_bucket{{{labels},le="{BOUNDS_MS[i] / 1000:g}"}} {count}'
    yield f'{name}_bucket{{{labels},le="+Inf"}} {sum(v.latency_counts)}'
    yield f"{name}_sum{{{labels}}} {sum_s:.6f}"
    yield f"{name}_count{{{labels}}} {sum(v.latency_counts)}"


def _labels(v: VersionStats) -> str:
    return f'model="{v.name}",version="{v.version}"'


def _gauge(name: str, text: str, value: float, kind: str = "gauge") -> list[str]:
    return [*_family(name, kind, text), f"{name} {value}"]


def _family(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def _cpu_s() -> float:
    times = os.times()
    return round(times.user + times.system, 3)
