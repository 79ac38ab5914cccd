"""Counts of a version, and the Prometheus text."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from edge_agent.serving import rusage
from edge_agent.serving.metrics import VersionCounters, is_scores, render
from edge_agent.stats import bucket, since
from edge_contract.errors import Reason
from edge_contract.manifest import Tensor
from tests.support.models import make_bundle


@pytest.fixture
def counters(tmp_path: Path) -> VersionCounters:
    bundle = make_bundle(tmp_path)
    return VersionCounters(bundle.manifest, bundle.digest, 1000)


def scores(*rows: list[float]) -> dict[str, np.ndarray]:
    return {"scores": np.array(rows, np.float32)}


def test_answers_are_counted_with_latency_and_decisions(counters: VersionCounters) -> None:
    counters.answered(1.0, scores([0, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]))
    counters.answered(4.0, scores([0, 0, 0, 1]))
    stats = counters.snapshot()
    assert (stats.requests, stats.errors, stats.non_finite) == (2, 0, 0)
    assert stats.latency_counts[bucket(1.0)] == stats.latency_counts[bucket(4.0)] == 1
    assert sum(stats.latency_counts) == 2
    assert stats.top1_counts == {"scores": [1, 2, 0, 1]}
    assert counters.latency_sum_s() == pytest.approx(0.005)


def test_an_answer_with_nan_is_no_decision(counters: VersionCounters) -> None:
    counters.answered(1.0, scores([0, np.nan, 0, 0], [0, 1, 0, 0]))
    stats = counters.snapshot()
    assert stats.non_finite == 1
    assert sum(stats.top1_counts["scores"]) == 0


def test_an_answer_of_another_width_is_counted_without_decisions(counters: VersionCounters) -> None:
    counters.answered(1.0, {"scores": np.zeros((1, 9), np.float32)})
    assert counters.snapshot().requests == 1
    assert sum(counters.snapshot().top1_counts["scores"]) == 0


def test_failures_are_counted_by_reason(counters: VersionCounters) -> None:
    counters.failed(1.0, Reason.INFERENCE_FAILED)
    counters.failed(1.0, Reason.DEADLINE_EXCEEDED)
    counters.failed(1.0, Reason.NON_FINITE_OUTPUT)
    stats = counters.snapshot()
    assert (stats.requests, stats.errors, stats.non_finite) == (3, 3, 1)
    assert counters.errors()[Reason.DEADLINE_EXCEEDED] == 1


def test_snapshots_are_values_whose_differences_are_windows(counters: VersionCounters) -> None:
    counters.answered(1.0, scores([0, 1, 0, 0]))
    before = counters.snapshot()
    counters.answered(1.0, scores([1, 0, 0, 0]))
    window = since(counters.snapshot(), before)
    assert window.requests == 1
    assert window.top1_counts == {"scores": [1, 0, 0, 0]}


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (Tensor("t", "FP32", [-1, 10]), True),
        (Tensor("t", "FP16", [1, 1000]), True),
        (Tensor("t", "FP32", [-1, 1001]), False),
        (Tensor("t", "FP32", [-1, 1]), False),
        (Tensor("t", "FP32", [-1, -1]), False),
        (Tensor("t", "FP32", [-1, 4, 10]), False),
        (Tensor("t", "INT64", [-1, 10]), False),
    ],
)
def test_what_looks_like_class_scores(tensor: Tensor, expected: bool) -> None:
    assert is_scores(tensor) is expected


LINE = re.compile(r'^[a-z_]+(\{[a-z0-9_]+="[^"]*"(,[a-z0-9_]+="[^"]*")*\})? -?[0-9.e+-]+$')


def test_the_text_is_well_formed_and_says_the_counts(counters: VersionCounters) -> None:
    counters.answered(1.0, scores([0, 1, 0, 0]))
    counters.failed(2.0, Reason.INFERENCE_FAILED)
    text = render(
        [(counters, True)],
        rejected={Reason.OVERLOADED: 3},
        waiting=4,
        running=2,
        started_ms=1_700_000_000_000,
    )
    lines = text.splitlines()
    assert text.endswith("\n")
    assert all(line.startswith(("# HELP ", "# TYPE ")) or LINE.match(line) for line in lines)
    version = 'model="tiny",version="1.0.0"'
    for expected in (
        'edgeward_rejected_total{reason="overloaded"} 3',
        "edgeward_queue_waiting 4",
        f"edgeward_requests_total{{{version}}} 2",
        f'edgeward_errors_total{{{version},reason="inference_failed"}} 1',
        f'edgeward_latency_seconds_bucket{{{version},le="+Inf"}} 2',
        f"edgeward_latency_seconds_sum{{{version}}} 0.003000",
        f"edgeward_latency_seconds_count{{{version}}} 2",
    ):
        assert expected in lines


def test_histogram_buckets_never_fall(counters: VersionCounters) -> None:
    for latency_ms in (0.01, 0.3, 5, 80, 1e6):
        counters.failed(latency_ms, Reason.INFERENCE_FAILED)
    text = render([(counters, True)], rejected={}, waiting=0, running=0, started_ms=0)
    values = [int(line.rsplit(" ", 1)[1]) for line in text.splitlines() if "_bucket{" in line]
    assert values == sorted(values)
    assert values[-1] == 5


def test_memory_figures_are_this_process() -> None:
    assert 10 << 20 < rusage.resident_bytes() <= rusage.peak_resident_bytes() + (1 << 20)
