"""Latency buckets, quantiles, and windows as differences."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.stats import BOUNDS_MS, VersionStats, bucket, empty_latency, quantile_ms, since

SLOWEST = len(BOUNDS_MS)


def histogram(latencies_ms: list[float]) -> list[int]:
    counts = empty_latency()
    for value in latencies_ms:
        counts[bucket(value)] += 1
    return counts


def stats(requests: int, *, loaded_ms: int = 1, digest: str = "a" * 64, **more: object) -> VersionStats:
    fields: dict[str, object] = {
        "errors": requests // 10,
        "non_finite": requests // 20,
        "latency_counts": histogram([1.0] * requests),
        "top1_counts": {"scores": [requests, 0]},
    }
    return VersionStats(
        name="tiny",
        version="1.0.0",
        digest=digest,
        loaded_ms=loaded_ms,
        requests=requests,
        **(fields | more),  # type: ignore[arg-type]
    )


def test_bounds_rise_by_a_quarter_from_fifty_microseconds_to_over_a_minute() -> None:
    ratios = np.divide(BOUNDS_MS[1:], BOUNDS_MS[:-1])
    assert (BOUNDS_MS[0], ratios.min() > 1.24, ratios.max() < 1.26) == (0.05, True, True)
    assert 60_000 < BOUNDS_MS[-1] < 200_000
    assert len(empty_latency()) == SLOWEST + 1


@pytest.mark.parametrize(
    ("latency_ms", "index"),
    [(0.0, 0), (0.05, 0), (0.0501, 1), (BOUNDS_MS[-1], SLOWEST - 1), (1e9, SLOWEST)],
)
def test_a_bucket_holds_its_upper_bound(latency_ms: float, index: int) -> None:
    assert bucket(latency_ms) == index


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("q", [0.01, 0.25, 0.5, 0.9, 0.95, 0.99])
def test_quantiles_agree_with_numpy_within_a_bucket(seed: int, q: float) -> None:
    rng = np.random.default_rng(seed)
    values = rng.lognormal(mean=1.5, sigma=0.8, size=3000)
    exact = float(np.quantile(values, q))
    found = quantile_ms(histogram(values.tolist()), q)
    assert found is not None
    assert exact / 1.25 <= found <= exact * 1.25


def test_quantiles_are_close_to_numpy_for_values_spread_evenly() -> None:
    values = np.linspace(BOUNDS_MS[20], BOUNDS_MS[25], 10001)
    for q in (0.1, 0.5, 0.9):
        assert quantile_ms(histogram(values.tolist()), q) == pytest.approx(np.quantile(values, q), rel=0.02)


def test_no_samples_have_no_quantile() -> None:
    assert quantile_ms(empty_latency(), 0.5) is None


def test_what_is_slower_than_all_bounds_still_has_a_quantile() -> None:
    found = quantile_ms(histogram([1e9, 1e9]), 0.5)
    assert found is not None
    assert found > BOUNDS_MS[-1]


def test_the_extremes_lie_in_the_outermost_buckets_in_use() -> None:
    counts = histogram([1.0, 4.0, 100.0])
    low, high = quantile_ms(counts, 0.0), quantile_ms(counts, 1.0)
    assert low is not None
    assert high is not None
    assert BOUNDS_MS[bucket(1.0) - 1] <= low <= BOUNDS_MS[bucket(1.0)]
    assert high == BOUNDS_MS[bucket(100.0)]


@given(st.lists(st.floats(0, 1e6), max_size=50), st.lists(st.floats(0, 1e6), max_size=50))
def test_histograms_are_additive(a: list[float], b: list[float]) -> None:
    assert [x + y for x, y in zip(histogram(a), histogram(b), strict=True)] == histogram(a + b)


@given(st.lists(st.floats(0.01, 1e5), min_size=1, max_size=60), st.floats(0, 1), st.floats(0, 1))
def test_quantiles_rise_with_q(values: list[float], q: float, r: float) -> None:
    counts = histogram(values)
    low, high = quantile_ms(counts, min(q, r)), quantile_ms(counts, max(q, r))
    assert low is not None
    assert high is not None
    assert low <= high + 1e-9


def test_since_is_the_difference_of_two_looks() -> None:
    window = since(stats(100), stats(30))
    assert (window.requests, window.errors, window.non_finite) == (70, 7, 4)
    assert window.latency_counts == histogram([1.0] * 70)
    assert window.top1_counts == {"scores": [70, 0]}


def test_windows_add_up_to_the_whole() -> None:
    looks = [None, stats(10), stats(10), stats(55), stats(100)]
    windows = [since(b, a) for a, b in pairwise(looks) if b is not None]
    assert sum(w.requests for w in windows) == 100
    assert [sum(c) for c in zip(*(w.latency_counts for w in windows), strict=True)] == histogram([1.0] * 100)


@pytest.mark.parametrize("before", [None, stats(30, loaded_ms=0), stats(30, digest="c" * 64)])
def test_another_load_or_version_counts_from_zero(before: VersionStats | None) -> None:
    assert since(stats(5), before) == stats(5)


def test_an_output_that_was_not_counted_before_counts_from_zero() -> None:
    now = stats(10, top1_counts={"scores": [4, 6], "more": [1, 2]})
    assert since(now, stats(5)).top1_counts == {"scores": [-1, 6], "more": [1, 2]}
