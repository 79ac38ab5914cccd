"""Pure: is the new version at least as healthy as the one before? Judged on local counts alone.

`judge` is called at each tick with what the new version has done since activation, what the version
before did in its life, and how often the inference process fell over meanwhile.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from edge_agent.config import Update
from edge_agent.stats import VersionStats, quantile_ms
from edge_contract.errors import Reason

# Fewer samples than this on either side say nothing about a tail or a distribution.
_MIN_SAMPLES = 30
# A few requests can fail by accident, or be one client's fault.
_MIN_ERRORS = 3
# Latency below this is noise of a small box, whatever the factor.
_LATENCY_FLOOR_MS = 2.0
MAX_RESTARTS = 2


class Watch(NamedTuple):
    """Probation goes on; `share` of it is done."""

    share: float


class Healthy(NamedTuple):
    """Commit. `detail` says on what evidence."""

    detail: str


class Unhealthy(NamedTuple):
    """Revert, and why."""

    reason: Reason
    detail: str


Verdict = Watch | Healthy | Unhealthy


def judge(
    config: Update, new: VersionStats | None, old: VersionStats | None, *, restarts: int, elapsed_s: float
) -> Verdict:
    """The verdict now. `new` is None while the inference process does not answer."""
    if restarts >= MAX_RESTARTS:
        return Unhealthy(
            Reason.CANDIDATE_CRASHED, f"the inference process fell over {restarts} times in probation"
        )
    if new is not None:
        finding = _errors(config, new) or _latency(config, new, old) or _drift(config, new, old)
        if finding:
            return finding
    enough = new is not None and new.requests >= config.probation_min_requests
    if elapsed_s >= config.probation_s and enough:
        return Healthy(f"{new.requests if new else 0} requests in {elapsed_s:.0f} s without a finding")
    if elapsed_s >= config.probation_max_s:
        if new is None:
            return Unhealthy(Reason.SERVING_UNREACHABLE, "the inference process does not answer")
        return Healthy(f"only {new.requests} requests in {elapsed_s:.0f} s, none of them a finding")
    return Watch(_share(config, new, elapsed_s))


def _share(config: Update, new: VersionStats | None, elapsed_s: float) -> float:
    time_share = elapsed_s / config.probation_s
    seen = new.requests if new else 0
    wanted = config.probation_min_requests
    return min(1.0, time_share, seen / wanted if wanted else 1.0)


def _errors(config: Update, new: VersionStats) -> Unhealthy | None:
    if new.non_finite:
        return Unhealthy(
            Reason.NON_FINITE_OUTPUT, f"{new.non_finite} of {new.requests} answers held NaN or infinity"
        )
    total = new.requests
    telling = total >= _MIN_SAMPLES or new.errors >= _MIN_ERRORS
    if telling and new.errors / total > config.max_error_rate:
        return Unhealthy(
            Reason.ERROR_RATE,
            f"{new.errors} of {total} requests failed, over the limit of {config.max_error_rate:.1%}",
        )
    return None


def _latency(config: Update, new: VersionStats, old: VersionStats | None) -> Unhealthy | None:
    if old is None or min(sum(new.latency_counts), sum(old.latency_counts)) < _MIN_SAMPLES:
        return None
    # The median: a tail on a small box is mostly other processes' doing.
    now, before = quantile_ms(new.latency_counts, 0.5), quantile_ms(old.latency_counts, 0.5)
    if now is None or before is None:
        return None
    limit = max(config.max_latency_factor * before, _LATENCY_FLOOR_MS)
    if now > limit:
        return Unhealthy(
            Reason.LATENCY_REGRESSED,
            f"median latency {now:.2f} ms against {before:.2f} ms before, limit {limit:.2f} ms",
        )
    return None


def _drift(config: Update, new: VersionStats, old: VersionStats | None) -> Unhealthy | None:
    if old is None:
        return None
    for name, counts in new.top1_counts.items():
        before = old.top1_counts.get(name, [])
        n, m = sum(counts), sum(before)
        if len(before) != len(counts) or min(n, m) < max(_MIN_SAMPLES, config.probation_min_requests):
            continue
        distance = total_variation(counts, before)
        limit = config.max_drift + sampling_noise(counts, before)
        if distance > limit:
            top = max(range(len(counts)), key=counts.__getitem__)
            return Unhealthy(
                Reason.OUTPUT_DRIFT,
                f"decisions of {name} moved by {distance:.0%} (limit {limit:.0%}): class {top} is now "
                f"{counts[top] / n:.0%} of {n}, before {before[top] / m:.0%} of {m}",
            )
    return None


def total_variation(a: list[int], b: list[int]) -> float:
    """Half the summed difference of two normalised histograms: the share of decisions that moved."""
    n, m = sum(a), sum(b)
    return 0.5 * sum(abs(x / n - y / m) for x, y in zip(a, b, strict=True))


def sampling_noise(a: list[int], b: list[int]) -> float:
    """Expected total variation of two samples of one distribution (normal approximation per class)."""
    n, m = sum(a), sum(b)
    pooled = [(x + y) / (n + m) for x, y in zip(a, b, strict=True)]
    spread = sum(math.sqrt(p * (1 - p)) for p in pooled)
    return 0.5 * math.sqrt(2 / math.pi) * math.sqrt(1 / n + 1 / m) * spread
