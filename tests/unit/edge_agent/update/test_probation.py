"""When a new version is kept, watched on, or thrown out."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec import UNSET

from edge_agent.config import Update
from edge_agent.stats import VersionStats, bucket, empty_latency
from edge_agent.update.probation import (
    Healthy,
    Process,
    Unhealthy,
    Verdict,
    Watch,
    judge,
    sampling_noise,
    thresholds,
    total_variation,
)
from edge_contract.errors import Reason
from edge_contract.manifest import Probation

CONFIG = Update(
    probation_s=10.0,
    probation_min_requests=50,
    probation_max_s=100.0,
    max_error_rate=0.02,
    max_latency_factor=3.0,
    max_drift=0.35,
)


def counts(
    requests: int = 100,
    *,
    errors: int = 0,
    non_finite: int = 0,
    latency_ms: float = 5.0,
    top1: list[int] | None = None,
    digest: str = "b" * 64,
) -> VersionStats:
    latency = empty_latency()
    latency[bucket(latency_ms)] = requests
    top1_counts = {"scores": [requests // 2, requests - requests // 2] if top1 is None else top1}
    return VersionStats("tiny", "2.0.0", digest, 1, requests, errors, non_finite, latency, top1_counts)


def verdict(
    new: VersionStats | None,
    old: VersionStats | None = None,
    *,
    config: Update = CONFIG,
    restarts: int = 0,
    memory: list[int] | None = None,
    elapsed_s: float = 20.0,
) -> Verdict:
    return judge(config, new, old, Process(restarts, memory or []), elapsed_s)


def test_enough_time_and_requests_without_a_finding_commit() -> None:
    assert verdict(counts(60), counts(500), elapsed_s=10.0) == Healthy(
        "60 requests in 10 s without a finding"
    )


@pytest.mark.parametrize(
    ("requests", "elapsed_s", "share"),
    [(0, 0.0, 0.0), (50, 5.0, 0.5), (10, 50.0, 0.2), (49, 99.0, 0.98), (500, 9.9, 0.99)],
)
def test_it_watches_until_there_is_time_and_evidence(requests: int, elapsed_s: float, share: float) -> None:
    found = verdict(counts(requests), elapsed_s=elapsed_s)
    assert isinstance(found, Watch)
    assert found.share == pytest.approx(share)


def test_without_a_minimum_time_alone_decides() -> None:
    config = Update(probation_s=10.0, probation_min_requests=0)
    assert isinstance(verdict(counts(0), config=config, elapsed_s=9.0), Watch)
    assert isinstance(verdict(counts(0), config=config, elapsed_s=10.0), Healthy)


def test_a_quiet_device_commits_at_the_longest_time_and_says_so() -> None:
    assert isinstance(verdict(counts(3), elapsed_s=99.9), Watch)
    assert verdict(counts(3), elapsed_s=100.0) == Healthy("only 3 requests in 100 s, none of them a finding")


def test_an_inference_process_that_stays_silent_is_a_failure_only_in_the_end() -> None:
    assert verdict(None, elapsed_s=0.0) == Watch(0.0)
    assert isinstance(verdict(None, counts(), elapsed_s=99.0), Watch)
    found = verdict(None, counts(), elapsed_s=100.0)
    assert isinstance(found, Unhealthy)
    assert found.reason is Reason.SERVING_UNREACHABLE


@pytest.mark.parametrize(
    ("errors", "requests", "reverted"),
    [
        (0, 100, False),
        (2, 100, False),  # at the limit
        (3, 100, True),
        (1, 30, True),
        (1, 29, False),  # one in a few may be an accident
        (2, 10, False),
        (3, 3, True),  # three out of three are none
        (3, 29, True),
        (29, 29, True),
    ],
)
def test_error_rate(errors: int, requests: int, reverted: bool) -> None:
    found = verdict(counts(requests, errors=errors), elapsed_s=1.0)
    assert isinstance(found, Unhealthy) == reverted
    if isinstance(found, Unhealthy):
        assert found.reason is Reason.ERROR_RATE
        assert found.detail == f"{errors} of {requests} requests failed, over the limit of 2.0%"


def test_a_generous_error_limit_holds_for_few_requests_too() -> None:
    config = Update(max_error_rate=0.5)
    assert isinstance(verdict(counts(10, errors=4), config=config, elapsed_s=1.0), Watch)
    assert isinstance(verdict(counts(10, errors=6), config=config, elapsed_s=1.0), Unhealthy)


def test_one_answer_with_nan_is_enough() -> None:
    found = verdict(counts(1, non_finite=1), elapsed_s=0.1)
    assert isinstance(found, Unhealthy)
    assert found.reason is Reason.NON_FINITE_OUTPUT


@pytest.mark.parametrize(
    ("before_ms", "now_ms", "reverted"),
    [
        (5.0, 5.0, False),
        (5.0, 12.0, False),
        (5.0, 20.0, True),
        (0.2, 1.5, False),  # sevenfold, but below what a small box can tell apart
        (0.2, 2.5, True),
        (20.0, 5.0, False),  # faster
    ],
)
def test_latency_against_the_version_before(before_ms: float, now_ms: float, reverted: bool) -> None:
    found = verdict(counts(latency_ms=now_ms), counts(latency_ms=before_ms), elapsed_s=1.0)
    assert isinstance(found, Unhealthy) == reverted
    if isinstance(found, Unhealthy):
        assert found.reason is Reason.LATENCY_REGRESSED


@pytest.mark.parametrize(("new", "old"), [(29, 100), (100, 29), (100, 0)])
def test_latency_needs_samples_on_both_sides(new: int, old: int) -> None:
    found = verdict(counts(new, latency_ms=90.0), counts(old, latency_ms=1.0), elapsed_s=1.0)
    assert isinstance(found, Watch)


def test_the_first_version_of_a_model_has_nothing_to_be_slower_or_other_than() -> None:
    assert isinstance(verdict(counts(latency_ms=500.0, top1=[100, 0]), None), Healthy)


def test_a_tail_is_not_a_regression() -> None:
    slow_tail = counts(100, latency_ms=5.0)
    slow_tail.latency_counts[bucket(5.0)] -= 40
    slow_tail.latency_counts[bucket(900.0)] += 40
    assert isinstance(verdict(slow_tail, counts(latency_ms=5.0)), Healthy)


def test_decisions_that_moved_are_drift() -> None:
    found = verdict(counts(top1=[95, 5]), counts(top1=[40, 60]), elapsed_s=1.0)
    assert isinstance(found, Unhealthy)
    assert found.reason is Reason.OUTPUT_DRIFT
    assert "class 0 is now 95% of 100, before 40% of 100" in found.detail


def test_drift_needs_the_minimum_of_requests_on_both_sides() -> None:
    assert isinstance(verdict(counts(49, top1=[49, 0]), counts(top1=[0, 100]), elapsed_s=1.0), Watch)
    assert isinstance(verdict(counts(top1=[100, 0]), counts(49, top1=[0, 49]), elapsed_s=1.0), Watch)


def test_outputs_that_cannot_be_compared_are_no_drift() -> None:
    """Another number of classes, or an output the version before did not have."""
    assert isinstance(verdict(counts(top1=[100, 0, 0]), counts(top1=[0, 100])), Healthy)
    new = counts()
    renamed = VersionStats(
        new.name, new.version, new.digest, 1, 100, 0, 0, new.latency_counts, {"logits": [100, 0]}
    )
    assert isinstance(verdict(renamed, counts(top1=[0, 100])), Healthy)


@pytest.mark.parametrize("classes", [2, 4, 10, 100])
@pytest.mark.parametrize(("n", "m"), [(50, 50), (50, 5000), (1000, 1000)])
def test_samples_of_one_distribution_never_trip(classes: int, n: int, m: int) -> None:
    """1000 draws each, from the smallest sizes that are judged, with the default limit."""
    rng = np.random.default_rng(20260101 + classes)
    for _ in range(1000):
        p = rng.dirichlet(np.ones(classes))
        new, old = (counts(k, top1=rng.multinomial(k, p).tolist()) for k in (n, m))
        found = verdict(new, old)
        assert isinstance(found, Healthy), found


@pytest.mark.parametrize("classes", [2, 4, 10])
def test_a_distribution_that_moved_by_more_than_the_limit_always_trips(classes: int) -> None:
    """60 % of all decisions become a class that was never chosen: the allowance for noise must not hide it.

    With 100 classes and 400 samples it may: so few say little about so many classes.
    """
    rng = np.random.default_rng(3)
    for _ in range(500):
        p = rng.dirichlet(np.full(classes, 5.0))
        p[0] = 0.0
        p /= p.sum()
        moved = 0.4 * p
        moved[0] += 0.6
        new, old = (counts(400, top1=rng.multinomial(400, d).tolist()) for d in (moved, p))
        found = verdict(new, old, elapsed_s=1.0)
        assert isinstance(found, Unhealthy)
        assert found.reason is Reason.OUTPUT_DRIFT


def test_sampling_noise_is_the_expected_distance_of_two_samples() -> None:
    """Against simulation: within 10 % where the normal approximation holds."""
    rng = np.random.default_rng(5)
    for classes in (2, 5, 20):
        p = np.full(classes, 1 / classes)
        draws = [(rng.multinomial(400, p).tolist(), rng.multinomial(300, p).tolist()) for _ in range(2000)]
        seen = np.mean([total_variation(a, b) for a, b in draws])
        predicted = np.mean([sampling_noise(a, b) for a, b in draws])
        assert predicted == pytest.approx(seen, rel=0.1)


def test_total_variation_is_a_share() -> None:
    assert total_variation([10, 0], [0, 3]) == 1.0
    assert total_variation([10, 30], [1, 3]) == 0.0
    assert total_variation([50, 50], [100, 0]) == 0.5


def test_an_inference_process_that_keeps_falling_over_is_the_candidates_fault() -> None:
    assert isinstance(verdict(counts(), restarts=1), Healthy)
    for new in (counts(), None):
        found = verdict(new, restarts=2, elapsed_s=0.5)
        assert isinstance(found, Unhealthy)
        assert found.reason is Reason.CANDIDATE_CRASHED


def test_the_gravest_finding_is_the_one_reported() -> None:
    found = verdict(counts(errors=50, non_finite=2, latency_ms=90.0, top1=[100, 0]), counts(top1=[0, 100]))
    assert isinstance(found, Unhealthy)
    assert found.reason is Reason.NON_FINITE_OUTPUT


MB = 1 << 20


def test_errors_that_the_version_before_made_too_are_not_the_new_ones_fault() -> None:
    before = counts(1000, errors=100)
    assert isinstance(verdict(counts(100, errors=11), before), Healthy)
    assert isinstance(verdict(counts(100, errors=13), before), Unhealthy)
    assert isinstance(verdict(counts(100, errors=11), counts(29, errors=10)), Unhealthy)  # too few to tell


def test_infinities_by_design_are_a_finding_only_when_there_is_much_more_of_them() -> None:
    before = counts(1000, non_finite=100)
    assert isinstance(verdict(counts(100, non_finite=15), before), Healthy)
    found = verdict(counts(100, non_finite=40), before)
    assert isinstance(found, Unhealthy)
    assert found.reason is Reason.NON_FINITE_OUTPUT


def with_tail(requests: int, slow: int, slow_ms: float) -> VersionStats:
    found = counts(requests, latency_ms=5.0)
    found.latency_counts[bucket(5.0)] -= slow
    found.latency_counts[bucket(slow_ms)] += slow
    return found


@pytest.mark.parametrize(
    ("requests", "slow", "slow_ms", "reverted"),
    [
        (200, 20, 60.0, True),
        (199, 20, 60.0, False),  # too few for a tail
        (200, 8, 60.0, False),  # the tail begins behind them
        (200, 20, 25.0, False),  # within the factor
    ],
)
def test_a_tail_that_grew_needs_more_samples(
    requests: int, slow: int, slow_ms: float, reverted: bool
) -> None:
    found = verdict(with_tail(requests, slow, slow_ms), counts(1000, latency_ms=5.0))
    assert isinstance(found, Unhealthy) == reverted
    if isinstance(found, Unhealthy):
        assert found.reason is Reason.LATENCY_REGRESSED
        assert found.detail.startswith("95th percentile")


def leaked(memory: list[int], elapsed_s: float = 20.0) -> bool:
    found = verdict(counts(), memory=memory, elapsed_s=elapsed_s)
    assert isinstance(found, Watch | Healthy) or found.reason is Reason.MEMORY_LEAK
    return isinstance(found, Unhealthy)


def test_memory_that_grows_beyond_the_limit_is_a_leak_at_once() -> None:
    assert not leaked([100 * MB, 100 * MB + 64 * MB])
    assert leaked([100 * MB, 101 * MB + 64 * MB])
    # Letting go of the version before makes room first: growth counts from the lowest point.
    assert not leaked([300 * MB, 200 * MB, 250 * MB])
    assert leaked([300 * MB, 200 * MB, 270 * MB])


def test_a_slow_leak_is_known_by_its_trend() -> None:
    rng = np.random.default_rng(1)
    looks = np.arange(60)
    noise = rng.integers(0, MB // 2, 60)
    assert leaked((100 * MB + looks * MB // 4 + noise).tolist())
    assert not leaked((100 * MB + looks * MB // 16 + noise).tolist())  # 4 MB over all: no more than noise
    assert not leaked((100 * MB + looks[:19] * MB // 2).tolist())  # too early for a trend
    assert not leaked((100 * MB + looks * MB // 4).tolist(), elapsed_s=9.0)  # the window is not over


def test_pools_and_caches_that_fill_up_are_no_leak() -> None:
    looks = np.arange(120)
    filling = 100 * MB + (30 * MB * (1 - np.exp(-looks / 15))).astype(int)
    steps = 100 * MB + np.minimum(looks // 10, 4) * 8 * MB
    for shape in (filling, steps, np.full(120, 100 * MB)):
        for length in range(60, 121, 5):
            if leaked(shape[:length].tolist()):
                pytest.fail(f"{length} looks of {shape[:length] // MB}")


def test_a_manifest_says_what_its_model_is_held_to() -> None:
    assert thresholds(CONFIG, UNSET) is CONFIG
    own = thresholds(CONFIG, Probation(max_error_rate=0.5, probation_s=200.0))
    assert (own.max_error_rate, own.probation_s) == (0.5, 200.0)
    assert (own.max_drift, own.probation_min_requests) == (CONFIG.max_drift, CONFIG.probation_min_requests)
    assert isinstance(verdict(counts(errors=40), config=own), Watch)
    # Longer than the longest of the device: its own window counts.
    assert isinstance(verdict(counts(3), config=own, elapsed_s=150.0), Watch)
