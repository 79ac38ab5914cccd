"""Pure: is the new version at least as healthy as the one before? Judged on local counts alone.

`judge` is called at each tick with what the new version has done since activation, what the version
before did in its life, and how the inference process fared meanwhile.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from msgspec import UNSET, UnsetType
from msgspec.structs import asdict, replace

from edge_agent.config import Update
from edge_agent.stats import VersionStats, quantile_ms
from edge_contract.errors import Reason
from edge_contract.manifest import Probation

# Fewer samples than this on either side say nothing about a median or a distribution, ...
_MIN_SAMPLES = 30
# ... and fewer than this nothing about a tail.
_MIN_TAIL_SAMPLES = 200
_TAIL = 0.95
# A few requests can fail by accident, or be one client's fault.
_MIN_ERRORS = 3
# Latency below this is noise of a small box, whatever the factor.
_LATENCY_FLOOR_MS = 2.0
_TAIL_FLOOR_MS = 20.0
# Memory: looks that show a trend, and growth over them that is more than caches and pools filling up.
_MIN_LOOKS = 20
_TREND_FLOOR_BYTES = 8 << 20
# Of the growth over four quarters a straight line takes a third in each step.
_STEADY = 0.28


class Process(NamedTuple):
    """How the inference process fared: its ends, and its private memory at each look since the last end."""

    restarts: int = 0
    memory: Sequence[int] = ()


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


def thresholds(device: Update, own: Probation | UnsetType) -> Update:
    """The device's configuration with what the model's manifest says in its place."""
    if own is UNSET:
        return device
    return replace(device, **{key: value for key, value in asdict(own).items() if value is not None})


def judge(
    config: Update, new: VersionStats | None, old: VersionStats | None, process: Process, elapsed_s: float
) -> Verdict:
    """The verdict now. `new` is None while the inference process does not answer."""
    if process.restarts > config.max_restarts:
        return Unhealthy(
            Reason.CANDIDATE_CRASHED, f"the inference process fell over {process.restarts} times in probation"
        )
    if new is not None:
        finding = (
            _non_finite(new, old)
            or _errors(config, new, old)
            or _latency(config, new, old)
            or _memory(config, process.memory, trend=elapsed_s >= config.probation_s)
            or _drift(config, new, old)
        )
        if finding:
            return finding
    enough = new is not None and new.requests >= config.probation_min_requests
    if elapsed_s >= config.probation_s and enough:
        return Healthy(f"{new.requests if new else 0} requests in {elapsed_s:.0f} s without a finding")
    # A manifest may ask for a longer window than the device's longest.
    if elapsed_s >= max(config.probation_max_s, config.probation_s):
        if new is None:
            return Unhealthy(Reason.SERVING_UNREACHABLE, "the inference process does not answer")
        return Healthy(f"only {new.requests} requests in {elapsed_s:.0f} s, none of them a finding")
    return Watch(_share(config, new, elapsed_s))


def _share(config: Update, new: VersionStats | None, elapsed_s: float) -> float:
    time_share = elapsed_s / config.probation_s
    seen = new.requests if new else 0
    wanted = config.probation_min_requests
    return min(1.0, time_share, seen / wanted if wanted else 1.0)


def _non_finite(new: VersionStats, old: VersionStats | None) -> Unhealthy | None:
    if not new.non_finite:
        return None
    # Some nets answer infinity by design; then it is a finding only when there is much more of it.
    before = _rate(old, old.non_finite) if old else 0.0
    if new.non_finite <= _MIN_ERRORS + 2 * before * new.requests and before:
        return None
    return Unhealthy(
        Reason.NON_FINITE_OUTPUT, f"{new.non_finite} of {new.requests} answers held NaN or infinity"
    )


def _errors(config: Update, new: VersionStats, old: VersionStats | None) -> Unhealthy | None:
    total = new.requests
    telling = total >= _MIN_SAMPLES or new.errors >= _MIN_ERRORS
    # What failed before fails now: those are the clients' inputs.
    limit = config.max_error_rate + (_rate(old, old.errors) if old else 0.0)
    if telling and new.errors / total > limit:
        return Unhealthy(
            Reason.ERROR_RATE, f"{new.errors} of {total} requests failed, over the limit of {limit:.1%}"
        )
    return None


def _rate(old: VersionStats, count: int) -> float:
    """A share of the old version's requests; 0 where there are too few to say."""
    return count / old.requests if old.requests >= _MIN_SAMPLES else 0.0


def _latency(config: Update, new: VersionStats, old: VersionStats | None) -> Unhealthy | None:
    if old is None:
        return None
    samples = min(sum(new.latency_counts), sum(old.latency_counts))
    found = None
    if samples >= _MIN_SAMPLES:
        found = _slower("median latency", 0.5, config.max_latency_factor, _LATENCY_FLOOR_MS, new, old)
    if found is None and samples >= _MIN_TAIL_SAMPLES:
        found = _slower("95th percentile", _TAIL, config.max_tail_factor, _TAIL_FLOOR_MS, new, old)
    return found


def _slower(
    what: str, q: float, factor: float, floor_ms: float, new: VersionStats, old: VersionStats
) -> Unhealthy | None:
    now, before = quantile_ms(new.latency_counts, q), quantile_ms(old.latency_counts, q)
    if now is None or before is None:
        return None
    limit = max(factor * before, floor_ms)
    if now <= limit:
        return None
    return Unhealthy(
        Reason.LATENCY_REGRESSED, f"{what} {now:.2f} ms against {before:.2f} ms before, limit {limit:.2f} ms"
    )


def _memory(config: Update, memory: Sequence[int], *, trend: bool) -> Unhealthy | None:
    """Growth from the lowest point, which is when the version before was let go: its size, then its trend."""
    if not memory:
        return None
    seen = memory[memory.index(min(memory)) :]
    growth = seen[-1] - seen[0]
    if growth > config.max_memory_growth_bytes:
        return Unhealthy(
            Reason.MEMORY_LEAK,
            f"private memory grew by {growth} bytes, over the limit of {config.max_memory_growth_bytes}",
        )
    if not trend or len(seen) < _MIN_LOOKS:
        return None
    quarter = len(seen) // 4
    levels = [statistics.median(seen[i * quarter : (i + 1) * quarter]) for i in range(4)]
    steps = [b - a for a, b in pairwise(levels)]
    # What fills up slows down within the window; what leaks grows as much in its end as in its beginning.
    if sum(steps) >= _TREND_FLOOR_BYTES and min(steps) >= _STEADY * sum(steps):
        return Unhealthy(
            Reason.MEMORY_LEAK,
            f"private memory grows and grows: by {growth} bytes so far, as fast at the end as at the start",
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
