"""Pure: serving statistics as additive counts, so that windows are differences and devices are sums.

The inference process counts; the control process takes differences for telemetry and probation.
"""

from __future__ import annotations

from bisect import bisect_left

from msgspec import Struct

# Upper bounds of the latency buckets in ms: 0.05 ms to about 100 s, each 25 % above the last.
BOUNDS_MS: tuple[float, ...] = tuple(round(0.05 * 1.25**i, 4) for i in range(66))


class VersionStats(Struct, frozen=True, forbid_unknown_fields=True):
    """Counts of one loaded version since it was loaded.

    `latency_counts` has one count per bucket of BOUNDS_MS and one for everything slower;
    `top1_counts` maps an output's name to how often each class was its largest value.
    """

    name: str
    version: str
    digest: str
    loaded_ms: int
    requests: int
    errors: int
    non_finite: int
    latency_counts: list[int]
    top1_counts: dict[str, list[int]]


class ServingStats(Struct, frozen=True, forbid_unknown_fields=True):
    """What `GET /edgeward/v1/stats` on the control socket returns.

    `private_bytes` is the process's memory, in RAM or swap, that is no file's: what a leak makes grow.
    """

    pid: int
    started_ms: int
    versions: list[VersionStats]
    private_bytes: int = 0


def bucket(latency_ms: float) -> int:
    """Index of the bucket that holds `latency_ms`."""
    return bisect_left(BOUNDS_MS, latency_ms)


def empty_latency() -> list[int]:
    """Zero counts, one per bucket and one for everything slower."""
    return [0] * (len(BOUNDS_MS) + 1)


def quantile_ms(counts: list[int], q: float) -> float | None:
    """The q-quantile by linear interpolation in its bucket; None without samples."""
    total = sum(counts)
    if total == 0:
        return None
    rank, seen = q * total, 0
    for i, n in enumerate(counts):
        if n and seen + n >= rank:
            low = BOUNDS_MS[i - 1] if i else 0.0
            high = BOUNDS_MS[i] if i < len(BOUNDS_MS) else BOUNDS_MS[-1] * 1.25
            return low + (high - low) * max(0.0, rank - seen) / n
        seen += n
    return BOUNDS_MS[-1] * 1.25


def since(now: VersionStats, before: VersionStats | None) -> VersionStats:
    """What was counted after `before`; all of `now` when it is another load of the version."""
    if before is None or (before.digest, before.loaded_ms) != (now.digest, now.loaded_ms):
        return now
    top1 = {
        name: _minus(counts, before.top1_counts.get(name, [])) for name, counts in now.top1_counts.items()
    }
    return VersionStats(
        name=now.name,
        version=now.version,
        digest=now.digest,
        loaded_ms=now.loaded_ms,
        requests=now.requests - before.requests,
        errors=now.errors - before.errors,
        non_finite=now.non_finite - before.non_finite,
        latency_counts=_minus(now.latency_counts, before.latency_counts),
        top1_counts=top1,
    )


def _minus(a: list[int], b: list[int]) -> list[int]:
    padded = b + [0] * (len(a) - len(b))
    return [x - y for x, y in zip(a, padded, strict=True)]
